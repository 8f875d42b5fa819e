"""From the starts of `flex` to its best solution (step 4)."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from flexsp.lengths import LengthArray
from flexsp.planner.assemble import MicroBatchChoice
from flexsp.planner.problem import Problem
from flexsp.planner.search import Solution, copy_of, divide_anew, empty_solution, in_turn
from flexsp.planner.starts import Start
from flexsp.planner.tables import policy_names, sorted_order
from flexsp.profile import Profile

COARSE = (0.75, 0.85, 0.92, 0.96, 0.98, 1.0, 1.02, 1.04, 1.08, 1.16, 1.3)
FINE = (0.97, 0.985, 0.993, 0.997, 1.003, 1.007, 1.015, 1.03)
"""Targets tried when two micro-batches are divided anew, relative to what the first takes."""
EFFORT = 320
"""Without a time limit: how often the whole batch may be packed."""
SPREADS = (0.0, 1.0, 4.0, 0.0, 16.0)
"""By how many places the order of choosing is shaken."""
FEW_ROUNDS = 60
"""With few sequences, new starts whatever the time."""


class Search:
    """One batch's search: the best solution so far, and what may find a better one."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.best: Solution | None = None
        self.best_s = math.inf

    def run(self, starts: list[Start], to_the_deadline: bool) -> None:
        """Betters the starts, best first; where wanted and there is a deadline, until then."""
        problem = self.problem
        for total_s, solution in starts:
            self._keep(total_s, solution)
        handled = 0
        for share, (_, solution) in zip((0.7, 1.0), starts, strict=False):
            handled = self._improve(solution, handled, share * EFFORT * len(problem.t.tokens))
        assert self.best is not None
        self._regroup(self.best)
        to_the_deadline = to_the_deadline and problem.deadline is not None
        if problem.few or to_the_deadline:
            for _, solution in starts:
                self._improve(solution, 0, math.inf)
            self._shake(FEW_ROUNDS if problem.few else 0, to_the_deadline)

    def _keep(self, total_s: float, solution: Solution) -> None:
        if total_s < self.best_s:
            self.best_s, self.best = total_s, copy_of(solution)

    def _improve(self, solution: Solution, handled: int, budget: float) -> int:
        """Divides micro-batches two by two anew, in place.

        Returns:
            `handled` and the sequences packed here, at most about `budget` in all.
        """
        problem = self.problem
        t, count = problem.t, len(solution.cost_s)
        version = [0] * count
        together = problem.modes if problem.few else problem.plain
        tried: dict[tuple[int, int, int], tuple[int, int]] = {}
        for factors in (COARSE, FINE, FINE, COARSE, FINE, FINE, FINE):
            kind, wanted = int(factors is FINE), np.array(factors)
            for a, b in _pairs(count):
                if handled >= budget or problem.late():
                    self._keep(float(solution.cost_s.sum()), solution)
                    return handled
                if tried.get((kind, a, b)) == (version[a], version[b]):
                    continue
                gained_s, price = divide_anew(
                    t, problem.space, solution, a, b, wanted, problem.plain, together, problem.steps
                )
                handled += price + len(t.tokens) // 16  # finding the two's sequences costs as well
                if gained_s > 0.0:
                    version[a] += 1
                    version[b] += 1
                tried[kind, a, b] = (version[a], version[b])
        self._keep(float(solution.cost_s.sum()), solution)
        return handled

    def _regroup(self, solution: Solution) -> None:
        """The sequences of each micro-batch grouped anew, in every mode."""
        problem = self.problem
        for m in range(len(solution.cost_s)):
            if problem.late():
                break
            divide_anew(
                problem.t, problem.space, solution, m, m, np.ones(1), problem.plain, problem.modes, problem.steps
            )
        self.best_s = float(solution.cost_s.sum())

    def _shake(self, rounds: int, to_the_deadline: bool) -> None:
        """New starts, at least `rounds`: the best plan's targets and the order of choosing, shaken."""
        problem = self.problem
        t, random = problem.t, np.random.default_rng(0)  # seeded: nothing but the clock decides what is found
        done = 0
        while (done < rounds or to_the_deadline) and not problem.late():
            assert self.best is not None
            used = np.argsort(-self.best.cost_s, kind="stable")[: np.count_nonzero(self.best.cost_s)]
            targets_s = (self.best.cost_s[used] - t.fixed_s) * np.exp(random.normal(0.0, 0.06, len(used)))
            spread = SPREADS[done % len(SPREADS)]
            order = np.argsort(np.arange(len(t.tokens)) + spread * random.normal(size=len(t.tokens)), kind="stable")
            mode = self.best.mode[used].copy()
            if problem.few:
                if done % 3 == 2:  # one micro-batch more
                    targets_s = np.append(targets_s, targets_s[-1])
                mode = random.choice(problem.modes, len(targets_s))
            solution = empty_solution(len(t.tokens), len(mode))
            total_s = in_turn(t, problem.space, order, targets_s, mode, self.best_s * 1.05, problem.steps, solution)
            if total_s < math.inf:
                self._improve(solution, 0, math.inf)
            done += 1

    def choices(self, lengths: LengthArray, profile: Profile) -> list[MicroBatchChoice]:
        """The best solution in the words of `assemble`."""
        solution, t, policies = self.best, self.problem.t, policy_names(profile)
        assert solution is not None
        order, degree_of = sorted_order(lengths), np.repeat(t.degrees, t.at_once)
        held: dict[int, dict[int, list[int]]] = {}
        for i, (m, g) in enumerate(zip(solution.batch.tolist(), solution.group.tolist(), strict=True)):
            held.setdefault(m, {}).setdefault(g, []).append(i)
        return [
            MicroBatchChoice(
                groups=[(int(degree_of[g]), order[members].tolist()) for g, members in groups.items()],
                policy=policies[int(solution.mode[m]) // self.problem.manners],
                starts=None if t.by_count else [int(solution.start[members[0]]) for members in groups.values()],
            )
            for m, groups in sorted(held.items())
        ]


def _pairs(count: int) -> Iterator[tuple[int, int]]:
    """Pairs of micro-batches, neighbours first."""
    for distance in range(1, count):
        for a in range(count - distance):
            yield a, a + distance
