"""A global batch with its plan, and the part of it that one rank runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from flexsp.data.packing import IGNORE_INDEX, cumulative_lengths, rank_indices, runs_by_sequence, share_sizes
from flexsp.lengths import LengthArray
from flexsp.plans import Group, MicroBatch, Plan

IntArray = npt.NDArray[np.int64]


class SequenceSource(Protocol):
    """Where tokens come from: any part of any sequence."""

    def read(self, sequence: int, start: int, stop: int) -> tuple[IntArray, IntArray]:
        """Tokens [start, stop) of a sequence and, as long, the label of each: the next token, or IGNORE_INDEX."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMicroBatch:
    """What one rank runs in one micro-batch. t is its tokens, or 1 filler token where it has none."""

    ranks: tuple[int, ...]
    """The rank's group; the rank alone where it is idle."""
    shares: tuple[int, ...]
    """Tokens of each rank of the group."""
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
    plan_s: float = 0.0
    """Seconds that planning took."""
    plan_wait_s: float = 0.0
    """Seconds that the training waited for the plan; nil where it was there in time."""

    def for_rank(self, rank: int) -> list[RankMicroBatch]:
        """What `rank` runs, micro-batch by micro-batch. Reads the rank's own tokens, no others."""
        return [self._micro_batch(micro_batch, rank) for micro_batch in self.plan.micro_batches]

    def _micro_batch(self, micro_batch: MicroBatch, rank: int) -> RankMicroBatch:
        for group in micro_batch.groups:
            if rank in group.ranks:
                return self._share(group, group.ranks.index(rank))
        return _from_runs([], ranks=(rank,), shares=(0,), cu_seqlens=np.array([0, 1], dtype=np.int32))

    def _share(self, group: Group, group_rank: int) -> RankMicroBatch:
        row_lengths = self.lengths[list(group.sequences)]
        num_tokens, sp_degree = int(row_lengths.sum()), group.sp_degree
        cu_seqlens = cumulative_lengths(row_lengths)
        runs = []
        for place, start, stop in runs_by_sequence(rank_indices(num_tokens, sp_degree, group_rank), cu_seqlens):
            sequence = int(self.sequence_ids[group.sequences[place]])
            tokens, labels = self.source.read(sequence, start, stop)
            runs.append((tokens, np.arange(start, stop), labels))
        return _from_runs(runs, ranks=group.ranks, shares=share_sizes(num_tokens, sp_degree), cu_seqlens=cu_seqlens)


def _from_runs(
    runs: Sequence[tuple[IntArray, IntArray, IntArray]],
    *,
    ranks: tuple[int, ...],
    shares: tuple[int, ...],
    cu_seqlens: npt.NDArray[np.int32],
) -> RankMicroBatch:
    num_tokens = sum(len(tokens) for tokens, _, _ in runs)
    filler = (np.zeros(1, np.int64), np.zeros(1, np.int64), np.full(1, IGNORE_INDEX))
    columns = zip(*(runs or [filler]), strict=True)
    input_ids, position_ids, shift_labels = (torch.from_numpy(np.concatenate(c))[None] for c in columns)
    return RankMicroBatch(
        ranks=ranks,
        shares=shares,
        num_tokens=num_tokens,
        input_ids=input_ids,
        position_ids=position_ids,
        shift_labels=shift_labels,
        cu_seqlens=torch.from_numpy(cu_seqlens),
        max_seqlen=int(np.diff(cu_seqlens).max()),
    )
