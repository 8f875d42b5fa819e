"""The default planner: groups of different degrees in every micro-batch, by a search that packs.

1. Sort the sequences, longest first, so that sequences of like length meet in a micro-batch.
2. For every count of micro-batches, find the best cuts of the sorted row by dynamic programming over a surrogate of a
   piece's time (`cuts`). What it yields is a *target* for each micro-batch: seconds that it should take.
3. Fill the micro-batches in turn, each within its target (`packing`), so that gaps beside long sequences, in time and
   in memory, take short ones. Degrees and how many groups of each come out of the filling: a sequence opens a group of
   the degree that is cheapest in device-seconds among those that meet the target. Do so for the most promising counts
   and for targets a few per cent larger.
   Where sequences are long against a device's memory, groups of the least degree leave much of it empty: every degree
   for all, as `batch-adaptive` packs it, is a start too, if it may be faster. So by the formula `flex` is never
   slower than that.
4. Take the best two and divide the sequences of two micro-batches at a time anew, between other targets, while that
   gains (`search.divide_anew`).
5. Halve groups that have time to spare (`loosen`): the same predicted time with less exchange.

Each step packs a few hundred times; a packing costs O(K (D + log N)) for K sequences, D degrees and N devices.
"""

from __future__ import annotations

import time
from dataclasses import replace

from flexsp.lengths import LengthArray
from flexsp.planner.assemble import MicroBatchChoice, assemble, infeasible, too_long
from flexsp.planner.by_tables import localized
from flexsp.planner.degrees import usable_degrees
from flexsp.planner.loosen import loosened
from flexsp.planner.tables import policy_names
from flexsp.plans import Plan
from flexsp.profile import Profile


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
        ValueError: `time_limit_s` is negative, or nothing in the profile takes time.
    """
    began = time.perf_counter()
    profile.require_costs()
    if time_limit_s is not None and not time_limit_s >= 0:
        raise ValueError(f"time_limit_s={time_limit_s} must be at least 0; give seconds, or leave it out")
    if reason := too_long(lengths, profile, usable_degrees(profile), policy_names(profile)):
        return infeasible("flex", lengths, profile, reason, time.perf_counter() - began)
    deadline = None if time_limit_s is None else began + time_limit_s
    if not profile.tables:
        micro_batches = _found(lengths, profile, deadline)
        return assemble("flex", lengths, profile, micro_batches, time.perf_counter() - began)
    half = None if time_limit_s is None else began + time_limit_s / 2
    plans = [
        assemble("flex", lengths, profile, _found(lengths, one, until), time.perf_counter() - began)
        for one, until in ((profile, half), (localized(profile, lengths), deadline))
    ]
    chosen = min(plans, key=lambda plan: plan.predicted_table_s or 0.0)
    return replace(chosen, solve_s=plans[-1].solve_s)


def _found(lengths: LengthArray, profile: Profile, deadline: float | None) -> list[MicroBatchChoice]:
    """The best that the search finds under the formula of `profile`."""
    # Compiled kernels are imported where they run, so that `import flexsp` does not wait for numba.
    from flexsp.planner.improve import Search
    from flexsp.planner.problem import problem_of
    from flexsp.planner.starts import starts_of

    best: Search | None = None
    for choice in _with_less_choice(profile, lengths):
        problem = problem_of(lengths, choice, deadline)
        search = Search(problem)
        search.run(starts_of(problem, lengths, choice), to_the_deadline=choice is profile)
        if best is None or search.best_s < best.best_s:
            best = search
    assert best is not None
    return loosened(best.choices(lengths, profile), lengths, profile)


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
