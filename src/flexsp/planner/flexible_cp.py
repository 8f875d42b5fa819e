"""Flexible context parallelism: best-fit packing, then degrees by dynamic programming, written anew.

Source: arXiv 2602.21788 (v1, February 2026: "DHP: ... Dynamic Hybrid Parallelism"; v2, June 2026: "Efficient Scaling of
LLM Training with Flexible Context Parallelism"). From it: any integer is a degree, not powers of two alone; two stages,

1. memory-aware packing: sequences, longest first, go where the least room is left after them, else open an *atomic
   group* of the least degree that holds them, whose memory the shorter ones then fill;
2. dynamic programming over (atomic groups so far, ranks so far): the degree of each group that makes the slowest of a
   micro-batch least, O(G N^2) for G groups and N ranks;

and a fitted cost model of the same terms as ours. Our reading, where we found nothing: which atomic groups run in one
micro-batch (`_cuts`), that ranks may stay idle, and what holds where groups of the best degrees find no place.
docs/peers.md says more.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left, insort
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from flexsp.lengths import LengthArray
from flexsp.planner.assemble import GroupChoice, assemble, infeasible, too_long
from flexsp.planner.degrees import usable_degrees
from flexsp.planner.placement import place
from flexsp.planner.room import Room
from flexsp.plans import Plan
from flexsp.profile import FloatArray, Profile

NAME = "flexible-cp"
AtomicGroup = tuple[int, list[int]]
"""The least degree, and the sequences."""


def plan_flexible_cp(lengths: LengthArray, profile: Profile) -> Plan:
    """Packs the batch into atomic groups, cuts these into micro-batches, and chooses degrees in each.

    Args:
        lengths: (K,) tokens.
        profile: the cost model; degrees are those that it lists.
    """
    began = time.perf_counter()
    degrees = usable_degrees(profile)
    if reason := too_long(lengths, profile, degrees):
        return infeasible(NAME, lengths, profile, reason, time.perf_counter() - began)
    atomic = pack(lengths, profile, degrees)
    seconds = group_seconds(atomic, lengths, profile, degrees)
    order = sorted(range(len(atomic)), key=lambda g: -seconds[g, degrees.index(atomic[g][0])])
    best_s, best = math.inf, []
    for cut in _cuts([atomic[g][0] for g in order], profile, degrees):
        runs = [[order[at] for at in run] for run in cut]
        chosen = [_assigned(run, atomic, seconds, profile, degrees) for run in runs]
        total_s = sum(profile.compute.fixed_s + slowest_s for slowest_s, _ in chosen)
        if total_s < best_s:
            best_s, best = total_s, [groups for _, groups in chosen]
    return assemble(NAME, lengths, profile, best, time.perf_counter() - began)


# ---- stage 1


def pack(lengths: LengthArray, profile: Profile, degrees: Sequence[int]) -> list[AtomicGroup]:
    """Best-fit decreasing into groups of the least degree that holds the longest of each; memory is the size."""
    tokens: list[int] = lengths.tolist()
    capacity = {d: profile.capacity_tokens(d) for d in degrees}
    atomic: list[AtomicGroup] = []
    rooms: list[tuple[int, int]] = []  # (tokens still taken, group), ascending
    for i in np.argsort(-lengths, kind="stable").tolist():
        at = bisect_left(rooms, (tokens[i], -1))
        if at == len(rooms):
            degree = next(d for d in degrees if capacity[d] >= tokens[i])
            atomic.append((degree, [i]))
            insort(rooms, (capacity[degree] - tokens[i], len(atomic) - 1))
        else:
            room, group = rooms.pop(at)
            atomic[group][1].append(i)
            insort(rooms, (room - tokens[i], group))
    return atomic


def group_seconds(
    atomic: Sequence[AtomicGroup], lengths: LengthArray, profile: Profile, degrees: Sequence[int]
) -> FloatArray:
    """(G, D) seconds of each atomic group at each degree, by the profile."""
    held = [lengths[sequences].astype(np.float64) for _, sequences in atomic]
    compute = profile.compute
    work_s = np.array([((compute.quadratic_s * s + compute.linear_s) * s).sum() for s in held])
    tokens = np.array([s.sum() for s in held])
    columns = [work_s / d + tokens * profile.exchange_s_per_token(d) + profile.latency_s(d) for d in degrees]
    return np.stack(columns, axis=1)


# ---- micro-batches


def _cuts(least: Sequence[int], profile: Profile, degrees: list[int]) -> list[list[list[int]]]:
    """Two ways to cut a row of atomic groups into micro-batches of which each has a place at the least degrees.

    Each micro-batch is filled before the next is begun; or as many get about equal shares of the ranks needed.

    Args:
        least: (G,) least degree of each group, in the order of the row.

    Returns:
        Places in the row, micro-batch by micro-batch.
    """
    full = _cut(least, profile, degrees, math.inf)
    even = _cut(least, profile, degrees, share=sum(least) / len(full))
    return [full] if even == full else [full, even]


def _cut(least: Sequence[int], profile: Profile, degrees: list[int], share: float) -> list[list[int]]:
    """A micro-batch ends where the next group has no place, or more than half of it were beyond its share of ranks."""
    runs: list[list[int]] = []
    room, before = Room(profile, degrees), 0
    for at, degree in enumerate(least):
        if not runs or not room.takes(degree) or before + degree / 2 > share * len(runs):
            runs.append([])
            room = Room(profile, degrees)
        room.add(degree)
        runs[-1].append(at)
        before += degree
    return runs


# ---- stage 2


def _assigned(
    run: Sequence[int], atomic: Sequence[AtomicGroup], seconds: FloatArray, profile: Profile, degrees: Sequence[int]
) -> tuple[float, list[GroupChoice]]:
    """Seconds of the slowest group, and the groups of one micro-batch with the degrees chosen for them."""
    least = [degrees.index(atomic[g][0]) for g in run]
    slowest_s, chosen = choose_degrees(seconds[list(run)], least, profile, degrees)
    return slowest_s, [(degree, atomic[g][1]) for g, degree in zip(run, chosen, strict=True)]


def choose_degrees(
    seconds: FloatArray, least: Sequence[int], profile: Profile, degrees: Sequence[int]
) -> tuple[float, list[int]]:
    """The degrees that make the slowest group least, by dynamic programming over groups and ranks beyond the least.

    Of equals the fewest ranks are taken. Where groups of these degrees find no place (possible on nodes or with degrees
    that are no powers of two) the next best number of ranks is tried; the least degrees always find one.

    Args:
        seconds: (G, D) of each group at each degree, ascending.
        least: (G,) number of each group's least degree; those have a place.

    Returns:
        Seconds of the slowest, and the degree of each group.
    """
    spare = profile.num_devices - sum(degrees[k] for k in least)
    table = np.zeros(spare + 1)  # [j]: the slowest of the groups so far, on at most j ranks beyond their least degrees
    choice = np.zeros((len(least), spare + 1), dtype=np.int64)
    for g, lowest in enumerate(least):
        after = np.full(spare + 1, math.inf)
        for k in range(lowest, len(degrees)):
            more = degrees[k] - degrees[lowest]
            if more > spare:
                break
            slowest = np.maximum(table[: spare + 1 - more], seconds[g, k])
            better = slowest < after[more:]
            after[more:][better] = slowest[better]
            choice[g, more:][better] = k
        table = after
    for j in np.argsort(table, kind="stable").tolist():
        chosen = _traced(choice, least, degrees, j)
        if place(chosen, profile.num_devices, profile.devices_per_node) is not None:
            return float(table[j]), chosen
    raise AssertionError("the least degrees of a micro-batch have no place")


def _traced(choice: npt.NDArray[np.int64], least: Sequence[int], degrees: Sequence[int], spare: int) -> list[int]:
    """The degrees behind an entry of the table, from the last group back to the first."""
    chosen = []
    for g in reversed(range(len(least))):
        degree = degrees[int(choice[g, spare])]
        chosen.append(degree)
        spare -= degree - degrees[least[g]]
    return chosen[::-1]
