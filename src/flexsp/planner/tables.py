"""One batch and one profile as flat arrays, which is what the kernels of `flex` and of the bound read.

Letters: K = sequences, D = usable degrees, P = policies, the plain one first.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from flexsp.lengths import LengthArray
from flexsp.planner.placement import most_groups
from flexsp.profile import Profile

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class Tables(NamedTuple):
    """A batch, longest sequence first, under a profile. A named tuple of arrays, because numba compiles those."""

    tokens: Ints
    """(K,) lengths, descending."""
    work_s: Floats
    """(K,) seconds of compute on one device, without any policy's factor."""
    quadratic_s: float
    linear_s: float
    fixed_s: float
    num_devices: int
    devices_per_node: int
    degrees: Ints
    """(D,) ascending."""
    exchange_s: Floats
    """(D,) seconds of exchange per token of a group."""
    latency_s: Floats
    """(D,) seconds of exchange whatever a group holds."""
    capacity: Ints
    """(P, D) the most tokens of a group."""
    factor: Floats
    """(P,) compute_factor."""
    area_s: Floats
    """(K,) least device-seconds, over degrees and policies that hold the sequence; its share of latencies apart."""
    room_tokens: Floats
    """(P,) the most tokens of a micro-batch, all devices together."""
    at_once: Ints
    """(D,) how many groups of one degree a micro-batch can have."""
    layouts: Ints
    """(L, D) groups of each degree: layouts worth trying as such, where there are few; each has a placement."""
    by_count: bool
    """Whether degrees have a placement exactly where their sum is at most num_devices."""


def policy_names(profile: Profile) -> list[str | None]:
    """The policies in the order of P."""
    return [None, *profile.memory.policies]


def sorted_order(lengths: LengthArray) -> Ints:
    """(K,) indices of the sequences, longest first, ties by index."""
    return np.argsort(-lengths, kind="stable")


def tables(
    lengths: LengthArray, profile: Profile, degrees: list[int], layouts: list[tuple[int, ...]] | None = None
) -> Tables:
    """`lengths` (tokens, any order) and `profile` as arrays; `degrees` are the usable ones, ascending.

    Args:
        layouts: by group, the degrees of layouts to be tried as such.
    """
    tokens = -np.sort(-lengths)
    compute, policies = profile.compute, policy_names(profile)
    n, per_node = profile.num_devices, profile.devices_per_node
    work_s: Floats = np.asarray((compute.quadratic_s * tokens + compute.linear_s) * tokens, dtype=np.float64)
    exchange_s = np.array([profile.exchange_s_per_token(d) for d in degrees], dtype=np.float64)
    capacity = np.array([[profile.capacity_tokens(d, p) for d in degrees] for p in policies], dtype=np.int64)
    factor = np.array([profile.memory.policies[p].compute_factor if p else 1.0 for p in policies], dtype=np.float64)
    room_bytes = (profile.memory.memory_bytes - profile.memory.model_state_bytes) * n
    return Tables(
        tokens=tokens,
        work_s=work_s,
        quadratic_s=float(compute.quadratic_s),
        linear_s=float(compute.linear_s),
        fixed_s=float(compute.fixed_s),
        num_devices=n,
        devices_per_node=per_node,
        degrees=np.array(degrees, dtype=np.int64),
        exchange_s=exchange_s,
        latency_s=np.array([profile.latency_s(d) for d in degrees], dtype=np.float64),
        capacity=capacity,
        factor=factor,
        area_s=_least_area_s(tokens, work_s, exchange_s, degrees, capacity, factor),
        room_tokens=np.array([room_bytes / profile.activation_bytes_per_token(p) for p in policies]) * (1 + 1e-12),
        at_once=np.array([most_groups(d, n, per_node) for d in degrees], dtype=np.int64),
        layouts=np.array([[layout.count(d) for d in degrees] for layout in layouts or []], dtype=np.int64).reshape(
            -1, len(degrees)
        ),
        by_count=all(_power_of_two(d) for d in degrees) and (_power_of_two(per_node) or per_node >= n),
    )


def _least_area_s(
    tokens: Ints, work_s: Floats, exchange_s: Floats, degrees: list[int], capacity: Ints, factor: Floats
) -> Floats:
    least_s = np.full(len(tokens), np.inf)
    for p in range(len(factor)):
        for k, degree in enumerate(degrees):
            area_s = factor[p] * work_s + degree * exchange_s[k] * tokens
            least_s = np.where(tokens <= capacity[p, k], np.minimum(least_s, area_s), least_s)
    return least_s


def _power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
