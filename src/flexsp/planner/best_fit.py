"""Packing for one degree: best fit, then spread over the groups that a micro-batch has anyway."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort

import numpy as np

from flexsp.lengths import LengthArray
from flexsp.planner.assemble import GroupChoice
from flexsp.planner.placement import most_groups
from flexsp.profile import Profile


def pack_one_degree(lengths: LengthArray, profile: Profile, degree: int) -> tuple[float, list[list[GroupChoice]]]:
    """Micro-batches in which every group has the same `degree`; every length must fit one group.

    Best-fit decreasing finds how few groups, and so how few micro-batches, are needed. Those micro-batches have room
    for more groups than best fit filled, so the sequences are also spread, longest first to the least busy group; the
    faster of the two is kept. Groups of similar time share a micro-batch.

    Returns:
        Predicted seconds, and the micro-batches.
    """
    capacity = profile.capacity_tokens(degree)
    at_once = most_groups(degree, profile.num_devices, profile.devices_per_node)
    order = np.argsort(-lengths, kind="stable").tolist()
    tokens: list[int] = lengths.tolist()
    exchange_s = profile.exchange_s_per_token(degree)
    seconds = [profile.sequence_work_s(s) / degree + s * exchange_s for s in tokens]

    packed = _best_fit(order, tokens, capacity)
    micro_batches = -(-len(packed) // at_once)
    spread = _spread(order, tokens, seconds, capacity, micro_batches * at_once)

    best: tuple[float, list[list[GroupChoice]]] | None = None
    for bins in (packed, spread):
        if bins is None:
            continue
        bins = sorted(bins, key=lambda held: -sum(seconds[i] for i in held))
        rounds = [bins[at : at + at_once] for at in range(0, len(bins), at_once)]
        total_s = sum(
            profile.compute.fixed_s + profile.latency_s(degree) + sum(seconds[i] for i in held[0]) for held in rounds
        )
        if best is None or total_s < best[0]:
            best = total_s, [[(degree, held) for held in held_at_once] for held_at_once in rounds]
    assert best is not None
    return best


def least_one_degree_s(lengths: LengthArray, profile: Profile, degree: int) -> float:
    """A lower bound on what `pack_one_degree` reaches, without packing: all groups as busy as each other, all full."""
    at_once = most_groups(degree, profile.num_devices, profile.devices_per_node)
    tokens = lengths.astype(np.float64)
    work_s = (profile.compute.quadratic_s * tokens + profile.compute.linear_s) * tokens / degree
    seconds = float(work_s.sum() + tokens.sum() * profile.exchange_s_per_token(degree)) / at_once
    fewest = -(-int(lengths.sum()) // (profile.capacity_tokens(degree) * at_once))
    return seconds + fewest * (profile.compute.fixed_s + profile.latency_s(degree))


def _best_fit(order: list[int], tokens: list[int], capacity: int) -> list[list[int]]:
    """Bins of sequences; each sequence goes where the least room is left after it."""
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (room, bin), ascending
    for i in order:
        at = bisect_left(rooms, (tokens[i], -1))
        if at == len(rooms):
            bins.append([i])
            insort(rooms, (capacity - tokens[i], len(bins) - 1))
        else:
            room, b = rooms.pop(at)
            bins[b].append(i)
            insort(rooms, (room - tokens[i], b))
    return bins


def _spread(
    order: list[int], tokens: list[int], seconds: list[float], capacity: int, num_bins: int
) -> list[list[int]] | None:
    """`num_bins` bins (empty ones left out), each sequence to the least busy that has room; None where none has.

    Sequences only get shorter, so a bin without room waits until one comes that fits, and is not looked at before.
    """
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    rooms = [capacity] * num_bins
    busy = [(0.0, b) for b in range(num_bins)]
    waiting: list[tuple[int, float, int]] = []  # (-room, seconds, bin), the most room first
    for i in order:
        while waiting and -waiting[0][0] >= tokens[i]:
            _, busy_s, b = heapq.heappop(waiting)
            heapq.heappush(busy, (busy_s, b))
        while busy and rooms[busy[0][1]] < tokens[i]:
            busy_s, b = heapq.heappop(busy)
            heapq.heappush(waiting, (-rooms[b], busy_s, b))
        if not busy:
            return None
        busy_s, b = busy[0]
        heapq.heapreplace(busy, (busy_s + seconds[i], b))
        bins[b].append(i)
        rooms[b] -= tokens[i]
    return [held for held in bins if held]
