"""A lower bound on the predicted time of every legal plan: prices that no micro-batch can out-earn.

Let a legal plan have M micro-batches; micro-batch m takes fixed_s + t_m. In a group of degree d under policy p, whose
sequences of s tokens take time(s) each, latency apart, rules 2 and 3 of a legal plan and the cost model say

    sum of time(s) <= t_m - latency(d),    sum of s <= capacity(p, d),    and the groups' degrees sum to at most N.

So for any share h in [0, 1], which may depend on t, p and d, and any r >= 0, charging each sequence

    charge = r * d / N * (h * time(s) / (t_m - latency(d)) + (1 - h) * s / capacity(p, d))

takes in at most r * d / N a group and at most r a micro-batch. Take r = fixed_s - mu + t_m for every micro-batch but
the slowest, the top one, and r = top + t_m for that, with any prices mu <= fixed_s and top >= -t_top. With u(s) the
least charge that a sequence of s tokens meets anywhere in any plan,

    sum of u(s) <= sum over micro-batches of r = (sum of (fixed_s + t_m)) - fixed_s - mu (M - 1) + top,
    so every plan takes at least  fixed_s - top + mu (M - 1) + sum of u(s).

The least is taken over degrees, policies and times that the sequence can meet: time(s) + latency(d) <= t <= t_top and
s <= capacity(p, d). This is where the bound knows that long sequences need large, dear groups or long micro-batches,
that a long micro-batch is wasted on few tokens because memory is full before time is, and what each micro-batch costs.

- Time is cut into windows, one share h for each window, policy and degree. Inside a window the charge is
  (r0 + t)(A / t + B), convex in t (shifted by the latency), and its minimum is exact; so windows cost no slack.
- M: prices hold for one M exactly, or with mu >= 0 for that M and all above, since each more then adds mu. M begins at
  what memory allows. The top micro-batch's time is unknown: intervals of it, with prices of their own, cover all.
  The bound is the least over these nodes; the node that has it is bettered or split in two, best first.
- Any prices give a true bound. Good ones come by supergradient steps, from h = 1, mu = fixed_s, top = 0, for which the
  bound is work over devices and the fixed costs of the fewest micro-batches.
- Sequences of nearly the same length are a class that is charged at its shortest, in proportion to tokens: no less than
  they are charged, since every charge per token rises with s and the choice narrows.

This is Lagrangian duality for the linear relaxation in which micro-batches and groups come in fractions and sequences
are divisible, except that one micro-batch, the slowest, is whole. Cost: `BUDGET` evaluations of O(classes * windows *
policies * degrees), whatever the number of sequences and devices.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from flexsp.lengths import LengthArray
from flexsp.planner.degrees import usable_degrees
from flexsp.planner.tables import Floats, Tables, tables
from flexsp.profile import Profile

if TYPE_CHECKING:  # compiled kernels are imported where they run, so that `import flexsp` does not wait for numba
    from flexsp.planner.duals import Relaxation

WINDOWS = 20
"""Windows of a micro-batch's seconds."""
INTERVALS = 10
"""Intervals of the slowest micro-batch's seconds to begin with."""
BUDGET = 2400
"""Evaluations of prices at most."""
CLASS_RATIO = 1.02
"""Longest over shortest of a class of sequences, at most."""
ROUNDING = 1e-9
"""Relative rounding of the sums, taken off."""


def lower_bound_s(lengths: LengthArray, profile: Profile) -> float:
    """Seconds that no legal plan for these lengths (tokens) can be predicted to beat.

    Args:
        lengths: (K,) tokens, each of which fits some group; their order does not matter.
    """
    from flexsp.planner.duals import best_first

    t = tables(lengths, profile, usable_degrees(profile))
    relaxation = _relaxation(t)
    least = max(1, math.ceil(float(t.tokens.sum()) / float(t.room_tokens.max())))
    alone_s = _longest_alone_s(t) * (1 - ROUNDING)
    ends_s = np.array([0.0, math.inf])
    if alone_s > 0.0:
        high_s = max(float(relaxation.window_s[-2]), 2 * alone_s)
        ends_s = np.concatenate((np.geomspace(alone_s, high_s, INTERVALS), [math.inf]))
    shares = np.ones((len(relaxation.window_s), len(t.factor), len(t.degrees)))
    return float(best_first(relaxation, ends_s, least, 1, BUDGET, shares)) * (1 - ROUNDING)


def _longest_alone_s(t: Tables) -> float:
    """What the longest sequence takes at least: alone, at the degree that is fastest for it."""
    return min(
        float(t.factor[p] * t.work_s[0] / d + t.tokens[0] * t.exchange_s[k] + t.latency_s[k])
        for p in range(len(t.factor))
        for k, d in enumerate(t.degrees)
        if t.tokens[0] <= t.capacity[p, k]
    )


def _relaxation(t: Tables) -> Relaxation:
    from flexsp.planner.cuts import time_grid
    from flexsp.planner.duals import Relaxation

    ascending = t.tokens[::-1]
    first = [0]
    while (after := int(np.searchsorted(ascending, ascending[first[-1]] * CLASS_RATIO, side="right"))) < len(ascending):
        first.append(after)
    shortest = ascending[first].astype(np.float64)
    high_s = float(time_grid(t)[-1])
    inner_s: Floats = np.geomspace(high_s / 50, high_s, WINDOWS - 1) if high_s > 0.0 else np.empty(0)
    return Relaxation(
        tokens=shortest,
        work_s=(t.quadratic_s * shortest + t.linear_s) * shortest,
        weight=np.add.reduceat(ascending, first) / shortest,
        window_s=np.concatenate(([0.0], inner_s, [math.inf])),
        degrees=t.degrees.astype(np.float64),
        exchange_s=t.exchange_s,
        latency_s=t.latency_s,
        capacity=t.capacity.astype(np.float64),
        factor=t.factor,
        num_devices=float(t.num_devices),
        fixed_s=t.fixed_s,
    )
