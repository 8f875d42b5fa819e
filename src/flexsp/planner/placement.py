"""Where groups may stand: rank intervals of given degrees under the placement rule (rule 4 of a legal plan)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache


@lru_cache(maxsize=4096)
def legal_starts(degree: int, num_devices: int, devices_per_node: int) -> tuple[int, ...]:
    """First ranks at which a group of `degree` may stand, ascending."""
    power_of_two = degree & (degree - 1) == 0
    if degree > devices_per_node:
        step = devices_per_node
        return tuple(
            start for start in range(0, num_devices - degree + 1, step) if not (power_of_two and start % degree)
        )
    step = degree if power_of_two else 1
    return tuple(
        node + place
        for node in range(0, num_devices, devices_per_node)
        for place in range(0, devices_per_node - degree + 1, step)
        if node + place + degree <= num_devices
    )


def place(degrees: Sequence[int], num_devices: int, devices_per_node: int) -> list[int] | None:
    """First ranks for groups of these `degrees`, in their order, so that no two share a rank.

    Largest first, each at the first free legal place. For powers of two on nodes of a power of two that finds a
    placement whenever one exists; for other degrees it may miss one.

    Returns:
        One start per degree, or None where not all were placed.
    """
    if sum(degrees) > num_devices:
        return None
    free = bytearray(b"\x01") * num_devices
    starts = [0] * len(degrees)
    cursor: dict[int, int] = {}  # by degree: legal starts before this one are taken
    for g in sorted(range(len(degrees)), key=lambda g: -degrees[g]):
        degree = degrees[g]
        wanted = b"\x01" * degree
        options = legal_starts(degree, num_devices, devices_per_node)
        at = cursor.get(degree, 0)
        while at < len(options) and free[options[at] : options[at] + degree] != wanted:
            at += 1
        if at == len(options):
            return None
        cursor[degree] = at + 1
        starts[g] = options[at]
        free[options[at] : options[at] + degree] = bytes(degree)
    return starts


@lru_cache(maxsize=4096)
def most_groups(degree: int, num_devices: int, devices_per_node: int) -> int:
    """How many groups of one `degree` fit at once."""
    placed, end = 0, 0
    for start in legal_starts(degree, num_devices, devices_per_node):
        if start >= end:
            placed, end = placed + 1, start + degree
    return placed
