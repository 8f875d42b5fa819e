"""Saving the trained model, and its tokenizer, as a Hugging Face directory: written aside, renamed once it is whole."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PreTrainedModel

from flexsp.data.tokenizers import load_wrapped
from flexsp.disk import sync
from flexsp.parallel.agreement import RankError
from flexsp.parallel.control import PATIENCE

log = logging.getLogger(__name__)


def save_pretrained(model: PreTrainedModel, folder: str | Path, tokenizer: str = "") -> None:
    """Gathers the shards on rank 0, which writes what `from_pretrained` loads. A collective.

    The model's own `save_pretrained` cannot: each rank holds a shard of it. All ranks return once the folder has its
    name.

    Args:
        model: from `prepare_model`.
        folder: to be written, by rank 0 alone; what is there is replaced once the new one is whole.
        tokenizer: where one lies that is to be in the folder too; empty: none. One that cannot be is a warning.

    Raises:
        RankError: on all ranks alike: rank 0 cannot write there.
    """
    # its own group: what takes rank 0 longer than a collective may take is no fault, and its end is noticed at once
    patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    failed, said = None, [""]
    if dist.get_rank() == 0:
        try:
            _write(model, state, Path(folder), tokenizer)
        except Exception as error:  # said below, so that nobody waits for this rank
            failed, said = error, [" ".join(f"{type(error).__name__}: {error}".split())]
    dist.broadcast_object_list(said, src=0, group=patient)
    dist.destroy_process_group(patient)
    if said[0]:
        raise RankError(
            f"the model cannot be saved as {folder} (rank 0: {said[0]}); give a folder with room"
        ) from failed
    log.info("model: saved as %s", folder)


def _write(model: PreTrainedModel, state: dict[str, Any], folder: Path, tokenizer: str) -> None:
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
