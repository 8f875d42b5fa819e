"""The default planner: groups of different degrees in every micro-batch, by a search that packs.

1. Sort the sequences, longest first, so that sequences of like length meet in a micro-batch.
2. For every count of micro-batches, find the best cuts of the sorted row by dynamic programming over a surrogate of a
   piece's time (`cuts`). What it yields is a *target* for each micro-batch: seconds that it should take.
3. Fill the micro-batches in turn, each within its target (`packing`), so that gaps beside long sequences, in time and
   in memory, take short ones. Degrees and how many groups of each come out of the filling: a sequence opens a group of
   the degree that is cheapest in device-seconds among those that meet the target. Do so for the most promising counts
   and for targets a few per cent larger.
   Where sequences are long against a device's memory, groups of the least degree leave much of it empty: every degree
   for all, as `batch-adaptive` packs it, is a start too, if it may be faster. So `flex` is never slower than that.
4. Take the best two and divide the sequences of two micro-batches at a time anew, between other targets, while that
   gains (`search.divide_anew`).
5. Halve groups that have time to spare (`loosen`): the same predicted time with less exchange.

Each step packs a few hundred times; a packing costs O(K (D + log N)) for K sequences, D degrees and N devices.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from flexsp.lengths import LengthArray
from flexsp.planner.assemble import MicroBatchChoice, assemble, infeasible, too_long
from flexsp.planner.best_fit import least_one_degree_s, pack_one_degree
from flexsp.planner.by_tables import localized
from flexsp.planner.degrees import usable_degrees
from flexsp.planner.loosen import loosened
from flexsp.planner.placement import few_layouts, place
from flexsp.planner.tables import Floats, Ints, Tables, policy_names, sorted_order, tables
from flexsp.plans import Plan
from flexsp.profile import Profile

if TYPE_CHECKING:  # compiled kernels are imported where they run, so that `import flexsp` does not wait for numba
    from flexsp.planner.packing import Space
    from flexsp.planner.search import Solution

EXTRA_COUNTS = 4
"""Counts of micro-batches tried beyond the least that works."""
SCALES = (1.0, 1.02, 1.05, 1.09, 1.14)
"""Targets relative to the surrogate's, which knows nothing of gaps."""
START_EFFORT = 400
"""How often the whole batch may be looked at in step 3 before no further count is tried; matters for many
micro-batches, of which each looks at all that is left."""
FULLER = (1.2, 1.5, 2.0, 4.0)
"""Targets of micro-batches that are filled for memory's sake, relative to the surrogate's."""
COARSE = (0.75, 0.85, 0.92, 0.96, 0.98, 1.0, 1.02, 1.04, 1.08, 1.16, 1.3)
FINE = (0.97, 0.985, 0.993, 0.997, 1.003, 1.007, 1.015, 1.03)
"""Targets tried when two micro-batches are divided anew, relative to what the first takes."""
EFFORT = 320
"""Without a time limit: how often the whole batch may be packed in step 4."""
STEPS = 6
"""Bisections for the least time within which a micro-batch holds what it must."""
SPREADS = (0.0, 1.0, 4.0, 0.0, 16.0)
"""By how many places the order of choosing is shaken."""
FEW_ROUNDS = 60
"""With few sequences, new starts whatever the time."""
FEW = 24
"""With at most so many sequences, every mode of filling is tried everywhere: it costs nothing."""


OneDegree = tuple[int, float, list[list[Ints]]]
"""A degree, seconds, and by micro-batch and group which sequences of the sorted batch it holds."""
Target = tuple[float, Floats, Ints]
"""For a count of micro-batches: seconds of all with fixed costs, and of each one its seconds and mode."""


