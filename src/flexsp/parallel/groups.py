"""The pool of process groups: made at first need, in one order on all ranks, then reused (hot switching)."""

from __future__ import annotations

import datetime
from collections.abc import Iterable

import torch.distributed as dist

from flexsp.plans import Plan

Ranks = tuple[int, ...]


class GroupPool:
    """Sequence-parallel groups by their ranks. Switching costs nothing once a group is in the pool.

    Placement is aligned, so with powers of two a run on N ranks needs at most 2N-1 different groups.
    """

    def __init__(self, timeout: datetime.timedelta | None = None) -> None:
        """A collective: on all ranks. `timeout`: after which one of a group fails; None is the backend's own."""
        self._timeout = timeout
        self._groups: dict[Ranks, dist.ProcessGroup | None] = {}
        self.control: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timeout)
        """All ranks, on the CPU: plans, digests and counts travel here, apart from the tensors."""

    @property
    def num_groups(self) -> int:
        """Sequence-parallel groups made so far, those of other ranks included."""
        return len(self._groups)

    def prepare(self, plans: Iterable[Plan]) -> int:
        """Makes the groups that these plans need and the pool lacks. A collective: all ranks, the same plans.

        Returns:
            How many were made.
        """
        made = 0
        for plan in plans:
            for micro_batch in plan.micro_batches:
                for group in micro_batch.groups:
                    if group.sp_degree > 1 and group.ranks not in self._groups:
                        made += 1
                        created = dist.new_group(list(group.ranks), timeout=self._timeout)
                        member = dist.get_rank() in group.ranks
                        self._groups[group.ranks] = created if member else None
        return made

    def get(self, ranks: Ranks) -> dist.ProcessGroup | None:
        """The group of these ranks; None for one rank alone, which exchanges nothing.

        Raises:
            KeyError: the group was not prepared.
        """
        return None if len(ranks) == 1 else self._groups[ranks]
