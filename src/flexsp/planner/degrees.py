"""Which degrees a plan may use on a profile's devices."""

from __future__ import annotations

from flexsp.planner.placement import most_groups
from flexsp.profile import Profile


def usable_degrees(profile: Profile) -> list[int]:
    """Degrees of the profile that have a legal place on its devices."""
    return [d for d in profile.sp_degrees if most_groups(d, profile.num_devices, profile.devices_per_node) > 0]
