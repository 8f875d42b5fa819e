"""Where to cut the sorted batch into micro-batches, by dynamic programming over a surrogate of each piece's time.

The surrogate of a piece is the least t of a grid with

- the longest sequence: some degree holds it and finishes it within t;
- area: the sequences' device-seconds, each at the cheapest degree that finishes it within t, are at most N t;
- memory: its tokens are at most what all devices hold.

All three are differences of prefix sums, so a piece costs O(log of the grid), against the true cost's packing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from flexsp.planner.jit import kernel
from flexsp.planner.packing import best_alone_s, longest_within
from flexsp.planner.tables import Floats, Ints, Tables

GRID = 64
"""Times of the grid."""
LEAST_CUTS, MOST_CUTS = 64, 1536
"""Positions evenly spaced by tokens, and as many by count."""
CUTS_EACH = 8
"""For each micro-batch."""
EXTRA_COUNTS = 4
"""Counts of micro-batches tried beyond the least that works."""


class Target(NamedTuple):
    """What one count of micro-batches should take; M = micro-batches."""

    total_s: float
    """Of all, with fixed costs."""
    seconds: Floats
    """(M,) of each, fixed cost apart."""
    policy: Ints
    """(M,) number of each one's policy."""


def targets(t: Tables) -> list[Target]:
    """For each promising count of micro-batches the best cuts of the sorted batch, the best count first."""
    bounds, grid_s = boundaries(t), time_grid(t)
    before = np.concatenate(([0], np.cumsum(t.tokens)))[bounds].astype(np.float64)
    pieces = []
    for p in range(len(t.factor)):
        prefix_s, first = area_prefix(t, grid_s, bounds, p)
        pieces.append(piece_seconds(t, grid_s, bounds, before, prefix_s, first, p))
    policy_of, seconds = np.argmin(pieces, axis=0), np.min(pieces, axis=0)
    fewest = fewest_micro_batches(t)
    most = min(len(bounds) - 1, fewest + 2 * EXTRA_COUNTS + fewest // 4)
    total_s, previous = best_cuts(seconds, most)
    found = []
    for count in range(fewest, most + 1):
        if total_s[count, -1] == math.inf:
            continue
        cuts = [len(bounds) - 1]
        for m in range(count, 0, -1):
            cuts.append(int(previous[m, cuts[-1]]))
        at = tuple(np.array([cuts[:0:-1], cuts[-2::-1]]))
        found.append(Target(float(total_s[count, -1]) + count * t.fixed_s, seconds[at], policy_of[at]))
    return sorted(found, key=lambda target: target.total_s)


def time_grid(t: Tables, size: int = GRID) -> Floats:
    """(T,) ascending seconds: what a micro-batch may take, from a hundredth of its highest upwards.

    No micro-batch need take longer than its longest sequence at the least degree that holds it, or than twice what the
    longest sequences that memory holds at once keep all devices busy for.
    """
    alone_s = 0.0
    for p in range(len(t.factor)):
        fits = np.flatnonzero(t.capacity[p] >= t.tokens[0])
        if len(fits):
            k = fits[0]
            alone_s = max(
                alone_s, t.factor[p] * t.work_s[0] / t.degrees[k] + t.tokens[0] * t.exchange_s[k] + t.latency_s[k]
            )
    at_once = np.cumsum(t.tokens) <= t.room_tokens.max()
    high_s = max(float(alone_s), 2.0 * float(t.factor.max()) * float(t.area_s[at_once].sum()) / t.num_devices)
    high_s = max(high_s, 1e-9)  # where nothing costs anything, any time is enough
    return np.geomspace(high_s / 100, high_s * 1.001, size)


def fewest_micro_batches(t: Tables) -> int:
    """As many as memory asks for at least."""
    return max(1, math.ceil(float(t.tokens.sum()) / float(t.room_tokens.max())))


def boundaries(t: Tables) -> Ints:
    """(B,) ascending positions at which the sorted batch may be cut, with 0 and K: all among the longest, then some.

    The more micro-batches memory asks for, the more positions: between two that are far apart memory is not filled.
    """
    num = len(t.tokens)
    size = min(max(LEAST_CUTS, CUTS_EACH * fewest_micro_batches(t)), MOST_CUTS)
    before = np.concatenate(([0], np.cumsum(t.tokens)))
    by_tokens = np.searchsorted(before, np.linspace(0, before[-1], size + 1))
    by_count = np.linspace(0, num, size + 1).astype(np.int64)
    return np.unique(np.concatenate((np.arange(min(num, size // 3)), by_tokens, by_count, [num]))).astype(np.int64)


@kernel
def area_prefix(t: Tables, grid_s: Floats, bounds: Ints, p: int) -> tuple[Floats, Ints]:
    """Device-seconds of the sequences before each boundary, for each time of the grid.

    Returns:
        (T, B) prefix sums over the sequences that fit within the time, and (T,) the first that does: an index into
        the sorted batch, since whatever fits, everything shorter fits too.
    """
    num_degrees = len(t.degrees)
    prefix = np.zeros((len(grid_s), len(bounds)))
    first = np.zeros(len(grid_s), dtype=np.int64)
    limit = np.zeros(num_degrees, dtype=np.int64)
    for g in range(len(grid_s)):
        for k in range(num_degrees):
            limit[k] = min(t.capacity[p, k], longest_within(t, grid_s[g] - t.latency_s[k], k, p))
        first[g] = len(t.tokens)
        total, at = 0.0, 0
        for i in range(len(t.tokens)):
            while at < len(bounds) and bounds[at] <= i:
                prefix[g, at] = total
                at += 1
            least = math.inf
            for k in range(num_degrees):
                if t.tokens[i] <= limit[k]:
                    least = min(least, t.degrees[k] * t.exchange_s[k])
            if least < math.inf:
                first[g] = min(first[g], i)
                total += t.factor[p] * t.work_s[i] + least * t.tokens[i]
        while at < len(bounds):
            prefix[g, at] = total
            at += 1
    return prefix, first


@kernel
def piece_seconds(
    t: Tables, grid_s: Floats, bounds: Ints, tokens_before: Floats, prefix: Floats, first: Ints, p: int
) -> Floats:
    """(B, B) surrogate seconds of the piece between two boundaries; infinite where memory does not hold it.

    Args:
        tokens_before: (B,) tokens before each boundary.
        prefix, first: what `area_prefix` returns for policy number p.
    """
    size = len(bounds)
    seconds = np.full((size, size), math.inf)
    for a in range(size - 1):
        g, alone_s = 0, best_alone_s(t, bounds[a], p)
        for b in range(a + 1, size):
            if tokens_before[b] - tokens_before[a] > t.room_tokens[p]:
                break
            while g < len(grid_s) and (first[g] > bounds[a] or prefix[g, b] - prefix[g, a] > t.num_devices * grid_s[g]):
                g += 1  # the least time rises with the piece's end
            if g == len(grid_s):
                break
            below_s = grid_s[g - 1] if g > 0 and first[g - 1] <= bounds[a] else 0.0
            seconds[a, b] = max((prefix[g, b] - prefix[g, a]) / t.num_devices, below_s, alone_s)
    return seconds


@kernel
def best_cuts(seconds: Floats, most: int) -> tuple[Floats, Ints]:
    """Cheapest cuts into 1..most pieces.

    Args:
        seconds: (B, B) of the piece between two boundaries.

    Returns:
        (most + 1, B) seconds of the sequences before a boundary in that many pieces, and the boundary before it.
    """
    size = len(seconds)
    total = np.full((most + 1, size), math.inf)
    before = np.zeros((most + 1, size), dtype=np.int64)
    total[0, 0] = 0.0
    for m in range(1, most + 1):
        for b in range(1, size):
            for a in range(b - 1, -1, -1):
                if seconds[a, b] == math.inf:
                    break
                if total[m - 1, a] + seconds[a, b] < total[m, b]:
                    total[m, b] = total[m - 1, a] + seconds[a, b]
                    before[m, b] = a
    return total, before
