"""The greedy scheduler of Megatron-Core's dynamic context parallelism, written anew from its description.

Sources: NVIDIA technical blog, January 2026, "Speeding Up Variable-Length Training with Dynamic Context Parallelism and
NVIDIA Megatron Core"; and, for the rules below, the scheduler of Megatron-LM's dev branch that chooses groups with
packing in mind (pull request 5154, June 2026), which replaced the first one. Micro-batch by micro-batch:

1. Sequences come longest first. The longest, the tallest, gets a group of the least degree that holds it.
2. The work of a rank may not exceed what the tallest per token comes to on a rank full of tokens, and 5 %.
3. Every other sequence looks at all degrees from its own least one up, and at each at all groups that have room and at
   a new one; it takes the place that leaves the highest load of any rank least. Of equals the smaller degree comes
   first, then groups that exist, the earliest first. Where none is allowed it waits for a later micro-batch.
4. No rank is left empty: the first group of the smallest degree grows to the next degree, again and again; where that
   cannot fill all ranks, one group of all of them takes what it holds instead.

Loads are the scheduler's own estimate and know no exchange. docs/peers.md says what we had to decide.
Cost: O(K G) for K sequences and G groups of a micro-batch, in vector operations over the groups of a degree.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flexsp.lengths import LengthArray
from flexsp.planner.assemble import GroupChoice, assemble, infeasible, too_long
from flexsp.planner.degrees import usable_degrees
from flexsp.planner.room import Room
from flexsp.plans import Plan
from flexsp.profile import Profile

NAME = "megatron-dcp"
ESTIMATES = ("compute", "attention")
WORK_SLACK = 0.05
"""How far above the tallest's the work of a rank may be, relatively; the source's value."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Batch:
    """A global batch as the scheduler sees it."""

    profile: Profile
    tokens: Sequence[int]
    """(K,) length of each sequence."""
    work: Sequence[float]
    """(K,) estimated work of each sequence, on one rank; any unit."""
    capacity: dict[int, int]
    """The most tokens of a group, by degree, ascending."""


def plan_megatron_dcp(
    lengths: LengthArray, profile: Profile, max_tokens_per_rank: int | None = None, estimate: str = "compute"
) -> Plan:
    """Schedules the batch greedily, each micro-batch until nothing more has a place in it.

    Uses the degrees that its groups have in Megatron-LM: powers of two that divide the devices, and all devices; every
    usable degree where none of those holds the longest sequence.

    Args:
        lengths: (K,) tokens.
        profile: the cost model; the scheduler looks at its memory and, for "compute", at its compute.
        max_tokens_per_rank: the cap that sets a sequence's least degree (`max_seqlen_per_dp_cp_rank`); by default what
            memory holds.
        estimate: what loads are counted in: "compute", attention and what is linear in tokens; or "attention" alone,
            the square of the length, as Megatron-LM does.

    Raises:
        ValueError: an unknown estimate or a cap below 1.
    """
    began = time.perf_counter()
    if estimate not in ESTIMATES:
        raise ValueError(f"estimate={estimate!r} is unknown; choose one of {', '.join(ESTIMATES)}")
    if max_tokens_per_rank is not None and max_tokens_per_rank < 1:
        raise ValueError(f"max_tokens_per_rank={max_tokens_per_rank} must be at least 1; give tokens of one rank")
    capacity = _capacities(profile, max_tokens_per_rank, int(lengths.max(initial=0)))
    if reason := _refusal(lengths, profile, capacity, max_tokens_per_rank):
        return infeasible(NAME, lengths, profile, reason, time.perf_counter() - began)
    tokens = [int(s) for s in lengths]
    attention = estimate == "attention"
    work = [float(s) * s if attention else profile.sequence_work_s(s) for s in tokens]
    batch = _Batch(profile=profile, tokens=tokens, work=work, capacity=capacity)
    left: list[int] = np.argsort(-lengths, kind="stable").tolist()
    micro_batches = []
    while left:
        groups, left = _next_micro_batch(batch, left)
        micro_batches.append(groups)
    return assemble(NAME, lengths, profile, micro_batches, time.perf_counter() - began)


def _capacities(profile: Profile, max_tokens_per_rank: int | None, longest: int) -> dict[int, int]:
    """The most tokens of a group, for each degree that the scheduler uses."""
    capacity = {d: profile.capacity_tokens(d) for d in usable_degrees(profile)}
    if max_tokens_per_rank is not None:
        capacity = {d: min(tokens, d * max_tokens_per_rank) for d, tokens in capacity.items()}
    devices = profile.num_devices
    own = {d: capacity[d] for d in capacity if d == devices or (d & (d - 1) == 0 and devices % d == 0)}
    return own if max(own.values(), default=-1) >= longest else capacity


