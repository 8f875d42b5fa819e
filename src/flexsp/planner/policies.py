"""One activation policy for all micro-batches, for planners that choose none."""

from __future__ import annotations

from dataclasses import replace

from flexsp.planner.degrees import usable_degrees
from flexsp.profile import Profile


def policy_for(profile: Profile, max_length: int) -> str | None:
    """The policy that a sequence of `max_length` tokens needs, the one that holds most; None: it needs none."""
    widest = min(profile.memory.policies, key=profile.activation_bytes_per_token, default=None)
    holds = any(profile.capacity_tokens(degree) >= max_length for degree in usable_degrees(profile))
    return None if holds else widest


def under_policy(profile: Profile, policy: str | None) -> Profile:
    """The profile with one activation policy for all micro-batches, None being none, and no other to choose.

    Raises:
        ValueError: the profile has no policy of that name.
    """
    memory = profile.memory
    if policy is None:
        return replace(profile, memory=replace(memory, policies={}))
    if policy not in memory.policies:
        known = ", ".join(memory.policies) or "none"
        raise ValueError(f"policy={policy!r} is not in the profile's policies ({known}); name one of them")
    chosen, compute = memory.policies[policy], profile.compute
    return replace(
        profile,
        name=f"{profile.name}, {policy}",
        compute=replace(
            compute,
            quadratic_s=compute.quadratic_s * chosen.compute_factor,
            linear_s=compute.linear_s * chosen.compute_factor,
        ),
        memory=replace(memory, activation_bytes_per_token=chosen.activation_bytes_per_token, policies={}),
        tables={},  # measured without the policy
    )
