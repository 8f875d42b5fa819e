"""Which groups can still be added to a micro-batch under the placement rule."""

from __future__ import annotations

from flexsp.planner.placement import place
from flexsp.profile import Profile


class Room:
    """The degrees of a micro-batch's groups while it is filled, and what can still be added to them.

    For powers of two on nodes of a power of two only the ranks need counting: aligned intervals placed largest first
    leave no gap. Elsewhere `place` is asked.
    """

    def __init__(self, profile: Profile, degrees: list[int]) -> None:
        self._size = (profile.num_devices, profile.devices_per_node)
        self._counting = all(d & (d - 1) == 0 for d in [profile.devices_per_node, *degrees])
        self._refused: set[int] = set()
        self.placed: list[int] = []
        """Degrees of the groups, in the order in which they were added."""
        self.idle = profile.num_devices
        """Ranks that no group has."""

    def takes(self, degree: int) -> bool:
        """Whether one more group of `degree` can stand beside the others."""
        if degree > self.idle or degree in self._refused:
            return False
        fits = self._fits([*self.placed, degree])
        if not fits:
            self._refused.add(degree)  # nor will it once there are more groups
        return fits

    def add(self, degree: int) -> None:
        self.placed.append(degree)
        self.idle -= degree

    def grow(self, group: int, degree: int) -> bool:
        """Gives the group of this number `degree` ranks if all groups still find a place; whether they do."""
        grown = [*self.placed[:group], degree, *self.placed[group + 1 :]]
        if sum(grown) > self._size[0] or not self._fits(grown):
            return False
        self.idle -= degree - self.placed[group]
        self.placed = grown
        return True

    def _fits(self, degrees: list[int]) -> bool:
        return self._counting or place(degrees, *self._size) is not None
