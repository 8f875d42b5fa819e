"""The optimum of small cases, by dynamic programming over sets of sequences; shares no code with the other planners.

Letters: S = 2^K sets of sequences, as bit masks.

1. Which rank intervals may hold a group is asked of `violations`, interval by interval; from them follow all multisets
   of degrees that have a placement.
2. For each multiset, least[S] is the slowest group's time when its groups hold exactly the set S: the last group takes
   a part of S, the others the rest.
3. A micro-batch that holds S takes the least of these over multisets and policies; a plan is the cheapest partition of
   all sequences into micro-batches.

Steps 2 and 3 look at each of the 3^K pairs of a set and a part of it, step 2 once for every multiset and policy.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from flexsp.legality import violations
from flexsp.lengths import LengthArray, lengths_sha256
from flexsp.plans import Group, MicroBatch, Plan, Status
from flexsp.profile import Profile

MOST_SEQUENCES = 8
MOST_DEVICES = 8

Layout = tuple[int, ...]
"""Degrees of the groups of a micro-batch, ascending."""
Floats = npt.NDArray[np.float64]


def plan_exact(lengths: LengthArray, profile: Profile) -> Plan:
    """The plan of least predicted time, proven by looking at all.

    Args:
        lengths: (K,) tokens, K at most 8.
        profile: the cost model of at most 8 devices.

    Raises:
        ValueError: more sequences or devices than that.
    """
    began = time.perf_counter()
    if len(lengths) > MOST_SEQUENCES:
        raise ValueError(
            f"num_sequences={len(lengths)} must be at most {MOST_SEQUENCES} for the exact planner; choose another"
        )
    if profile.num_devices > MOST_DEVICES:
        raise ValueError(
            f"num_devices={profile.num_devices} must be at most {MOST_DEVICES} for the exact planner; choose another"
        )
    everything = (1 << len(lengths)) - 1
    parts = _Parts(len(lengths))
    placements = _placements(profile)
    best: Floats = np.full(everything + 1, math.inf)
    how: dict[int, tuple[str | None, Layout, float]] = {}  # what a micro-batch of a set does best
    for policy in (None, *profile.memory.policies):
        seconds = {d: _group_seconds(lengths, profile, d, policy) for d in profile.sp_degrees}
        for layout, least in _by_layout(placements, seconds, parts):
            for held in np.flatnonzero(least < best).tolist():
                best[held], how[held] = least[held], (policy, layout, float(least[held]))

    total = [0.0] + [math.inf] * everything
    first = [0] * (everything + 1)
    for held in range(1, everything + 1):
        for part in parts.of(held):
            cost_s = profile.compute.fixed_s + best[part] + total[held ^ part]
            if cost_s < total[held]:
                total[held], first[held] = float(cost_s), part
    if total[everything] == math.inf:
        return _infeasible(lengths, profile, placements, time.perf_counter() - began)

    micro_batches, left = [], everything
    while left:
        held = first[left]
        micro_batches.append(_micro_batch(held, *how[held], placements, lengths, profile, parts))
        left ^= held
    return Plan(
        num_devices=profile.num_devices,
        micro_batches=tuple(micro_batches),
        planner="exact",
        lengths_sha256=lengths_sha256(lengths),
        status=Status.OPTIMAL,
        predicted_s=total[everything],
        lower_bound_s=total[everything],
        solve_s=time.perf_counter() - began,
    )


class _Parts:
    """All pairs of a non-empty set and a non-empty part of it, grouped by the set."""

    def __init__(self, num_sequences: int) -> None:
        whole: list[int] = []
        part: list[int] = []
        self.begin: list[int] = []
        for held in range(1, 1 << num_sequences):
            self.begin.append(len(whole))
            inside = held
            while inside:
                whole.append(held)
                part.append(inside)
                inside = (inside - 1) & held
        self.part = np.array(part)
        self.rest = np.array(whole) ^ self.part

    def of(self, held: int) -> list[int]:
        end = self.begin[held] if held < len(self.begin) else len(self.part)
        return [int(part) for part in self.part[self.begin[held - 1] : end]]

    def last_group(self, before: Floats, seconds: Floats) -> Floats:
        """(S,) slowest group where one group more, of these seconds by set, takes a part of each set."""
        slowest = np.maximum(before[self.rest], seconds[self.part])
        return np.concatenate(([math.inf], np.minimum.reduceat(slowest, self.begin)))


def _placements(profile: Profile) -> dict[Layout, tuple[tuple[int, int], ...]]:
    """Every multiset of degrees that has a placement, with one: (first rank, degree) of each group."""
    probe = np.ones(1, dtype=np.int64)

    def legal(start: int, degree: int) -> bool:
        group = Group(ranks=tuple(range(start, start + degree)), sequences=(0,))
        plan = Plan(num_devices=profile.num_devices, micro_batches=(MicroBatch(groups=(group,)),))
        return all("bytes a device" in fault for fault in violations(plan, probe, profile))  # memory comes later

    places = [
        [d for d in profile.sp_degrees if start + d <= profile.num_devices and legal(start, d)]
        for start in range(profile.num_devices)
    ]
    found: dict[Layout, tuple[tuple[int, int], ...]] = {}

    def extend(rank: int, groups: tuple[tuple[int, int], ...]) -> None:
        if rank == profile.num_devices:
            found.setdefault(tuple(sorted(degree for _, degree in groups)), groups)
            return
        extend(rank + 1, groups)
        for degree in places[rank]:
            extend(rank + degree, (*groups, (rank, degree)))

    extend(0, ())
    return found


def _group_seconds(lengths: LengthArray, profile: Profile, degree: int, policy: str | None) -> Floats:
    """(S,) seconds of a group of `degree` that holds a set; infinite where it has no room."""
    seconds = np.full(1 << len(lengths), math.inf)
    for held in range(1, 1 << len(lengths)):
        tokens = [int(s) for i, s in enumerate(lengths) if held >> i & 1]
        if profile.fits(degree, sum(tokens), policy):
            seconds[held] = profile.group_s(degree, tokens, policy)
    return seconds


def _by_layout(
    placements: dict[Layout, tuple[tuple[int, int], ...]], seconds: dict[int, Floats], parts: _Parts
) -> Iterator[tuple[Layout, Floats]]:
    """For every multiset of degrees, (S,) the slowest group's least seconds where its groups hold exactly a set."""
    nothing = np.full(len(next(iter(seconds.values()))), math.inf)
    nothing[0] = 0.0
    known: dict[Layout, Floats] = {(): nothing}
    for layout in sorted(placements, key=len):
        if layout:  # without its last group it has a placement too
            known[layout] = parts.last_group(known[layout[:-1]], seconds[layout[-1]])
            yield layout, known[layout]