def plan_flex(lengths: LengthArray, profile: Profile, time_limit_s: float | None = None) -> Plan:
    """Mixed degrees by search; deterministic without a time limit.

    Where the profile has measured tables, the search runs twice, under the formula and under one fitted to the tables
    at this batch's lengths, and the tables choose between the two plans.

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
    degrees, policies = usable_degrees(profile), policy_names(profile)
    if reason := too_long(lengths, profile, degrees, policies):
        return infeasible("flex", lengths, profile, reason, time.perf_counter() - began)
    deadline = None if time_limit_s is None else began + time_limit_s
    if not profile.tables:
        micro_batches = _found(lengths, profile, deadline, policies)
        return assemble("flex", lengths, profile, micro_batches, time.perf_counter() - began)
    half = None if time_limit_s is None else began + time_limit_s / 2
    plans = [
        assemble("flex", lengths, profile, _found(lengths, one, until, policies), time.perf_counter() - began)
        for one, until in ((profile, half), (localized(profile, lengths), deadline))
    ]
    chosen = min(plans, key=lambda plan: plan.predicted_table_s or 0.0)
    return replace(chosen, solve_s=plans[-1].solve_s)


def _found(
    lengths: LengthArray, profile: Profile, deadline: float | None, policies: list[str | None]
) -> list[MicroBatchChoice]:
    """The best that the search finds under the formula of `profile`."""
    best: _Search | None = None
    for choice in _with_less_choice(profile, lengths):
        search = _Search(_tables(lengths, choice), deadline)
        search.run(partial(_of_one_degree, lengths, choice), to_the_deadline=choice is profile)
        if best is None or search.best_s < best.best_s:
            best = search
    assert best is not None
    return loosened(_choices(best, sorted_order(lengths), policies), lengths, profile)


def _of_one_degree(lengths: LengthArray, profile: Profile, within_s: float) -> Iterator[OneDegree]:
    """The packings of one degree for all that may take less than so many seconds."""
    sorted_at = np.argsort(sorted_order(lengths))
    for degree in usable_degrees(profile):
        if profile.capacity_tokens(degree) >= lengths.max():
            if least_one_degree_s(lengths, profile, degree) < within_s:
                total_s, rounds = pack_one_degree(lengths, profile, degree)
                yield degree, total_s, [[sorted_at[held] for _, held in groups] for groups in rounds]


def _with_less_choice(profile: Profile, lengths: LengthArray) -> list[Profile]:
    """The profile, after itself without policies and degrees but powers of two where that leaves less choice.

    More choice can lead a search astray; so a plan is never worse for it.
    """
    powers = tuple(d for d in profile.sp_degrees if d & (d - 1) == 0)
    if powers == profile.sp_degrees and not profile.memory.policies:
        return [profile]
    plain = replace(profile, sp_degrees=powers or profile.sp_degrees, memory=replace(profile.memory, policies={}))
    fits = too_long(lengths, plain, usable_degrees(plain)) is None
    return [plain, profile] if fits else [profile]


def _tables(lengths: LengthArray, profile: Profile) -> Tables:
    degrees = usable_degrees(profile)
    return tables(lengths, profile, degrees, few_layouts(degrees, profile, len(lengths)) if len(lengths) <= FEW else [])


def _choices(search: _Search, order: Ints, policies: list[str | None]) -> list[MicroBatchChoice]:
    """The best solution in the words of `assemble`."""
    solution = search.best
    assert solution is not None
    degree_of = np.repeat(search.t.degrees, search.t.at_once)
    held: dict[int, dict[int, list[int]]] = {}
    for i, (m, g) in enumerate(zip(solution.batch.tolist(), solution.group.tolist(), strict=True)):
        held.setdefault(m, {}).setdefault(g, []).append(i)
    return [
        MicroBatchChoice(
            groups=[(int(degree_of[g]), order[members].tolist()) for g, members in groups.items()],
            policy=policies[int(solution.mode[m]) // (len(search.t.degrees) + len(search.t.layouts))],
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
    plain: Ints = field(init=False)
    """One mode of filling for each policy: groups of any degree."""
    modes: Ints = field(init=False)
    """All modes of filling."""
    steps: int = field(init=False)
    best: Solution | None = None
    best_s: float = math.inf

    def __post_init__(self) -> None:
        from flexsp.planner.packing import space_for

        self.space = space_for(self.t)
        num_degrees, few = len(self.t.degrees), len(self.t.tokens) <= FEW
        manners = num_degrees + len(self.t.layouts)
        self.modes = np.arange(len(self.t.factor) * manners)
        self.plain = self.modes[self.modes % manners < (num_degrees if few else 1)]
        self.steps = -10 if few else STEPS

    def run(self, of_one_degree: Callable[[float], Iterator[OneDegree]], to_the_deadline: bool) -> None:
        """
        Args:
            of_one_degree: packings of one degree that may take less than so many seconds.
            to_the_deadline: whether to go on as long as there is time.
        """
        targets = self._targets()
        starts = [*self._starts(targets), *self._fuller(targets)]
        least_s = min((total_s for total_s, _ in starts), default=math.inf)
        starts += [self._adopted(each) for each in of_one_degree(least_s) if each[1] < least_s]
        starts.sort(key=lambda start: start[0])
        if not starts:
            starts = [self._greedy()]
        for total_s, solution in starts:
            self._keep(total_s, solution)
        handled = 0
        for share, (_, solution) in zip((0.7, 1.0), starts, strict=False):
            handled = self._improve(solution, handled, share * EFFORT * len(self.t.tokens))
        assert self.best is not None
        self._regroup(self.best)
        few = len(self.t.tokens) <= FEW
        if few or (to_the_deadline and self.deadline is not None):
            for _, solution in starts:
                self._improve(solution, 0, math.inf)
            self._shake(FEW_ROUNDS if few else 0, to_the_deadline)

    def _adopted(self, packing: OneDegree) -> tuple[float, Solution]:
        """A packing of one degree as a start; its way of filling is among those tried from now on."""
        from flexsp.planner.search import empty_solution

        t = self.t
        degree, total_s, rounds = packing
        k = int(np.flatnonzero(t.degrees == degree)[0])
        self.plain = np.union1d(self.plain, [k])  # without a policy
        solution = empty_solution(len(t.tokens), len(rounds))
        solution.mode[:] = k
        for m, groups in enumerate(rounds):
            first = place([degree] * len(groups), t.num_devices, t.devices_per_node)
            assert first is not None
            for g, held in enumerate(groups):
                solution.batch[held], solution.group[held] = m, self.space.first[k] + g
                solution.start[held] = -1 if t.by_count else first[g]
                tokens, work_s = t.tokens[held].sum(), t.work_s[held].sum()
                group_s = float(work_s / degree + t.exchange_s[k] * tokens + t.latency_s[k])
                solution.cost_s[m] = max(solution.cost_s[m], t.fixed_s + group_s)
        return total_s, solution

    def _keep(self, total_s: float, solution: Solution) -> None:
        from flexsp.planner.search import copy_of

        if total_s < self.best_s:
            self.best_s, self.best = total_s, copy_of(solution)

    def _late(self) -> bool:
        return self.deadline is not None and time.perf_counter() >= self.deadline

    def _starts(self, targets: list[Target]) -> Iterator[tuple[float, Solution]]:
        """Steps 2 and 3: the best solution of each promising count of micro-batches."""
        from flexsp.planner.search import copy_of, empty_solution, in_turn

        t = self.t
        found, best_s, order, looked = 0, math.inf, np.arange(len(t.tokens)), 0.0
        for surrogate_s, targets_s, mode in targets:
            if found and (surrogate_s >= best_s or looked > START_EFFORT or self._late()):
                break
            looked += len(SCALES) * len(targets_s) / 2
            solution, best = empty_solution(len(t.tokens), len(targets_s)), None
            own_s = math.inf
            for scale in SCALES:
                # A start somewhat worse than the best may yet end better.
                give_up_s = min(own_s, best_s * 1.02) if found else own_s if own_s < math.inf else 1e30
                total_s = in_turn(t, self.space, order, targets_s * scale, mode, give_up_s, self.steps, solution)
                if total_s < own_s:
                    own_s, best = total_s, copy_of(solution)
            if best is not None:
                found += 1
                best_s = min(best_s, own_s)
                yield own_s, best

    def _fuller(self, targets: list[Target]) -> Iterator[tuple[float, Solution]]:
        """Where cuts of the sorted row leave memory empty: the least micro-batches that memory allows, each filled for
        longer, so that short sequences fill the memory beside long ones."""
        from flexsp.planner.cuts import fewest_micro_batches
        from flexsp.planner.search import copy_of, empty_solution, in_turn

        t = self.t
        if not targets or self._late():
            return
        _, targets_s, mode = min(targets, key=lambda target: len(target[1]))
        fewest, order = fewest_micro_batches(t), np.arange(len(t.tokens))
        if len(targets_s) == fewest:
            return
        at = np.minimum(np.arange(len(targets_s)) * len(targets_s) // fewest, len(targets_s) - 1)
        best, best_s = None, math.inf
        for scale in FULLER:
            solution = empty_solution(len(t.tokens), len(targets_s))
            fuller_s = targets_s[at] * scale
            total_s = in_turn(t, self.space, order, fuller_s, mode[at], min(best_s, 1e30), self.steps, solution)
            if total_s < best_s:
                best_s, best = total_s, copy_of(solution)
        if best is not None:
            yield best_s, best

    def _targets(self) -> list[Target]:
        """Step 2: for each count of micro-batches, the surrogate's total, each one's seconds and mode."""
        from flexsp.planner.cuts import (
            area_prefix,
            best_cuts,
            boundaries,
            fewest_micro_batches,
            piece_seconds,
            time_grid,
        )

        t = self.t
        manners = len(t.degrees) + len(t.layouts)
        bounds, grid_s = boundaries(t), time_grid(t)
        before = np.concatenate(([0], np.cumsum(t.tokens)))[bounds].astype(np.float64)
        pieces = []
        for p in range(len(t.factor)):
            prefix_s, first = area_prefix(t, grid_s, bounds, p)
            pieces.append(piece_seconds(t, grid_s, bounds, before, prefix_s, first, p))
        policy_of = np.argmin(pieces, axis=0)
        seconds = np.min(pieces, axis=0)
        fewest = fewest_micro_batches(t)
        most = min(len(bounds) - 1, fewest + 2 * EXTRA_COUNTS + fewest // 4)
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
                np.array([policy_of[pair] for pair in pairs], dtype=np.int64) * manners,
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
            for mode in self.plain.tolist():
                alone_s = best_alone_s(t, int(pool[0]), mode // (len(t.degrees) + len(t.layouts)))
                if alone_s == math.inf:
                    continue
                alone_s = max(alone_s, 1e-9)  # within no time nothing fits, not even what costs nothing
                for factor in (1.0, 1.3, 1.7, 2.5, 4.0, 8.0):
                    _, slowest_s = fill(t, self.space, pool, n, alone_s * factor, mode, where)
                    seconds = max(t.fixed_s + slowest_s, 1e-30)
                    rate = float(t.area_s[pool[:n][where[:n] >= 0]].sum()) / seconds
                    best = max(best, (rate, alone_s * factor, mode))
            left = commit(t, self.space, solution, m, best[1], best[2], pool, n, where)
            assert left < n, f"{n} sequences fit no micro-batch"
            n, m = left, m + 1
        solution = solution._replace(cost_s=solution.cost_s[:m].copy(), mode=solution.mode[:m].copy())
        return float(solution.cost_s.sum()), solution

    def _improve(self, solution: Solution, handled: int, budget: float) -> int:
        """Step 4, in place; returns `handled` and the sequences packed here, at most about `budget` in all."""
        from flexsp.planner.search import divide_anew

        count = len(solution.cost_s)
        version = [0] * count
        together = self.modes if len(self.t.tokens) <= FEW else self.plain
        tried: dict[tuple[int, int, int], tuple[int, int]] = {}
        for factors in (COARSE, FINE, FINE, COARSE, FINE, FINE, FINE):
            kind, wanted = int(factors is FINE), np.array(factors)
            for a, b in _pairs(count):
                if handled >= budget or self._late():
                    self._keep(float(solution.cost_s.sum()), solution)
                    return handled
                if tried.get((kind, a, b)) == (version[a], version[b]):
                    continue
                gained_s, price = divide_anew(
                    self.t, self.space, solution, a, b, wanted, self.plain, together, self.steps
                )
                handled += price + len(self.t.tokens) // 16  # finding the two's sequences costs as well
                if gained_s > 0.0:
                    version[a] += 1
                    version[b] += 1
                tried[kind, a, b] = (version[a], version[b])
        self._keep(float(solution.cost_s.sum()), solution)
        return handled

    def _regroup(self, solution: Solution) -> None:
        """The sequences of each micro-batch grouped anew, in every mode."""
        from flexsp.planner.search import divide_anew

        for m in range(len(solution.cost_s)):
            if self._late():
                break
            divide_anew(self.t, self.space, solution, m, m, np.ones(1), self.plain, self.modes, self.steps)
        self.best_s = float(solution.cost_s.sum())

    def _shake(self, rounds: int, to_the_deadline: bool) -> None:
        """New starts, at least `rounds`: the best plan's targets and the order of choosing, shaken."""
        from flexsp.planner.search import empty_solution, in_turn

        t, random = self.t, np.random.default_rng(0)  # seeded: nothing but the clock decides what is found
        done = 0
        while done < rounds or (to_the_deadline and self.deadline is not None and not self._late()):
            if self._late():
                return
            assert self.best is not None
            used = np.argsort(-self.best.cost_s, kind="stable")[: np.count_nonzero(self.best.cost_s)]
            targets_s = (self.best.cost_s[used] - t.fixed_s) * np.exp(random.normal(0.0, 0.06, len(used)))
            spread = SPREADS[done % len(SPREADS)]
            order = np.argsort(np.arange(len(t.tokens)) + spread * random.normal(size=len(t.tokens)), kind="stable")
            mode = self.best.mode[used].copy()
            if len(t.tokens) <= FEW:
                if done % 3 == 2:  # one micro-batch more
                    targets_s = np.append(targets_s, targets_s[-1])
                mode = random.choice(self.modes, len(targets_s))
            solution = empty_solution(len(t.tokens), len(mode))
            total_s = in_turn(t, self.space, order, targets_s, mode, self.best_s * 1.05, self.steps, solution)
            if total_s < math.inf:
                self._improve(solution, 0, math.inf)
            done += 1


def _pairs(count: int) -> Iterator[tuple[int, int]]:
    """Pairs of micro-batches, neighbours first."""
    for distance in range(1, count):
        for a in range(count - distance):
            yield a, a + distance
