"""Packing: the sequences of a group laid end to end as one row, and which tokens of it each rank holds.

lengths            5         3     2
row         a0 a1 a2 a3 a4 b0 b1 b2 c0 c1        cu_seqlens   0 5 8 10
position_ids 0  1  2  3  4  0  1  2  0  1
shift_labels a1 a2 a3 a4  . b1 b2  . c1  .       . is -100: no label crosses a boundary
sp_degree 4 |--------|--------|-----|-----|      shares       3 3 2 2

With a ring every sequence is cut for itself, so that all ranks compute as much: in a ring of 2, rank 0 holds the first
and the last quarter of each sequence, and of each rank the first pieces come first.

ring rank    0  0  1  1  0  0  1  1  0  1        rank 0: a0 a1 b0 c0 | a4        rank 1: a2 b1 c1 | a3 b2
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from flexsp.profile import Layout

IntArray = npt.NDArray[np.int64]

IGNORE_INDEX = -100
"""A label that counts neither in the loss nor in its denominator, Hugging Face's convention."""


def share_sizes(num_tokens: int, parts: int) -> tuple[int, ...]:
    """`num_tokens` in consecutive parts that differ by at most one."""
    least, more = divmod(num_tokens, parts)
    return tuple(least + (part < more) for part in range(parts))


def ring_pieces(lengths: Sequence[int] | IntArray, ring: int) -> IntArray:
    """How many tokens of each sequence every ring rank holds, as two pieces of it (zigzag).

    A sequence is cut into 2 x ring chunks; ring rank r holds chunks r and 2 * ring - 1 - r, an early and a late one, so
    that all have as much causal attention to compute. Where the tokens do not divide, the ranks take turns with the
    rest: their shares of the row differ by at most one. One rank alone holds each sequence as one piece.

    Returns:
        (ring, sequences, 2) tokens; chunk 2 * ring - 1 - r of a sequence is the second piece of rank r.
    """
    tokens = np.asarray(lengths, dtype=np.int64)
    if ring == 1:
        return np.stack([tokens, np.zeros_like(tokens)], axis=-1)[None]
    least, rest = np.divmod(tokens, ring)
    first = np.cumsum(rest) - rest  # whose turn it is
    turn = (np.arange(ring)[:, None] - first) % ring
    held = least + (turn < rest)
    return np.stack([held - held // 2, held // 2], axis=-1)


def piece_starts(pieces: IntArray) -> IntArray:
    """(ring, sequences, 2) first token of each piece in its sequence."""
    chunks = np.concatenate([pieces[:, :, 0], pieces[::-1, :, 1]])  # (2 * ring, sequences), in the sequence's order
    starts = np.cumsum(chunks, axis=0) - chunks
    ring = len(pieces)
    return np.stack([starts[:ring], starts[ring:][::-1]], axis=-1)


def group_shares(lengths: Sequence[int] | IntArray, layout: Layout) -> tuple[int, ...]:
    """Tokens of each rank of a group that holds a row of sequences; they differ by at most one."""
    of_rings = ring_pieces(lengths, layout.ring).sum(axis=(1, 2))
    return tuple(share for tokens in of_rings.tolist() for share in share_sizes(tokens, layout.ulysses))


def rank_indices(lengths: Sequence[int] | IntArray, layout: Layout, group_rank: int) -> IntArray:
    """Places in the row of the tokens that a rank holds, in its order.

    The ranks of a group are ring_rank * ulysses + ulysses_rank. A ring rank's part of the row is the first pieces of
    all sequences and then the second ones; its Ulysses ranks hold that in contiguous slices. Without a ring it is the
    row itself.
    """
    ring_rank, ulysses_rank = divmod(group_rank, layout.ulysses)
    tokens = np.asarray(lengths, dtype=np.int64)
    pieces = ring_pieces(tokens, layout.ring)
    offsets = np.cumsum(tokens) - tokens
    starts = (piece_starts(pieces)[ring_rank] + offsets[:, None]).T.ravel()  # all first pieces, then all second
    sizes = pieces[ring_rank].T.ravel()
    within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    places = np.repeat(starts, sizes) + within
    shares = share_sizes(len(places), layout.ulysses)
    start = sum(shares[:ulysses_rank])
    own: IntArray = places[start : start + shares[ulysses_rank]]
    return own


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
