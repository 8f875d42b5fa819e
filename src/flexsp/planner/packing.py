"""Fills one micro-batch: which sequences fit into it within a given time, and in which groups.

A group takes a sequence where its memory has room and it still ends within the target. Both are monotone in the
sequence's length, so one number says what a group takes: the longest sequence that still fits, its *room*. The rooms
of all groups of one degree are the leaves of a tree of maxima, in which the first group with enough room is found in
O(log N). Sequences come longest first; each goes, in this order of preference,

1. into the first group with room among those of its own degree, the cheapest in device-seconds that meets the target,
2. into a new group of that degree,
3. into the first group with room of any other degree: a gap that would idle otherwise,
4. into a new group of any other degree that meets the target.

How a micro-batch is filled is its *mode*: a policy, and either the least degree that groups are opened with (with more
devices than work, a group larger than the cheapest is worth its price) or a layout, groups that are open from the start
and to which none are added.

What fits nowhere stays in the pool for another micro-batch. Cost: O(n (D + log N)) for n sequences and D degrees.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from flexsp.planner.jit import inlined, kernel
from flexsp.planner.tables import Floats, Ints, Tables

SLACK = 1e-12
"""Relative rounding that a target forgives: the group that set it must meet it again."""


class Space(NamedTuple):
    """What `fill` writes: the groups of the micro-batch filled last, those of degree k from number first[k] on."""

    first: Ints
    """(D,) the first group's number by degree."""
    opened: Ints
    """(D,) how many groups are open."""
    leaves: Ints
    """(D,) leaves of the degree's tree, a power of two."""
    root: Ints
    """(D,) where the degree's tree begins in `rooms`; node v of it is at root + v, the root itself is v = 1."""
    rooms: Ints
    """Trees of maxima over the rooms (tokens) of open groups; 0 where none is open."""
    load_s: Floats
    """(G,) seconds by group."""
    held: Ints
    """(G,) tokens by group."""
    start: Ints
    """(G,) first rank by group, where `Tables.by_count` does not hold."""
    limit: Ints
    """(D,) the longest sequence that an empty group takes."""
    free: Ints
    """(N,) 1 where a rank is in no group."""
    cursor: Ints
    """(D,) legal starts before this one are taken."""


def space_for(t: Tables) -> Space:
    """Room for the groups of one micro-batch."""
    leaves = np.array([1 << max(0, int(n - 1).bit_length()) for n in t.at_once], dtype=np.int64)
    groups = int(t.at_once.sum())
    return Space(
        first=np.concatenate(([0], np.cumsum(t.at_once)[:-1])).astype(np.int64),
        opened=np.zeros(len(t.degrees), dtype=np.int64),
        leaves=leaves,
        root=np.concatenate(([0], np.cumsum(2 * leaves)[:-1])).astype(np.int64),
        rooms=np.zeros(int(2 * leaves.sum()), dtype=np.int64),
        load_s=np.zeros(groups),
        held=np.zeros(groups, dtype=np.int64),
        start=np.full(groups, -1, dtype=np.int64),
        limit=np.zeros(len(t.degrees), dtype=np.int64),
        free=np.ones(t.num_devices, dtype=np.int64),
        cursor=np.zeros(len(t.degrees), dtype=np.int64),
    )


@inlined
def longest_within(t: Tables, seconds: float, k: int, p: int) -> int:
    """The longest sequence (tokens) that degree number k computes and exchanges within `seconds`, latency apart."""
    if seconds <= 0.0:
        return 0
    a = t.factor[p] * t.quadratic_s / t.degrees[k]
    b = t.factor[p] * t.linear_s / t.degrees[k] + t.exchange_s[k]
    root = b + math.sqrt(b * b + 4.0 * a * seconds)
    if root * 4e18 <= 2.0 * seconds:
        return 4_000_000_000_000_000_000
    return int(2.0 * seconds / root)


@inlined
def sequence_s(t: Tables, i: int, k: int, p: int) -> float:
    """Seconds of sequence i in a group of degree number k, latency apart."""
    return float(t.factor[p] * t.work_s[i] / t.degrees[k] + t.tokens[i] * t.exchange_s[k])


