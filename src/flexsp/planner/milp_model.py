"""The paper's problem 17-22 for one micro-batch, on CP-SAT.

Letters: Q = buckets, G = candidate groups (every degree as often as it fits on the devices).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexsp.planner.assemble import GroupChoice
from flexsp.planner.placement import most_groups
from flexsp.planner.tables import Ints
from flexsp.plans import Status
from flexsp.profile import Profile

TICK_S = 1e-6
"""CP-SAT counts in integers: one is a microsecond."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """How a micro-batch's MILP ended."""

    status: Status
    groups: list[GroupChoice]
    """Positions in the chunk by group; empty without a solution."""


def solve(
    represented: Ints, profile: Profile, degrees: list[int], time_limit_s: float, warm: list[GroupChoice] | None
) -> Solved:
    """Groups for the sequences of one micro-batch so that the slowest group is fastest.

    Args:
        represented: (n,) lengths (tokens) by which the sequences are represented.
        warm: groups to begin with.

    Raises:
        ValueError: CP-SAT is not installed.
    """
    cp_model = _cp_model()
    lengths, bucket_of = np.unique(represented, return_inverse=True)
    counts = np.bincount(bucket_of)
    candidates = [
        d
        for d in sorted(degrees, reverse=True)
        for _ in range(min(most_groups(d, profile.num_devices, profile.devices_per_node), len(represented)))
    ]
    model = cp_model.CpModel()
    ticks = {d: [_ticks(profile, d, int(s)) for s in lengths] for d in degrees}
    horizon = max(sum(int(n) * t for n, t in zip(counts, row, strict=True)) for row in ticks.values())
    horizon += max(math.ceil(profile.latency_s(d) / TICK_S) for d in degrees)
    slowest = model.new_int_var(0, horizon, "C")
    chosen = [model.new_bool_var(f"m{g}") for g in range(len(candidates))]
    held: list[dict[int, Any]] = []
    for g, d in enumerate(candidates):
        capacity = profile.capacity_tokens(d)
        # (21), (22): whole numbers of sequences, and only where one of the bucket fits at all.
        held.append({
            q: model.new_int_var(0, min(int(counts[q]), capacity // int(s)), f"A{q},{g}")
            for q, s in enumerate(lengths)
            if s <= capacity
        })  # fmt: skip
        latency = math.ceil(profile.latency_s(d) / TICK_S)
        # (18): every chosen group ends by C.
        load = sum(ticks[d][q] * n for q, n in held[g].items())
        model.add(load + latency * chosen[g] <= slowest)
        # (19): it fits its memory, and holds nothing where it is not chosen.
        model.add(sum(int(lengths[q]) * n for q, n in held[g].items()) <= capacity * chosen[g])
        # Symmetry: of equal groups the ones in front are chosen, and hold no fewer tokens.
        if g and candidates[g - 1] == d:
            model.add_implication(chosen[g], chosen[g - 1])
            model.add(
                sum(int(lengths[q]) * n for q, n in held[g - 1].items())
                >= sum(int(lengths[q]) * n for q, n in held[g].items())
            )
    # (20): the groups fit on the devices.
    model.add(sum(d * m for d, m in zip(candidates, chosen, strict=True)) <= profile.num_devices)
    # Every sequence is in one group.
    for q, count in enumerate(counts):
        model.add(sum(row[q] for row in held if q in row) == int(count))
    # Area: the devices' time must hold every sequence's device-seconds, at its cheapest or where it is put.
    used = sum(d * ticks[d][q] * n for d, row in zip(candidates, held, strict=True) for q, n in row.items())
    model.add(used <= profile.num_devices * slowest)
    model.minimize(slowest)
    if warm is not None:
        _hint(model, warm, candidates, chosen, held, bucket_of)

    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = time_limit_s
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    solver.parameters.symmetry_level = 0  # the cuts above break the symmetry there is, and finding it takes seconds
    solver.parameters.cp_model_probing_level = 0
    found = solver.solve(model)
    status = {
        cp_model.OPTIMAL: Status.OPTIMAL,
        cp_model.FEASIBLE: Status.FEASIBLE,
        cp_model.INFEASIBLE: Status.INFEASIBLE,
    }.get(found, Status.UNKNOWN)
    if status not in (Status.OPTIMAL, Status.FEASIBLE):
        return Solved(status=status, groups=[])
    return Solved(status=status, groups=_groups(candidates, held, bucket_of, solver.value))


def _cp_model() -> Any:
    try:
        from ortools.sat.python import cp_model
    except ImportError:
        raise ValueError(
            "planner='milp' needs ortools, which is not installed; pip install flexsp[milp], or choose another planner"
        ) from None
    return cp_model


def _ticks(profile: Profile, degree: int, tokens: int) -> int:
    """A sequence's time in a group of `degree`, latency apart, rounded up."""
    return math.ceil((profile.group_s(degree, [tokens]) - profile.latency_s(degree)) / TICK_S)


def _hint(
    model: Any, warm: list[GroupChoice], candidates: list[int], chosen: list[Any], held: list[dict[int, Any]],
    bucket_of: Ints,
) -> None:  # fmt: skip
    """Begins with the groups of `warm`; of equal degree, those that hold more first, as the symmetry cuts want it."""
    free: dict[int, list[int]] = {}
    for g, d in enumerate(candidates):
        free.setdefault(d, []).append(g)
    members_of: dict[int, list[int]] = {g: [] for g in range(len(candidates))}
    for degree, members in warm:
        members_of[free[degree].pop(0)] = members
    for g, members in members_of.items():
        model.add_hint(chosen[g], bool(members))
        numbers = np.bincount(bucket_of[members], minlength=int(bucket_of.max()) + 1) if members else None
        for q, variable in held[g].items():
            model.add_hint(variable, 0 if numbers is None else int(numbers[q]))


def _groups(
    candidates: list[int], held: list[dict[int, Any]], bucket_of: Ints, value: Callable[[Any], int]
) -> list[GroupChoice]:
    """The solver's numbers as positions: any sequences of a bucket will do."""
    waiting = {q: np.flatnonzero(bucket_of == q).tolist() for q in range(int(bucket_of.max()) + 1)}
    groups: list[GroupChoice] = []
    for degree, row in zip(candidates, held, strict=True):
        members = [waiting[q].pop() for q, variable in row.items() for _ in range(value(variable))]
        if members:
            groups.append((degree, members))
    return groups
