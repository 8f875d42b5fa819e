"""A solution of `flex` and the two kernels that make and better it.

Letters: K = sequences, M = micro-batches.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from flexsp.planner.jit import kernel
from flexsp.planner.packing import Space, fill, fit_all
from flexsp.planner.tables import Floats, Ints, Tables


class Solution(NamedTuple):
    """Which group of which micro-batch holds each sequence of the sorted batch."""

    batch: Ints
    """(K,) micro-batch."""
    group: Ints
    """(K,) the group's number in it, as `Space` numbers them."""
    start: Ints
    """(K,) the group's first rank, where `Tables.by_count` does not hold; else -1."""
    cost_s: Floats
    """(M,) the fixed cost and the slowest group; 0 where a micro-batch is empty."""
    mode: Ints
    """(M,) how each micro-batch was filled, see `packing`; its policy is mode // (D + L)."""


def empty_solution(num_sequences: int, num_micro_batches: int) -> Solution:
    return Solution(
        batch=np.full(num_sequences, -1, dtype=np.int64),
        group=np.full(num_sequences, -1, dtype=np.int64),
        start=np.full(num_sequences, -1, dtype=np.int64),
        cost_s=np.zeros(num_micro_batches),
        mode=np.zeros(num_micro_batches, dtype=np.int64),
    )


def copy_of(solution: Solution) -> Solution:
    return Solution(
        batch=solution.batch.copy(),
        group=solution.group.copy(),
        start=solution.start.copy(),
        cost_s=solution.cost_s.copy(),
        mode=solution.mode.copy(),
    )


@kernel
def commit(
    t: Tables, space: Space, solution: Solution, m: int, target_s: float, mode: int, pool: Ints, n: int, where: Ints
) -> int:
    """Fills micro-batch m of the solution from the pool and takes what it holds out of the pool; what is left."""
    _, slowest_s = fill(t, space, pool, n, target_s, mode, where)
    solution.cost_s[m], solution.mode[m] = t.fixed_s + slowest_s, mode
    left = 0
    for j in range(n):
        i = pool[j]
        if where[j] >= 0:
            solution.batch[i], solution.group[i], solution.start[i] = m, where[j], space.start[where[j]]
        else:
            pool[left] = i
            left += 1
    return left


@kernel
def in_turn(
    t: Tables,
    space: Space,
    order: Ints,
    target_s: Floats,
    mode: Ints,
    give_up_s: float,
    steps: int,
    solution: Solution,
) -> float:
    """Fills micro-batches one after another, each within its target; the last takes the rest.

    Args:
        order: (K,) in which sequences are chosen, best longest first.
        target_s: (M,) seconds of each micro-batch but the last, fixed cost apart.
        mode: (M,) how to fill each.
        solution: written.

    Returns:
        Total seconds with fixed costs; infinite where that does not hold everything or reaches give_up_s.
    """
    n = len(t.tokens)
    pool = order.copy()
    where = np.empty(n, dtype=np.int64)
    solution.cost_s[:] = 0.0
    total_s = 0.0
    last = len(target_s) - 1
    for m in range(last):
        if n > 0:
            n = commit(t, space, solution, m, target_s[m], mode[m], pool, n, where)
        total_s += solution.cost_s[m]
        if total_s >= give_up_s:
            return math.inf
    if n == 0:
        return total_s
    high_s = give_up_s - total_s - t.fixed_s
    last_s, last_target_s = fit_all(t, space, pool, n, mode[last], high_s, steps, where)
    if last_s == math.inf:
        return math.inf
    commit(t, space, solution, last, last_target_s, mode[last], pool, n, where)
    return float(total_s + solution.cost_s[last])


@kernel
def divide_anew(
    t: Tables,
    space: Space,
    solution: Solution,
    a: int,
    b: int,
    factors: Floats,
    modes: Ints,
    all_modes: Ints,
    steps: int,
) -> tuple[float, int]:
    """Divides the sequences of micro-batches a and b anew: one is filled to several targets, the other takes the rest.

    Where a and b are the same, its sequences are only grouped anew.

    Args:
        solution: changed where that gains.
        factors: (F,) targets tried for the first, relative to what a takes now.
        modes: how to fill either.
        all_modes: how to fill one micro-batch that takes all.
        steps: see `fit_all`.

    Returns:
        Seconds gained, at least 0, and sequences handled (the price).
    """
    pool = np.empty(len(t.tokens), dtype=np.int64)
    n = 0
    for i in range(len(t.tokens)):
        if solution.batch[i] == a or solution.batch[i] == b:
            pool[n] = i
            n += 1
    if n == 0:
        return 0.0, 0
    rest, where = np.empty(n, dtype=np.int64), np.empty(n, dtype=np.int64)
    old_s = solution.cost_s[a] + (solution.cost_s[b] if a != b else 0.0)
    best_s = old_s * (1.0 - 1e-9)  # what is found must be better by more than rounding
    first_target_s, second_target_s, first_mode, second_mode, handled = -1.0, 0.0, 0, 0, 0
    for mode in all_modes:
        together_s, target_s = fit_all(t, space, pool, n, mode, best_s - t.fixed_s, steps, where)
        handled += n
        if t.fixed_s + together_s < best_s:
            best_s, first_target_s, first_mode = t.fixed_s + together_s, target_s, mode
    for mode in modes:
        if a == b:
            break
        for factor in factors:
            target_s = (solution.cost_s[a] - t.fixed_s) * factor
            left, first_s = fill(t, space, pool, n, target_s, mode, where)
            handled += n
            if left == 0 or left == n or first_s + 2.0 * t.fixed_s >= best_s:
                continue
            left = 0
            for j in range(n):
                if where[j] < 0:
                    rest[left] = pool[j]
                    left += 1
            first_s += 2.0 * t.fixed_s
            for other in modes:
                second_s, reached_s = fit_all(t, space, rest, left, other, best_s - first_s, steps, where)
                handled += left if second_s == math.inf else left * (1 + abs(steps) // 2)
                if first_s + second_s < best_s:
                    best_s, first_target_s, second_target_s = first_s + second_s, target_s, reached_s
                    first_mode, second_mode = mode, other
    if first_target_s < 0.0:
        return 0.0, handled
    solution.cost_s[b] = 0.0
    left = commit(t, space, solution, a, first_target_s, first_mode, pool, n, where)
    if left > 0:
        commit(t, space, solution, b, second_target_s, second_mode, pool, left, where)
    new_s = solution.cost_s[a] + (solution.cost_s[b] if a != b else 0.0)
    return old_s - new_s, handled