@kernel
def _next_start(t: Tables, space: Space, k: int) -> int:
    """The first free legal place for a group of degree number k, or -1; `place` in placement.py is its plain form."""
    degree, per_node = t.degrees[k], t.devices_per_node
    power_of_two = degree & (degree - 1) == 0
    at = space.cursor[k]
    while at + degree <= t.num_devices:
        if degree > per_node:
            legal = at % per_node == 0 and not (power_of_two and at % degree)
        else:
            place = at % per_node
            legal = place + degree <= per_node and not (power_of_two and place % degree)
        if legal:
            taken = -1
            for r in range(at, at + degree):
                if space.free[r] == 0:
                    taken = r
            if taken < 0:
                space.cursor[k] = at
                return int(at)
        at += 1
    space.cursor[k] = at
    return -1


@kernel
def _open(t: Tables, space: Space, k: int, used: int) -> int:
    """Opens a group of degree number k; its number, or -1 where no ranks are left for it."""
    degree = t.degrees[k]
    if used + degree > t.num_devices or space.opened[k] == t.at_once[k]:
        return -1
    g = space.first[k] + space.opened[k]
    if not t.by_count:
        start = _next_start(t, space, k)
        if start < 0:
            return -1
        space.start[g] = start
        space.free[start : start + degree] = 0
    space.opened[k] += 1
    space.load_s[g] = t.latency_s[k]
    space.held[g] = 0
    return int(g)


@inlined
def _first_with_room(space: Space, k: int, tokens: int) -> int:
    """The first open group of degree number k that takes a sequence of `tokens`; there is one."""
    root, v = space.root[k], 1
    while v < space.leaves[k]:
        v *= 2
        if space.rooms[root + v] < tokens:
            v += 1
    return int(space.first[k] + v - space.leaves[k])


@inlined
def _set_room(space: Space, k: int, g: int, room: int) -> None:
    root = space.root[k]
    v = space.leaves[k] + g - space.first[k]
    space.rooms[root + v] = room
    while v > 1:
        v //= 2
        larger = max(space.rooms[root + 2 * v], space.rooms[root + 2 * v + 1])
        if space.rooms[root + v] == larger:
            break
        space.rooms[root + v] = larger


@kernel
def _full(t: Tables, space: Space, used: int, tokens: int) -> bool:
    """Whether no sequence of `tokens` or more can find a place any more."""
    if used + t.degrees[0] <= t.num_devices:
        return False
    for k in range(len(t.degrees)):
        if space.rooms[space.root[k] + 1] >= tokens:
            return False
    return True


