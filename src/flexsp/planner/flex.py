"""The default planner: groups of different degrees in every micro-batch.

1. Sort the sequences by length, longest first, so that sequences of like length meet in a micro-batch.
2. For several counts of micro-batches, from the fewest that memory allows: cut the sorted row into that many pieces of
   balanced tokens.
3. For each piece, find degrees by local search: start from every single degree, split one group or merge two or more
   while that helps. A layout is judged by assigning the sequences, longest first, each to the group that would end
   first with it and has the memory.
4. Keep the count whose micro-batches take the least time together.

Cost: O(counts * layouts tried * K * log N) for K sequences and N devices.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Iterator

import numpy as np

from flexsp.lengths import LengthArray
from flexsp.planner.assemble import GroupChoice, assemble, infeasible, too_long, usable_degrees
from flexsp.planner.placement import most_groups, place
from flexsp.plans import Plan
from flexsp.profile import Profile

EXTRA_COUNTS = 4
"""How many counts of micro-batches are tried beyond the least that works."""

Layout = tuple[int, ...]
"""Degrees of the groups of one micro-batch, descending."""


def plan_flex(lengths: LengthArray, profile: Profile) -> Plan:
    """Mixed degrees by local search; deterministic.

    Args:
        lengths: (K,) tokens.
        profile: the cost model.
    """
    began = time.perf_counter()
    degrees = usable_degrees(profile)
    if reason := too_long(lengths, profile, degrees):
        return infeasible("flex", lengths, profile, reason, time.perf_counter() - began)
    costs = _Costs(lengths, profile, degrees)
    order = np.argsort(-lengths, kind="stable")
    most_tokens = max(d * most_groups(d, profile.num_devices, profile.devices_per_node) for d in degrees)
    fewest = max(1, math.ceil(int(lengths.sum()) / profile.capacity_tokens(1) / most_tokens))

    best_s, best = math.inf, None
    tried_with_success = 0
    for count in range(fewest, len(order) + 1):
        total_s, micro_batches = 0.0, []
        for piece in _balanced_pieces(order, lengths, count):
            piece_s, groups = _best_layout(piece, costs)
            total_s += profile.compute.fixed_s + piece_s
            micro_batches.append(groups)
            if total_s >= best_s:
                break
        else:
            best_s, best = total_s, micro_batches
        tried_with_success += math.isfinite(best_s)
        if tried_with_success > EXTRA_COUNTS:
            break
    assert best is not None  # one sequence a micro-batch always fits, too_long having passed
    return assemble("flex", lengths, profile, best, time.perf_counter() - began)


class _Costs:
    """Seconds and room of every sequence at every degree, looked up in the inner loop."""

    def __init__(self, lengths: LengthArray, profile: Profile, degrees: list[int]) -> None:
        self.profile = profile
        self.degrees = degrees
        self.tokens: list[int] = lengths.tolist()
        self.capacity = {d: profile.capacity_tokens(d) for d in degrees}
        self.latency_s = {d: profile.latency_s(d) for d in degrees}
        work_s = [profile.sequence_work_s(s) for s in self.tokens]
        self.seconds = {
            d: [w / d + s * profile.exchange_s_per_token(d) for w, s in zip(work_s, self.tokens, strict=True)]
            for d in degrees
        }


def _balanced_pieces(order: np.ndarray, lengths: LengthArray, count: int) -> list[list[int]]:
    """The sorted sequences cut into `count` non-empty runs of about equal tokens."""
    ends = np.cumsum(lengths[order])
    cuts = [0]
    for k in range(1, count):
        cut = int(np.searchsorted(ends, ends[-1] * k / count, side="left")) + 1
        cuts.append(min(max(cut, cuts[-1] + 1), len(order) - (count - k)))
    return [order[a:b].tolist() for a, b in zip(cuts, [*cuts[1:], len(order)], strict=True)]


def _best_layout(piece: list[int], costs: _Costs) -> tuple[float, list[GroupChoice]]:
    """The best groups that local search finds for one micro-batch; infinite seconds where none hold it."""
    profile = costs.profile
    seen: dict[Layout, float] = {}
    best_s, best = math.inf, []

    def judge(layout: Layout) -> float:
        nonlocal best_s, best
        if layout not in seen:
            placed = place(layout, profile.num_devices, profile.devices_per_node) is not None
            seconds, groups = _assign(piece, layout, costs) if placed else (math.inf, [])
            seen[layout] = seconds
            if seconds < best_s:
                best_s, best = seconds, groups
        return seen[layout]

    longest = costs.tokens[piece[0]]
    for degree in costs.degrees:
        at_once = most_groups(degree, profile.num_devices, profile.devices_per_node)
        layout = (degree,) * at_once
        if costs.capacity[degree] < longest:  # the longest needs one group of its own degree
            need = next(d for d in costs.degrees if costs.capacity[d] >= longest)
            layout = (need,) + (degree,) * ((profile.num_devices - need) // degree)
        current_s = judge(layout)
        while True:
            steps = [(judge(other), other) for other in _neighbours(layout, costs.degrees, profile.num_devices)]
            nearest_s, nearest = min(steps, default=(math.inf, layout))
            if nearest_s >= current_s:
                break
            current_s, layout = nearest_s, nearest
    return best_s, best


def _neighbours(layout: Layout, degrees: list[int], num_devices: int) -> Iterator[Layout]:
    """Layouts one step away: a group split into smaller ones, or small ones merged into a larger one."""
    counts = {d: layout.count(d) for d in degrees}
    free = num_devices - sum(layout)
    for large in degrees:
        for small in degrees:
            if small >= large:
                break
            if counts[large]:
                yield _changed(counts, {large: -1, small: (large + free) // small})
            needed = max(0, -(-(large - free) // small))
            if needed <= counts[small]:
                yield _changed(counts, {small: -needed, large: 1})


def _changed(counts: dict[int, int], change: dict[int, int]) -> Layout:
    return tuple(d for d in sorted(counts, reverse=True) for _ in range(counts[d] + change.get(d, 0)))


def _assign(piece: list[int], layout: Layout, costs: _Costs) -> tuple[float, list[GroupChoice]]:
    """Longest first, each sequence to the group that would end first with it; infinite seconds where one has no room.

    One heap of (busy seconds, group) per degree: only the least busy group of each degree can be the answer, the next
    ones only while those before them are full.
    """
    held: list[list[int]] = [[] for _ in layout]
    rooms = [costs.capacity[d] for d in layout]
    heaps: dict[int, list[tuple[float, int]]] = {}
    for g, d in enumerate(layout):
        heaps.setdefault(d, []).append((costs.latency_s[d], g))
    slowest_s = 0.0
    for i in piece:
        best: tuple[float, int, int] | None = None  # end in seconds, degree, group
        for d, heap in heaps.items():
            group = _least_busy_with_room(heap, rooms, costs.tokens[i])
            if group is not None and (best is None or group[0] + costs.seconds[d][i] < best[0]):
                best = group[0] + costs.seconds[d][i], d, group[1]
        if best is None:
            return math.inf, []
        end_s, degree, g = best
        _update(heaps[degree], g, end_s)
        held[g].append(i)
        rooms[g] -= costs.tokens[i]
        slowest_s = max(slowest_s, end_s)
    return slowest_s, [(d, sequences) for d, sequences in zip(layout, held, strict=True) if sequences]


def _least_busy_with_room(heap: list[tuple[float, int]], rooms: list[int], tokens: int) -> tuple[float, int] | None:
    """The (busy seconds, group) of least seconds whose group has room for `tokens`."""
    if rooms[heap[0][1]] >= tokens:
        return heap[0]
    return min((entry for entry in heap if rooms[entry[1]] >= tokens), default=None)


def _update(heap: list[tuple[float, int]], group: int, busy_s: float) -> None:
    """Sets what `group` is busy for."""
    if heap[0][1] == group:
        heapq.heapreplace(heap, (busy_s, group))
        return
    at = next(k for k, entry in enumerate(heap) if entry[1] == group)
    heap[at] = (busy_s, group)
    heapq.heapify(heap)
