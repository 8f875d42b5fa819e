"""What the paper does before its MILP: chunks of sequences, buckets of lengths (arXiv 2412.01523, section 4.3)."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from flexsp.planner.tables import Ints

Floats = npt.NDArray[np.float64]
BUCKETINGS = ("dp", "naive", "none")


def balanced_chunks(tokens: Ints, count: int) -> list[Ints]:
    """Cuts a row of sequences into `count` runs whose largest number of tokens is least: the sequence blaster's DP.

    Args:
        tokens: (K,) lengths in the order of the row.

    Returns:
        Positions in the row, run by run; fewer than `count` runs where there are fewer sequences. Cost: O(K^2 count).
    """
    num, count = len(tokens), min(count, len(tokens))
    before = np.concatenate(([0], np.cumsum(tokens))).astype(np.float64)
    largest: Floats = np.full((count + 1, num + 1), math.inf)
    cut = np.zeros((count + 1, num + 1), dtype=np.int64)
    largest[0, 0] = 0.0
    for m in range(1, count + 1):
        for end in range(m, num + 1):
            worst = np.maximum(largest[m - 1, :end], before[end] - before[:end])
            cut[m, end] = int(np.argmin(worst))
            largest[m, end] = worst[cut[m, end]]
    ends = [num]
    for m in range(count, 0, -1):
        ends.append(int(cut[m, ends[-1]]))
    return [np.arange(a, b) for a, b in zip(ends[:0:-1], ends[-2::-1], strict=True)]


def buckets(tokens: Ints, count: int, bucketing: str) -> Ints:
    """The length by which each sequence is represented: the longest of its bucket.

    Args:
        tokens: (n,) lengths, in any order.
        count: buckets at most.
        bucketing: `dp` chooses buckets so that the sum of what is added is least (O(U^2 count) for U different
            lengths); `naive` makes them equally wide; `none` leaves every length as it is.

    Returns:
        (n,) tokens, none below the sequence's own.
    """
    if bucketing == "none":
        return tokens
    if bucketing == "naive":
        width = max(1, -(-int(tokens.max()) // count))
        return np.asarray(-(-tokens // width) * width, dtype=np.int64)
    lengths, times = np.unique(tokens, return_counts=True)
    different, count = len(lengths), min(count, len(lengths))
    number = np.concatenate(([0], np.cumsum(times)))
    total = np.concatenate(([0], np.cumsum(times * lengths)))
    added: Floats = np.full((count + 1, different + 1), math.inf)
    cut = np.zeros((count + 1, different + 1), dtype=np.int64)
    added[0, 0] = 0.0
    for q in range(1, count + 1):
        for end in range(q, different + 1):
            own = (number[end] - number[:end]) * lengths[end - 1] - (total[end] - total[:end])
            sums = added[q - 1, :end] + own
            cut[q, end] = int(np.argmin(sums))
            added[q, end] = sums[cut[q, end]]
    tops, end = [], different
    for q in range(count, 0, -1):
        tops.append(int(lengths[end - 1]))
        end = int(cut[q, end])
    ascending = np.array(tops[::-1], dtype=np.int64)
    return np.asarray(ascending[np.searchsorted(ascending, tokens)], dtype=np.int64)
