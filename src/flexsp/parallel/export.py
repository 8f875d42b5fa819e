"""Saving the trained model, and its tokenizer, as a Hugging Face directory: written aside, renamed once it is whole."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PreTrainedModel

from flexsp.data.tokenizers import load_wrapped
from flexsp.disk import sync
from flexsp.parallel.control import PATIENCE

log = logging.getLogger(__name__)


def save_pretrained(model: PreTrainedModel, folder: str | Path, tokenizer: str = "") -> None:
    """Gathers the shards on rank 0, which writes what `from_pretrained` loads. A collective.

    The model's own `save_pretrained` cannot: each rank holds a shard of it. All ranks return once the folder has its
    name, so that they notice a rank 0 that ends before.

    Args:
        model: from `prepare_model`.
        folder: to be written, by rank 0 alone; what is there is replaced once the new one is whole.
        tokenizer: where one lies that is to be in the folder too; empty: none. One that cannot be is a warning.

    Raises:
        OSError: on rank 0, which cannot write there.
    """
    # its own group: what takes rank 0 longer than a collective may take is no fault, and its end is noticed at once
    patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        folder = Path(folder)
        part, before = (folder.with_name(f"{folder.name}.{what}") for what in ("part", "before"))
        for left in (part, before):  # by a kill
            shutil.rmtree(left, ignore_errors=True)
        if tokenizer:
            _save_tokenizer(tokenizer, part)
        model.save_pretrained(part, state_dict=state)
        for path in (*part.rglob("*"), part):
            sync(path)
        if folder.exists():
            os.replace(folder, before)
        os.replace(part, folder)
        sync(folder.parent)
        shutil.rmtree(before, ignore_errors=True)
    dist.barrier(group=patient)
    dist.destroy_process_group(patient)
    log.info("model: saved as %s", folder)


def _save_tokenizer(tokenizer: str, part: Path) -> None:
    """Before the model: what a failure leaves of it, which would be taken for one, is all that there is to remove."""
    try:
        load_wrapped(tokenizer).save_pretrained(part)
    except Exception as error:  # of the tokenizer's own code: of any kind; the model must not be lost for it
        shutil.rmtree(part, ignore_errors=True)
        said = " ".join(f"{type(error).__name__}: {error}".split())
        log.warning(
            "model: saved without the tokenizer of %r (%s); copy it there, or name data.tokenizer at the next stage",
            tokenizer, said,
        )  # fmt: skip
