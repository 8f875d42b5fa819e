"""A global batch with its plan, and the part of it that one rank runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from flexsp.data.packing import (
    IGNORE_INDEX,
    IntArray,
    cumulative_lengths,
    group_shares,
    rank_indices,
    runs_by_sequence,
)
from flexsp.lengths import LengthArray
from flexsp.plans import Group, MicroBatch, Plan
from flexsp.profile import Layout

ALONE = Layout(ulysses=1, ring=1)


class SequenceSource(Protocol):
    """Where tokens come from: any part of any sequence. Two threads may ask at once: one reads ahead."""

    def read(self, sequence: int, start: int, stop: int) -> tuple[IntArray, IntArray]:
        """Tokens [start, stop) of a sequence and, as long, the label of each: the next token, or IGNORE_INDEX."""
        ...


class Ahead(Protocol):
    """What is being read of a batch for one rank before its step begins; see `flexsp.data.read_ahead`."""

    waited_s: float

    def serves(self, batch: PlannedBatch, rank: int) -> bool:
        """Whether it is this rank's part of this very batch."""
        ...

    def result(self) -> list[RankMicroBatch]:
        """What was read, once it has been."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMicroBatch:
    """What one rank runs in one micro-batch. t is its tokens, or 1 filler token where it has none."""

    ranks: tuple[int, ...]
    """The rank's group; the rank alone where it is idle."""
    layout: Layout
    """How the group splits into heads x context."""
    lengths: tuple[int, ...]
    """Tokens of each sequence of the group's row."""
    shares: tuple[int, ...]
    """Tokens of each rank of the group."""
    policy: str | None
    """The micro-batch's activation policy; None where the plan names none."""
    num_tokens: int
    """Tokens of this rank; 0 with a filler token."""
    input_ids: Tensor
    """(1, t) int64."""
    position_ids: Tensor
    """(1, t) int64, from 0 in every sequence."""
    shift_labels: Tensor
    """(1, t) int64; -100 does not count."""
    cu_seqlens: Tensor
    """(sequences + 1,) int32, of the group's whole row."""
    max_seqlen: int
    """The longest sequence of the row."""

    @property
    def num_labels(self) -> int:
        """Labels of this rank that count."""
        return int((self.shift_labels != IGNORE_INDEX).sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedBatch:
    """One global batch: what is trained, and how."""

    step: int
    sequence_ids: IntArray
    """(K,) names of the sequences in `source`."""
    lengths: LengthArray
    """(K,) tokens."""
    plan: Plan
    source: SequenceSource
    layouts: Mapping[int, Layout] = field(default_factory=dict)
    """How a degree splits into heads x context, as the profile says; one that is not here trades heads alone."""
    plan_s: float = 0.0
    """Seconds that planning took."""
    plan_wait_s: float = 0.0
    """Seconds that the training waited for the plan; nil where it was there in time."""
    fallback: bool = False
    """Whether the planner failed at this batch and `planner.fallback` planned it."""
    ahead: Ahead | None = None
    """One rank's part, where it is read ahead."""

    def for_rank(self, rank: int) -> list[RankMicroBatch]:
        """What `rank` runs, micro-batch by micro-batch: its own tokens, no others, read now unless they have been."""
        if self.ahead is not None and self.ahead.serves(self, rank):
            return self.ahead.result()
        return self.read(rank)

    def read(self, rank: int) -> list[RankMicroBatch]:
        """What `rank` runs, read from the source."""
        return [self._micro_batch(micro_batch, rank) for micro_batch in self.plan.micro_batches]

    @property
    def data_wait_s(self) -> float:
        """Seconds that `for_rank` has waited for what is read ahead; nil where it was there in time."""
        return 0.0 if self.ahead is None else self.ahead.waited_s

    def layout(self, sp_degree: int) -> Layout:
        """How a group of `sp_degree` ranks splits into heads x context."""
        return self.layouts.get(sp_degree) or Layout(ulysses=sp_degree, ring=1)

    def _micro_batch(self, micro_batch: MicroBatch, rank: int) -> RankMicroBatch:
        for group in micro_batch.groups:
            if rank in group.ranks:
                return self._share(group, group.ranks.index(rank), micro_batch.policy)
        return _from_runs([], ranks=(rank,), layout=ALONE, lengths=(1,), shares=(0,), policy=micro_batch.policy)

    def _share(self, group: Group, group_rank: int, policy: str | None) -> RankMicroBatch:
        lengths = self.lengths[list(group.sequences)]
        layout = self.layout(group.sp_degree)
        runs = []
        places = rank_indices(lengths, layout, group_rank)
        for place, start, stop in runs_by_sequence(places, cumulative_lengths(lengths)):
            sequence = int(self.sequence_ids[group.sequences[place]])
            tokens, labels = self.source.read(sequence, start, stop)
            runs.append((tokens, np.arange(start, stop), labels))
        return _from_runs(
            runs,
            ranks=group.ranks,
            layout=layout,
            lengths=tuple(lengths.tolist()),
            shares=group_shares(lengths, layout),
            policy=policy,
        )


def _from_runs(
    runs: Sequence[tuple[IntArray, IntArray, IntArray]],
    *,
    ranks: tuple[int, ...],
    layout: Layout,
    lengths: tuple[int, ...],
    shares: tuple[int, ...],
    policy: str | None,
) -> RankMicroBatch:
    num_tokens = sum(len(tokens) for tokens, _, _ in runs)
    filler = (np.zeros(1, np.int64), np.zeros(1, np.int64), np.full(1, IGNORE_INDEX))
    columns = zip(*(runs or [filler]), strict=True)
    input_ids, position_ids, shift_labels = (torch.from_numpy(np.concatenate(c))[None] for c in columns)
    return RankMicroBatch(
        ranks=ranks,
        layout=layout,
        lengths=lengths,
        shares=shares,
        policy=policy,
        num_tokens=num_tokens,
        input_ids=input_ids,
        position_ids=position_ids,
        shift_labels=shift_labels,
        cu_seqlens=torch.from_numpy(cumulative_lengths(lengths)),
        max_seqlen=max(lengths),
    )
