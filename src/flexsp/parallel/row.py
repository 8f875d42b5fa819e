"""How the sequences of a group's row lie on a ring, and which of their pieces see one another.

A sequence is cut into 2R chunks, R the size of the ring; ring rank r holds chunk r, its first piece, and chunk 2R-1-r,
its second (`flexsp.data.packing.ring_pieces`). Chunks are whole stretches of a sequence, so of two of them the later
sees all of the earlier, each sees itself causally, and nothing else is seen:

    R = 2             keys of rank 0: chunks 0 3     of rank 1: chunks 1 2
    queries of rank 0:    chunk 0   causal   -              -      -
                          chunk 3   all      causal         all    all
    queries of rank 1:    chunk 1   all      -              causal -
                          chunk 2   all      -              all    causal

On a rank the first pieces of all sequences come first, then the second ones: each kind is one slice of its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flexsp.data.packing import IntArray, cumulative_lengths, piece_starts, ring_pieces
from flexsp.parallel.kernels import Block


@dataclass(frozen=True, slots=True, kw_only=True)
class Meeting:
    """A slice of this rank's queries, a slice of some rank's keys, and which of them see one another."""

    queries: slice
    keys: slice
    block: Block


class Row:
    """One row on one ring rank. What attention layers need of it is made once and kept."""

    def __init__(self, lengths: Sequence[int], ring: int, ring_rank: int, device: torch.device) -> None:
        """
        Args:
            lengths: tokens of each sequence of the group's whole row.
            ring: ranks of the ring; 1 is none.
            ring_rank: this rank's place in it.
            device: of the tensors.
        """
        self.lengths, self.ring, self.ring_rank = tuple(lengths), ring, ring_rank
        self.max_seqlen = max(self.lengths)
        self._device = device
        self._pieces = ring_pieces(self.lengths, ring)
        self._starts = piece_starts(self._pieces)
        self._tokens: list[int] = self._pieces.sum(axis=(1, 2)).tolist()
        self._meetings: dict[tuple[int, int | None], list[Meeting]] = {}

    def tokens(self, ring_rank: int) -> int:
        """How many tokens a ring rank holds."""
        return self._tokens[ring_rank]

    def meetings(self, source: int, window: int | None) -> list[Meeting]:
        """What this rank's queries see of the keys of ring rank `source`; those who meet themselves first."""
        key = (source, window)
        if key not in self._meetings:
            pairs = [(p, o) for p in (0, 1) for o in (0, 1) if self._chunk(source, o) <= self._chunk(self.ring_rank, p)]
            pairs.sort(key=lambda pair: self._chunk(source, pair[1]) != self._chunk(self.ring_rank, pair[0]))
            self._meetings[key] = [
                self._meeting(p, source, o, window) for p, o in pairs if self._seen(p, source, o, window)
            ]
        return self._meetings[key]

    def _chunk(self, ring_rank: int, piece: int) -> int:
        return 2 * self.ring - 1 - ring_rank if piece else ring_rank

    def _seen(self, piece: int, source: int, other: int, window: int | None) -> bool:
        """Whether any query of a piece sees any key of another one that is not later."""
        queries, keys = self._pieces[self.ring_rank, :, piece], self._pieces[source, :, other]
        both = (queries > 0) & (keys > 0)
        if window is not None:
            last_key = self._starts[source, :, other] + keys - 1
            both &= self._starts[self.ring_rank, :, piece] - last_key < window
        return bool(both.any())

    def _meeting(self, piece: int, source: int, other: int, window: int | None) -> Meeting:
        queries, keys = self._pieces[self.ring_rank, :, piece], self._pieces[source, :, other]
        itself = self._chunk(source, other) == self._chunk(self.ring_rank, piece)
        apart = window is not None and not itself
        block = Block(
            sizes_q=tuple(queries.tolist()),
            sizes_k=tuple(keys.tolist()),
            causal=itself,
            cu_seqlens_q=self._tensor(cumulative_lengths(queries)),
            cu_seqlens_k=self._tensor(cumulative_lengths(keys)),
            positions_q=self._positions(self.ring_rank, piece) if apart else None,
            positions_k=self._positions(source, other) if apart else None,
        )
        return Meeting(queries=self._slice(self.ring_rank, piece), keys=self._slice(source, other), block=block)

    def _slice(self, ring_rank: int, piece: int) -> slice:
        first = int(self._pieces[ring_rank, :, 0].sum())
        return slice(first, self._tokens[ring_rank]) if piece else slice(0, first)

    def _positions(self, ring_rank: int, piece: int) -> Tensor:
        """(tokens,) place of each token of a piece in its sequence."""
        sizes, starts = self._pieces[ring_rank, :, piece], self._starts[ring_rank, :, piece]
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return self._tensor(np.repeat(starts, sizes) + within)

    def _tensor(self, numbers: IntArray | np.ndarray[tuple[int], np.dtype[np.int32]]) -> Tensor:
        return torch.from_numpy(numbers).to(self._device, non_blocking=True)
