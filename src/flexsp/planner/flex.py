"""The default planner: groups of different degrees in every micro-batch, by a search that packs.

1. Sort the sequences, longest first, so that sequences of like length meet in a micro-batch.
2. For every count of micro-batches, find the best cuts of the sorted row by dynamic programming over a surrogate of a
   piece's time (`cuts`). What it yields is a *target* for each micro-batch: seconds that it should take.
3. Fill the micro-batches in turn, each within its target (`packing`), so that gaps beside long sequences, in time and
   in memory, take short ones. Degrees and how many groups of each come out of the filling: a sequence opens a group of
   the degree that is cheapest in device-seconds among those that meet the target. Do so for the most promising counts
   and for targets a few per cent larger.
4. Take the best two and divide the sequences of two micro-batches at a time anew, between other targets, while that
   gains (`search.divide_anew`).

Each step packs a few hundred times; a packing costs O(K (D + log N)) for K sequences, D degrees and N devices.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from flexsp.lengths import LengthArray
from flexsp.planner.assemble import MicroBatchChoice, assemble, infeasible, too_long
from flexsp.planner.degrees import usable_degrees
from flexsp.planner.tables import Ints, Tables, policy_names, sorted_order, tables
from flexsp.plans import Plan
from flexsp.profile import Profile

if TYPE_CHECKING:  # compiled kernels are imported where they run, so that `import flexsp` does not wait for numba
    from flexsp.planner.packing import Space
    from flexsp.planner.search import Solution

EXTRA_COUNTS = 4
"""Counts of micro-batches tried beyond the least that works."""
SCALES = (1.0, 1.02, 1.05, 1.09, 1.14)
"""Targets relative to the surrogate's, which knows nothing of gaps."""
COARSE = (0.75, 0.85, 0.92, 0.96, 0.98, 1.0, 1.02, 1.04, 1.08, 1.16, 1.3)
FINE = (0.97, 0.985, 0.993, 0.997, 1.003, 1.007, 1.015, 1.03)
"""Targets tried when two micro-batches are divided anew, relative to what the first takes."""
EFFORT = 320
"""Without a time limit: how often the whole batch may be packed in step 4."""
STEPS = 6
"""Bisections for the least time within which a micro-batch holds what it must."""


def plan_flex(lengths: LengthArray, profile: Profile, time_limit_s: float | None = None) -> Plan:
    """Mixed degrees by search; deterministic without a time limit.

    Args:
        lengths: (K,) tokens.
        profile: the cost model.
        time_limit_s: search for this long instead of a fixed effort. More time never gives a worse plan; the first
            plan is finished whatever the limit, so the least time is that of step 3 for one count.

    Raises:
        ValueError: `time_limit_s` is negative.
    """
    began = time.perf_counter()
    if time_limit_s is not None and not time_limit_s >= 0:
        raise ValueError(f"time_limit_s={time_limit_s} must be at least 0; give seconds, or leave it out")
    degrees = usable_degrees(profile)
    if reason := too_long(lengths, profile, degrees):
        return infeasible("flex", lengths, profile, reason, time.perf_counter() - began)
    order = sorted_order(lengths)
    search = _Search(tables(lengths, profile, degrees), began + time_limit_s if time_limit_s is not None else None)
    solution = search.run()
    return assemble(
        "flex", lengths, profile, _choices(solution, search, order, policy_names(profile)), time.perf_counter() - began
    )


def _choices(solution: Solution, search: _Search, order: Ints, policies: list[str | None]) -> list[MicroBatchChoice]:
    """The solution in the words of `assemble`."""
    degree_of = np.repeat(search.t.degrees, search.t.at_once)
    held: dict[int, dict[int, list[int]]] = {}
    for i, (m, g) in enumerate(zip(solution.batch.tolist(), solution.group.tolist(), strict=True)):
        held.setdefault(m, {}).setdefault(g, []).append(i)
    return [
        MicroBatchChoice(
            groups=[(int(degree_of[g]), order[members].tolist()) for g, members in groups.items()],
            policy=policies[int(solution.policy[m])],
            starts=None if search.t.by_count else [int(solution.start[members[0]]) for members in groups.values()],
        )
        for m, groups in sorted(held.items())
    ]


