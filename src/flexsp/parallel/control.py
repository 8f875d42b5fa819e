"""Small collectives on the CPU group of all ranks: what one of them decides, or the largest of what all say."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from flexsp.parallel.groups import GroupPool

Made = TypeVar("Made")
PATIENCE = datetime.timedelta(days=7)
"""How long ranks wait for one that tokenizes, or loads or writes a model; if it dies, they notice at once."""


def from_first_rank(make: Callable[[], Made], groups: GroupPool) -> Made:
    """What rank 0 makes, or its ValueError, on all ranks."""
    held: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            held[0] = make()
        except ValueError as error:
            held[0] = error
    dist.broadcast_object_list(held, src=0, group=groups.control)
    if isinstance(held[0], ValueError):
        raise held[0]
    return cast(Made, held[0])


def largest_of_all(own: float, groups: GroupPool) -> float:
    """The largest of what the ranks say."""
    held = torch.tensor(own, dtype=torch.float64)
    dist.all_reduce(held, op=dist.ReduceOp.MAX, group=groups.control)
    return held.item()
