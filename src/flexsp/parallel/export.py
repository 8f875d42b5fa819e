"""Saving the trained model as a Hugging Face directory: written aside, and renamed once it is whole."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PreTrainedModel

from flexsp.disk import sync
from flexsp.parallel.control import PATIENCE

log = logging.getLogger(__name__)


def save_pretrained(model: PreTrainedModel, folder: str | Path) -> None:
    """Gathers the shards on rank 0, which writes what `from_pretrained` loads. A collective.

    The model's own `save_pretrained` cannot: each rank holds a shard of it. All ranks return once the folder has its
    name, so that they notice a rank 0 that ends before.

    Args:
        model: from `prepare_model`.
        folder: to be written, by rank 0 alone; what is there is replaced once the new one is whole.

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
        model.save_pretrained(part, state_dict=state)
        for path in (*part.iterdir(), part):
            sync(path)
        if folder.exists():
            os.replace(folder, before)
        os.replace(part, folder)
        sync(folder.parent)
        shutil.rmtree(before, ignore_errors=True)
    dist.barrier(group=patient)
    dist.destroy_process_group(patient)
    log.info("model: saved as %s", folder)
