"""Where groups may stand: rank intervals of given degrees under the placement rule (rule 4 of a legal plan)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from flexsp.profile import Profile


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


MOST_LAYOUTS = 96
"""More layouts than this are not worth trying one by one."""


def few_layouts(degrees: Sequence[int], profile: Profile, num_sequences: int) -> list[tuple[int, ...]]:
    """All layouts of at most `num_sequences` groups to which no group can be added; none where there are too many.

    Returns:
        The degrees of the groups, descending.
    """
    found: list[tuple[int, ...]] = []

    def extend(layout: tuple[int, ...], at_most: int) -> bool:
        """Notes what follows from `layout` by smaller or equal groups; False once there are too many."""
        last = True
        for degree in reversed([d for d in degrees if d <= at_most]):
            longer = (*layout, degree)
            if len(longer) <= num_sequences and place(longer, profile.num_devices, profile.devices_per_node):
                last = False
                if not extend(longer, degree):
                    return False
        if layout and last:
            found.append(layout)
        return len(found) <= MOST_LAYOUTS

    return found if extend((), profile.num_devices) else []