@kernel
def fill(t: Tables, space: Space, pool: Ints, n: int, target_s: float, mode: int, where: Ints) -> tuple[int, float]:
    """Fills a micro-batch with what fits of the pool within `target_s` (fixed cost apart).

    Args:
        mode: policy number * (D + L) + number of the least degree to open, or D + number of the layout.
        pool: (>= n,) the first n are the sequences to choose from, in the order of choosing, best longest first.
        where: (>= n,) written: the group's number in `space` of each, -1 where it stays in the pool.

    Returns:
        How many stay in the pool, and the seconds of the slowest group.
    """
    target_s = target_s * (1.0 + SLACK)
    num_degrees = len(t.degrees)
    p, manner = divmod(mode, num_degrees + len(t.layouts))
    least_k = manner if manner < num_degrees else 0
    space.rooms[:] = 0
    space.opened[:] = 0
    if not t.by_count:
        space.free[:] = 1
        space.cursor[:] = 0
    for k in range(num_degrees):
        space.limit[k] = min(t.capacity[p, k], longest_within(t, target_s - t.latency_s[k], k, p))
    shortest = t.tokens[pool[:n].max()]
    used, left, slowest_s = 0, 0, 0.0
    if manner >= num_degrees:
        for k in range(num_degrees - 1, -1, -1):
            for _ in range(t.layouts[manner - num_degrees, k]):
                g = _open(t, space, k, used)
                if g >= 0:
                    used += t.degrees[k]
                    _set_room(space, k, g, space.limit[k])
        used = t.num_devices  # none are added
    for j in range(n):
        i = pool[j]
        tokens = t.tokens[i]
        own, least = -1, math.inf
        for k in range(least_k, num_degrees):
            if space.limit[k] >= tokens:
                device_s = t.degrees[k] * (tokens * t.exchange_s[k] + t.latency_s[k])
                if device_s < least:
                    own, least = k, device_s
        g, k = -1, own
        if own >= 0:
            if space.rooms[space.root[own] + 1] >= tokens:
                g = _first_with_room(space, own, tokens)
            else:
                g = _open(t, space, own, used)
                if g >= 0:
                    used += t.degrees[own]
        if g < 0:
            for other in range(num_degrees):
                if space.rooms[space.root[other] + 1] >= tokens:
                    g, k = _first_with_room(space, other, tokens), other
                    break
        if g < 0 and used + t.degrees[0] <= t.num_devices:
            for other in range(num_degrees):
                if other != own and space.limit[other] >= tokens:
                    g = _open(t, space, other, used)
                    if g >= 0:
                        k = other
                        used += t.degrees[other]
                        break
        where[j] = g
        if g < 0:
            left += 1
            if _full(t, space, used, shortest):
                where[j:n] = -1
                return left + n - 1 - j, slowest_s
            continue
        space.load_s[g] += sequence_s(t, i, k, p)
        space.held[g] += tokens
        slowest_s = max(slowest_s, space.load_s[g])
        room = min(t.capacity[p, k] - space.held[g], longest_within(t, target_s - space.load_s[g], k, p))
        _set_room(space, k, g, max(room, 0))
    return left, slowest_s


@kernel
def best_alone_s(t: Tables, i: int, p: int) -> float:
    """Seconds of sequence i alone at the degree that is fastest for it; infinite where it fits none."""
    best_s = math.inf
    for k in range(len(t.degrees)):
        if t.tokens[i] <= t.capacity[p, k]:
            best_s = min(best_s, sequence_s(t, i, k, p) + t.latency_s[k])
    return best_s


@kernel
def fit_all(
    t: Tables, space: Space, pool: Ints, n: int, mode: int, high_s: float, steps: int, where: Ints
) -> tuple[float, float]:
    """The least target found, by at most |steps| bisections below `high_s`, within which the whole pool fits.

    Args:
        steps: where negative, targets below high_s are tried too if the pool does not fit within it: a longer target
            opens smaller groups, so it may hold less.

    Returns:
        Seconds of the slowest group, and the target at which `fill` reaches them; infinite where the pool was not made
        to fit. `where` and `space` are those of some target, not of the best: fill again.
    """
    tokens, area_s = 0, 0.0
    for j in range(n):
        tokens += t.tokens[pool[j]]
        area_s += t.area_s[pool[j]]
    p = mode // (len(t.degrees) + len(t.layouts))
    low_s = max(best_alone_s(t, pool[:n].min(), p), area_s / t.num_devices)
    if tokens > t.room_tokens[p] or low_s > high_s * (1.0 + SLACK):
        return math.inf, high_s
    target_s, best_s, left = high_s, math.inf, n
    for probe in range(1 if steps > 0 else 4):
        target_s = high_s if probe == 0 else low_s * (high_s / low_s) ** (1.0 - probe / 3.0)
        left, best_s = fill(t, space, pool, n, target_s, mode, where)
        if left == 0 or low_s <= 0.0:
            break
    if left > 0:
        return math.inf, high_s
    for _ in range(abs(steps)):
        if best_s <= low_s * (1.0 + 1e-3):
            break
        middle_s = 0.5 * (low_s + best_s)
        left, slowest_s = fill(t, space, pool, n, middle_s, mode, where)
        if left > 0:
            low_s = middle_s
        elif slowest_s < best_s:
            best_s, target_s = slowest_s, middle_s
        else:
            break
    return best_s, target_s
