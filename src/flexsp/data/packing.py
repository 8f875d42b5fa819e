"""Packing: the sequences of a group laid end to end as one row, and which tokens of it each rank holds.

lengths            5         3     2
row         a0 a1 a2 a3 a4 b0 b1 b2 c0 c1        cu_seqlens   0 5 8 10
position_ids 0  1  2  3  4  0  1  2  0  1
shift_labels a1 a2 a3 a4  . b1 b2  . c1  .       . is -100: no label crosses a boundary
sp_degree 4 |--------|--------|-----|-----|      shares       3 3 2 2
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

IGNORE_INDEX = -100
"""A label that counts neither in the loss nor in its denominator, Hugging Face's convention."""


def share_sizes(num_tokens: int, sp_degree: int) -> tuple[int, ...]:
    """Tokens of each rank of a group that holds a row of `num_tokens`; they differ by at most one."""
    least, more = divmod(num_tokens, sp_degree)
    return tuple(least + (group_rank < more) for group_rank in range(sp_degree))


def rank_indices(num_tokens: int, sp_degree: int, group_rank: int) -> npt.NDArray[np.int64]:
    """Places in the row of the tokens that a rank holds, in its order: one contiguous slice (pure Ulysses)."""
    shares = share_sizes(num_tokens, sp_degree)
    start = sum(shares[:group_rank])
    return np.arange(start, start + shares[group_rank])


def cumulative_lengths(lengths: Sequence[int] | npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """cu_seqlens of a row: (sequences + 1,) int32 with a leading 0.

    Raises:
        ValueError: the row is too long for int32.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    if ends[-1] > np.iinfo(np.int32).max:
        raise ValueError(f"row={ends[-1]} tokens exceeds int32, which cu_seqlens is; lower the memory limit of a rank")
    return np.concatenate([[0], ends]).astype(np.int32)


def runs_by_sequence(
    indices: npt.NDArray[np.int64], cu_seqlens: npt.NDArray[np.int32]
) -> Iterator[tuple[int, int, int]]:
    """The places of a row as runs (sequence of the row, first token, past-last token), in the order of `indices`."""
    if len(indices) == 0:
        return
    sequence = np.searchsorted(cu_seqlens, indices, side="right") - 1
    breaks = np.flatnonzero((np.diff(indices) != 1) | (np.diff(sequence) != 0)) + 1
    for a, b in zip([0, *breaks], [*breaks, len(indices)], strict=True):
        offset = int(cu_seqlens[sequence[a]])
        yield int(sequence[a]), int(indices[a]) - offset, int(indices[b - 1]) - offset + 1
