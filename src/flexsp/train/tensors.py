"""What of a model, its optimizer and this rank's random numbers a checkpoint holds."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from transformers import PreTrainedModel

OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)
"""By parameter, not by position: on another number of ranks the positions mean the same, but nobody could tell."""
HYPERPARAMETERS = "param_groups."
"""How the keys of learning rates, betas, ... begin, in what torch flattens of an optimizer."""


def tensors_of(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What torch.distributed.checkpoint saves and fills: the same keys before saving and before loading."""
    model_state, optimizer_state = get_state_dict(model, optimizer, options=OPTIONS)
    return {"model": model_state, "optimizer": optimizer_state, "random": {f"rank {dist.get_rank()}": random_state()}}


def random_state() -> dict[str, Tensor]:
    """The state of this rank's random numbers: torch's, since nothing else draws any while training."""
    found = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def set_random(state: dict[str, Tensor]) -> None:
    if "cpu" in state:
        torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])
