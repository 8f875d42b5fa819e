"""Where the search of `flex` begins: solutions that fill every micro-batch once (steps 2 and 3)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from flexsp.lengths import LengthArray
from flexsp.planner.best_fit import least_one_degree_s, pack_one_degree
from flexsp.planner.cuts import Target, fewest_micro_batches, targets
from flexsp.planner.packing import best_alone_s, fill
from flexsp.planner.placement import place
from flexsp.planner.problem import Problem
from flexsp.planner.search import Solution, commit, empty_solution, in_turn
from flexsp.planner.tables import Floats, Ints, sorted_order
from flexsp.profile import Profile

SCALES = (1.0, 1.02, 1.05, 1.09, 1.14)
"""Targets relative to the surrogate's, which knows nothing of gaps."""
FULLER = (1.2, 1.5, 2.0, 4.0)
"""Targets of micro-batches that are filled for memory's sake, relative to the surrogate's."""
GREEDY = (1.0, 1.3, 1.7, 2.5, 4.0, 8.0)
"""Targets of a micro-batch relative to its longest sequence alone, where no count of micro-batches works."""
START_EFFORT = 400
"""How often the whole batch may be looked at before no further count is tried; matters for many micro-batches, of which
each looks at all that is left."""
NO_LIMIT_S = 1e30

Start = tuple[float, Solution]
"""Seconds and what takes them."""


def starts_of(problem: Problem, lengths: LengthArray, profile: Profile) -> list[Start]:
    """At least one start, the best first.

    Where one degree for all is a start, its way of filling is one of the problem's plain modes from now on.
    """
    wanted = targets(problem.t)
    found = [*_by_count(problem, wanted), *_fuller(problem, wanted)]
    least_s = min((total_s for total_s, _ in found), default=math.inf)
    found += _of_one_degree(problem, lengths, profile, least_s)
    return sorted(found, key=lambda start: start[0]) or [greedy(problem)]


def _by_count(problem: Problem, wanted: list[Target]) -> Iterator[Start]:
    """The best start of each promising count of micro-batches."""
    found, best_s, looked = 0, math.inf, 0.0
    for target in wanted:
        if found and (target.total_s >= best_s or looked > START_EFFORT or problem.late()):
            break
        looked += len(SCALES) * len(target.seconds) / 2
        limit_s = best_s * 1.02 if found else math.inf  # a start somewhat worse than the best may yet end better
        for start in _best_scaled(problem, target.seconds, target.policy, SCALES, limit_s):
            found += 1
            best_s = min(best_s, start[0])
            yield start


def _fuller(problem: Problem, wanted: list[Target]) -> Iterator[Start]:
    """Where cuts of the sorted row leave memory empty: the least micro-batches that memory allows, each filled for
    longer, so that short sequences fill the memory beside long ones."""
    if not wanted or problem.late():
        return
    target = min(wanted, key=lambda target: len(target.seconds))
    have, fewest = len(target.seconds), fewest_micro_batches(problem.t)
    if have > fewest:
        at = np.minimum(np.arange(have) * have // fewest, have - 1)
        yield from _best_scaled(problem, target.seconds[at], target.policy[at], FULLER, math.inf)


def _best_scaled(
    problem: Problem, seconds: Floats, policy: Ints, scales: tuple[float, ...], limit_s: float
) -> Iterator[Start]:
    """The best of filling micro-batches in turn to targets larger by the same factor each, if any is below the limit.

    Args:
        problem: the batch.
        seconds: (M,) targets.
        policy: (M,) number of each one's policy.
        scales: factors.
        limit_s: of all micro-batches.
    """
    t, num = problem.t, len(problem.t.tokens)
    best, best_s = None, min(limit_s, NO_LIMIT_S)
    for scale in scales:
        solution = empty_solution(num, len(seconds))
        mode = policy * problem.manners
        total_s = in_turn(t, problem.space, np.arange(num), seconds * scale, mode, best_s, problem.steps, solution)
        if total_s < best_s:
            best_s, best = total_s, solution
    if best is not None:
        yield best_s, best


def _of_one_degree(problem: Problem, lengths: LengthArray, profile: Profile, within_s: float) -> Iterator[Start]:
    """The packings of one degree for all that take less than so many seconds."""
    sorted_at = np.argsort(sorted_order(lengths))
    for degree in problem.t.degrees.tolist():
        if profile.capacity_tokens(degree) < lengths.max():
            continue
        if least_one_degree_s(lengths, profile, degree) < within_s:
            total_s, rounds = pack_one_degree(lengths, profile, degree)
            if total_s < within_s:
                held = [[sorted_at[members] for _, members in groups] for groups in rounds]
                yield total_s, _adopted(problem, degree, held)


def _adopted(problem: Problem, degree: int, rounds: list[list[Ints]]) -> Solution:
    """A solution of groups of one degree, given the sequences of each by micro-batch; without a policy."""
    t = problem.t
    k = int(np.flatnonzero(t.degrees == degree)[0])
    problem.plain = np.union1d(problem.plain, [k])
    solution = empty_solution(len(t.tokens), len(rounds))
    solution.mode[:] = k
    for m, groups in enumerate(rounds):
        first = place([degree] * len(groups), t.num_devices, t.devices_per_node)
        assert first is not None
        for g, held in enumerate(groups):
            solution.batch[held], solution.group[held] = m, problem.space.first[k] + g
            solution.start[held] = -1 if t.by_count else first[g]
            tokens, work_s = t.tokens[held].sum(), t.work_s[held].sum()
            group_s = float(work_s / degree + t.exchange_s[k] * tokens + t.latency_s[k])
            solution.cost_s[m] = max(solution.cost_s[m], t.fixed_s + group_s)
    return solution


def greedy(problem: Problem) -> Start:
    """Micro-batch by micro-batch, whichever target does the most work per second. Always ends with a solution."""
    t = problem.t
    n = len(t.tokens)
    pool, where = np.arange(n), np.empty(n, dtype=np.int64)
    solution, m = empty_solution(n, n), 0
    while n > 0:
        best = (-1.0, 0.0, 0)
        for mode in problem.plain.tolist():
            alone_s = best_alone_s(t, int(pool[0]), mode // problem.manners)
            if alone_s == math.inf:
                continue
            alone_s = max(alone_s, 1e-9)  # within no time nothing fits, not even what costs nothing
            for factor in GREEDY:
                _, slowest_s = fill(t, problem.space, pool, n, alone_s * factor, mode, where)
                seconds = max(t.fixed_s + slowest_s, 1e-30)
                rate = float(t.area_s[pool[:n][where[:n] >= 0]].sum()) / seconds
                best = max(best, (rate, alone_s * factor, mode))
        left = commit(t, problem.space, solution, m, best[1], best[2], pool, n, where)
        assert left < n, f"{n} sequences fit no micro-batch"
        n, m = left, m + 1
    solution = solution._replace(cost_s=solution.cost_s[:m].copy(), mode=solution.mode[:m].copy())
    return float(solution.cost_s.sum()), solution