@dataclass
class _Search:
    """One batch's search; holds what its steps share."""

    t: Tables
    deadline: float | None
    """`time.perf_counter()` at which to stop; None: after EFFORT."""
    space: Space = field(init=False)
    best: Solution | None = None
    best_s: float = math.inf

    def __post_init__(self) -> None:
        from flexsp.planner.packing import space_for

        self.space = space_for(self.t)

    def run(self) -> Solution:
        starts = sorted(self._starts(), key=lambda start: start[0])
        if not starts:
            starts = [self._greedy()]
        for total_s, solution in starts:
            self._keep(total_s, solution)
        handled = 0
        for share, (_, solution) in zip((0.7, 1.0), starts, strict=False):
            handled = self._improve(solution, handled, share * EFFORT * len(self.t.tokens))
        if self.deadline is not None:
            self._wander(starts)
        assert self.best is not None
        return self.best

    def _keep(self, total_s: float, solution: Solution) -> None:
        from flexsp.planner.search import copy_of

        if total_s < self.best_s:
            self.best_s, self.best = total_s, copy_of(solution)

    def _late(self) -> bool:
        return self.deadline is not None and time.perf_counter() >= self.deadline

    def _starts(self) -> Iterator[tuple[float, Solution]]:
        """Steps 2 and 3: the best solution of each promising count of micro-batches."""
        from flexsp.planner.search import copy_of, empty_solution, in_turn

        t = self.t
        found, best_s = 0, math.inf
        for surrogate_s, targets_s, policy in self._targets():
            if found and (surrogate_s >= best_s or self._late()):
                break
            solution, best = empty_solution(len(t.tokens), len(targets_s)), None
            own_s = math.inf
            for scale in SCALES:
                # A start somewhat worse than the best may yet end better.
                give_up_s = min(own_s, best_s * 1.02) if found else own_s if own_s < math.inf else 1e30
                total_s = in_turn(t, self.space, targets_s * scale, policy, give_up_s, STEPS, solution)
                if total_s < own_s:
                    own_s, best = total_s, copy_of(solution)
            if best is not None:
                found += 1
                best_s = min(best_s, own_s)
                yield own_s, best

    def _targets(self) -> list[tuple[float, np.ndarray, Ints]]:
        """Step 2: for each count of micro-batches, the surrogate's total, each one's seconds and policy."""
        from flexsp.planner.cuts import area_prefix, best_cuts, boundaries, piece_seconds, time_grid

        t = self.t
        bounds, grid_s = boundaries(t), time_grid(t)
        before = np.concatenate(([0], np.cumsum(t.tokens)))[bounds].astype(np.float64)
        pieces = []
        for p in range(len(t.factor)):
            prefix_s, first = area_prefix(t, grid_s, bounds, p)
            pieces.append(piece_seconds(t, grid_s, bounds, before, prefix_s, first, p))
        policy_of = np.argmin(pieces, axis=0)
        seconds = np.min(pieces, axis=0)
        fewest = max(1, math.ceil(before[-1] / t.room_tokens.max()))
        most = min(len(bounds) - 1, fewest + EXTRA_COUNTS + 4)
        total_s, previous = best_cuts(seconds, most)
        targets = []
        for count in range(fewest, most + 1):
            if total_s[count, -1] == math.inf:
                continue
            cuts = [len(bounds) - 1]
            for m in range(count, 0, -1):
                cuts.append(int(previous[m, cuts[-1]]))
            pairs = list(zip(cuts[:0:-1], cuts[-2::-1], strict=True))
            targets.append((
                float(total_s[count, -1]) + count * t.fixed_s,
                np.array([seconds[pair] for pair in pairs]),
                np.array([policy_of[pair] for pair in pairs], dtype=np.int64),
            ))  # fmt: skip
        return sorted(targets, key=lambda target: target[0])

    def _greedy(self) -> tuple[float, Solution]:
        """Micro-batch by micro-batch, whichever target does the most work per second. Always ends with a solution."""
        from flexsp.planner.packing import best_alone_s, fill
        from flexsp.planner.search import commit, empty_solution

        t = self.t
        n = len(t.tokens)
        pool, where = np.arange(n), np.empty(n, dtype=np.int64)
        solution, m = empty_solution(n, n), 0
        while n > 0:
            best = (-1.0, 0.0, 0)
            for p in range(len(t.factor)):
                alone_s = best_alone_s(t, int(pool[0]), p)
                if alone_s == math.inf:
                    continue
                for factor in (1.0, 1.3, 1.7, 2.5, 4.0, 8.0):
                    _, slowest_s = fill(t, self.space, pool, n, alone_s * factor, p, where)
                    rate = float(t.area_s[pool[:n][where[:n] >= 0]].sum()) / (t.fixed_s + slowest_s)
                    best = max(best, (rate, alone_s * factor, p))
            n = commit(t, self.space, solution, m, best[1], best[2], pool, n, where)
            m += 1
        solution = solution._replace(cost_s=solution.cost_s[:m].copy(), policy=solution.policy[:m].copy())
        return float(solution.cost_s.sum()), solution

    def _improve(self, solution: Solution, handled: int, budget: float) -> int:
        """Step 4, in place; returns `handled` and the sequences packed here, at most about `budget` in all."""
        from flexsp.planner.search import divide_anew

        count = len(solution.cost_s)
        version = [0] * count
        tried: dict[tuple[int, int, int], tuple[int, int]] = {}
        for factors in (COARSE, FINE, FINE, COARSE, FINE, FINE, FINE):
            kind = 0 if factors is COARSE else 1
            for a, b in _pairs(count):
                if handled >= budget or self._late():
                    self._keep(float(solution.cost_s.sum()), solution)
                    return handled
                if tried.get((kind, a, b)) == (version[a], version[b]):
                    continue
                gained_s, price = divide_anew(self.t, self.space, solution, a, b, np.array(factors), STEPS)
                handled += price
                if gained_s > 0.0:
                    version[a] += 1
                    version[b] += 1
                tried[kind, a, b] = (version[a], version[b])
        self._keep(float(solution.cost_s.sum()), solution)
        return handled

    def _wander(self, starts: list[tuple[float, Solution]]) -> None:
        """Until the deadline: the other starts, then ever new ones whose targets are those of the best plan, shaken."""
        from flexsp.planner.search import copy_of, empty_solution, in_turn

        for _, solution in starts:
            if self._late():
                return
            self._improve(solution, 0, math.inf)
        random = np.random.default_rng(0)  # seeded: only the clock decides where this stops
        while not self._late():
            assert self.best is not None
            used = np.argsort(-self.best.cost_s, kind="stable")[: np.count_nonzero(self.best.cost_s)]
            targets_s = (self.best.cost_s[used] - self.t.fixed_s) * np.exp(random.normal(0.0, 0.06, len(used)))
            solution = empty_solution(len(self.t.tokens), len(used))
            give_up_s = self.best_s * 1.05
            total_s = in_turn(self.t, self.space, targets_s, self.best.policy[used], give_up_s, STEPS, solution)
            if total_s < math.inf:
                self._improve(copy_of(solution), 0, math.inf)


def _pairs(count: int) -> Iterator[tuple[int, int]]:
    """Pairs of micro-batches, neighbours first."""
    for distance in range(1, count):
        for a in range(count - distance):
            yield a, a + distance
