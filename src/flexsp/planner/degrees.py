"""Which degrees a plan may use on a profile's devices."""

from __future__ import annotations

from flexsp.planner.placement import most_groups
from flexsp.profile import Profile


def usable_degrees(profile: Profile) -> list[int]:
    """Degrees of the profile that have a legal place on its devices."""
    return [d for d in profile.sp_degrees if most_groups(d, profile.num_devices, profile.devices_per_node) > 0]


def policy_for(profile: Profile, max_length: int) -> str | None:
    """The policy that a sequence of `max_length` tokens needs, the one that holds most; None: it needs none."""
    widest = min(profile.memory.policies, key=profile.activation_bytes_per_token, default=None)
    holds = any(profile.capacity_tokens(degree) >= max_length for degree in usable_degrees(profile))
    return None if holds else widest