def _refusal(
    lengths: LengthArray, profile: Profile, capacity: dict[int, int], max_tokens_per_rank: int | None
) -> str | None:
    """Why the longest sequence fits into no group: for its memory, or for the cap."""
    if reason := too_long(lengths, profile, usable_degrees(profile)):
        return reason
    index = int(lengths.argmax())
    most = max(capacity, key=lambda d: capacity[d])
    if lengths[index] <= capacity[most]:
        return None
    return (
        f"lengths[{index}]={int(lengths[index])} tokens fit into no group of at most "
        f"max_tokens_per_rank={max_tokens_per_rank}: sp_degree={most} holds {capacity[most]}; raise the cap"
    )


def _next_micro_batch(batch: _Batch, left: list[int]) -> tuple[list[GroupChoice], list[int]]:
    """The groups of a micro-batch, and the sequences that wait; `left` is longest first."""
    filling = _Filling(batch, tallest=left[0])
    waiting = [i for i in left if not filling.takes(i)]
    groups, idle = filling.grown()
    devices = batch.profile.num_devices
    return _on_all_ranks(batch, left) if idle and devices in batch.capacity else (groups, waiting)


def _on_all_ranks(batch: _Batch, left: list[int]) -> tuple[list[GroupChoice], list[int]]:
    """One group of all devices, with every sequence that still fits, longest first; and those that wait."""
    devices = batch.profile.num_devices
    room = batch.capacity[devices]
    held, waiting = [], []
    for i in left:
        if batch.tokens[i] <= room:
            room -= batch.tokens[i]
            held.append(i)
        else:
            waiting.append(i)
    return [(devices, held)], waiting


class _Row:
    """The groups of one degree in a micro-batch, in the order in which they were opened."""

    def __init__(self, degree: int, capacity: int, most: int) -> None:
        self.degree, self.capacity = degree, capacity
        self.numbers: list[int] = []
        """Of each group among those of the micro-batch."""
        self.loads = np.zeros(most)
        """(most,) estimated work of each group, on each of its ranks."""
        self.rooms = np.zeros(most, dtype=np.int64)
        """(most,) tokens that each group still takes."""
        self.most_room = 0

    def least(self, tokens: int, load: float, highest: float) -> tuple[float, int]:
        """The highest load of any rank with a sequence in the best group for it, and that group's place in the row.

        Args:
            load: what the sequence adds to each rank of a group.
            highest: load of any rank as it is.
        """
        if self.most_room < tokens:
            return math.inf, -1
        count = len(self.numbers)
        after = np.where(self.rooms[:count] >= tokens, self.loads[:count] + load, math.inf)
        projected = np.maximum(after, highest)
        at = int(projected.argmin())
        return float(projected[at]), at

    def add(self, at: int, tokens: int, load: float) -> None:
        self.rooms[at] -= tokens
        self.loads[at] += load
        self.most_room = int(self.rooms[: len(self.numbers)].max())


class _Filling:
    """One micro-batch while it is filled."""

    def __init__(self, batch: _Batch, tallest: int) -> None:
        devices = batch.profile.num_devices
        self._batch = batch
        self._rows = [_Row(d, c, devices // d) for d, c in batch.capacity.items()]
        self._room = Room(batch.profile, list(batch.capacity))
        self._held: list[list[int]] = []
        self._highest = 0.0
        self._most_room = 0
        tokens_per_rank = max(c / d for d, c in batch.capacity.items())
        self._most_work = batch.work[tallest] / batch.tokens[tallest] * tokens_per_rank * (1 + WORK_SLACK)

    def takes(self, sequence: int) -> bool:
        """Puts the sequence into its best place, if there is one."""
        tokens, work = self._batch.tokens[sequence], self._batch.work[sequence]
        if not self._room.idle and tokens > self._most_room:
            return False
        best: tuple[float, _Row, int] | None = None
        for row in self._rows:
            if row.capacity < tokens:
                continue
            load = work / row.degree
            for projected, at in (row.least(tokens, load, self._highest), (max(load, self._highest), len(row.numbers))):
                if projected > self._most_work or (best is not None and projected >= best[0]):
                    continue
                if at < len(row.numbers) or self._room.takes(row.degree):
                    best = projected, row, at
            if best is not None and (best[0] <= self._highest or not self._held):
                break  # no place is better; and the tallest, which comes first, takes its least degree
        if best is None:
            return False
        self._highest, row, at = best
        if at == len(row.numbers):
            self._open(row)
        row.add(at, tokens, work / row.degree)
        self._most_room = max(row.most_room for row in self._rows)
        self._held[row.numbers[at]].append(sequence)
        return True

    def _open(self, row: _Row) -> None:
        row.rooms[len(row.numbers)] = row.capacity
        row.numbers.append(len(self._held))
        self._held.append([])
        self._room.add(row.degree)

    def grown(self) -> tuple[list[GroupChoice], int]:
        """The groups, once the first of the smallest degree has grown again and again; and the ranks still idle."""
        degrees, room = list(self._batch.capacity), self._room
        while room.idle:
            smallest = min(room.placed)
            larger = [d for d in degrees if d > smallest]
            if not larger or not room.grow(room.placed.index(smallest), larger[0]):
                break
        return list(zip(room.placed, self._held, strict=True)), room.idle
