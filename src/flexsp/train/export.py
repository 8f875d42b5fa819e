"""Saving the trained model as a Hugging Face directory."""

from __future__ import annotations

import logging
from pathlib import Path

import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PreTrainedModel

log = logging.getLogger(__name__)


def save_pretrained(model: PreTrainedModel, folder: str | Path) -> None:
    """Gathers the shards on rank 0, which writes what `from_pretrained` loads. A collective."""
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if dist.get_rank() == 0:
        model.save_pretrained(folder, state_dict=state)
    log.info("model: saved as %s", folder)