def _micro_batch(
    held: int,
    policy: str | None,
    layout: Layout,
    slowest_s: float,
    placements: dict[Layout, tuple[tuple[int, int], ...]],
    lengths: LengthArray,
    profile: Profile,
    parts: _Parts,
) -> MicroBatch:
    """The micro-batch that holds a set in `slowest_s`: its groups are found again by search."""

    def divide(left: int, degrees: Layout) -> list[int] | None:
        if not degrees:
            return None if left else []
        for part in parts.of(left) if left else ():
            tokens = [int(s) for i, s in enumerate(lengths) if part >> i & 1]
            if profile.fits(degrees[-1], sum(tokens), policy):
                if profile.group_s(degrees[-1], tokens, policy) <= slowest_s:
                    others = divide(left ^ part, degrees[:-1])
                    if others is not None:
                        return [*others, part]
        return None

    divided = divide(held, layout)
    assert divided is not None
    places = sorted(placements[layout], key=lambda place: place[1])
    groups = []
    for (start, degree), part in zip(places, divided, strict=True):
        members = tuple(i for i in range(len(lengths)) if part >> i & 1)
        groups.append(
            Group(
                ranks=tuple(range(start, start + degree)),
                sequences=members,
                predicted_s=profile.group_s(degree, [int(lengths[i]) for i in members], policy),
            )
        )
    return MicroBatch(
        groups=tuple(sorted(groups, key=lambda group: group.ranks)),
        predicted_s=profile.compute.fixed_s + slowest_s,
        policy=policy,
    )


def _infeasible(
    lengths: LengthArray, profile: Profile, placements: dict[Layout, tuple[tuple[int, int], ...]], solve_s: float
) -> Plan:
    usable = sorted({degree for layout in placements for degree in layout})
    index = int(np.argmax(lengths))
    return Plan(
        num_devices=profile.num_devices,
        micro_batches=(),
        planner="exact",
        lengths_sha256=lengths_sha256(lengths),
        status=Status.INFEASIBLE,
        reason=f"lengths[{index}]={int(lengths[index])} tokens fit into no group of any degree of {usable}; "
        f"drop or split the sequence, allow a higher degree, or give each device more memory",
        solve_s=solve_s,
    )
