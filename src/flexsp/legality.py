"""Is a plan legal? The rules of a plan, checked by code that no planner shares.

1. every sequence is in exactly one group of one micro-batch;
2. every micro-batch has a group, every group a sequence, and the groups of a micro-batch share no rank;
3. every group fits its memory;
4. a group's ranks are consecutive; a degree that fits into a node lies inside one; a larger one starts at a node's
   first rank; a power-of-two degree starts at a multiple of itself (inside its node, where it fits into one);
5. every degree is in the profile's sp_degrees.
"""

from __future__ import annotations

from flexsp.lengths import Lengths, as_lengths, lengths_sha256
from flexsp.plans import Group, MicroBatch, Plan
from flexsp.profile import Profile


def violations(plan: Plan, lengths: Lengths, profile: Profile) -> list[str]:
    """Every way in which `plan` is illegal for `lengths` (tokens) under `profile`; empty where it is legal.

    A `predicted_s` or `lengths_sha256` that the plan states is checked too.
    """
    tokens = [int(length) for length in as_lengths(lengths)]
    if not plan.has_plan:
        return [f"the plan is {plan.status.value}: {plan.reason}"]
    faults = []
    if plan.num_devices != profile.num_devices:
        faults.append(
            f"plan num_devices={plan.num_devices} is not the profile's num_devices={profile.num_devices}; judge it by "
            f"the profile for as many, --num-devices {plan.num_devices} (Profile.for_devices)"
        )
    if plan.lengths_sha256 is not None and plan.lengths_sha256 != lengths_sha256(lengths):
        faults.append("lengths_sha256 is not that of these lengths: the plan was made for another batch")
    seen: dict[int, str] = {}
    seconds: float | None = 0.0
    for b, micro_batch in enumerate(plan.micro_batches):
        faults += _micro_batch_faults(micro_batch, f"micro-batch {b}", tokens, profile, seen)
        seconds = None if faults or seconds is None else seconds + _micro_batch_s(micro_batch, tokens, profile)
    missing = [i for i in range(len(tokens)) if i not in seen]
    if missing:
        faults.append(f"{len(missing)} of {len(tokens)} sequences are in no group, the first is {missing[0]}")
    said = plan.predicted_s
    if said is not None and seconds is not None and abs(said - seconds) > 1e-6 * max(1.0, seconds):
        faults.append(f"predicted_s={said} is not what the cost model says, {seconds}")
    return faults


def _micro_batch_faults(
    micro_batch: MicroBatch, where: str, tokens: list[int], profile: Profile, seen: dict[int, str]
) -> list[str]:
    """Faults of one micro-batch; notes in `seen` where each of its sequences is."""
    faults = []
    policy = micro_batch.policy
    if policy is not None and policy not in profile.memory.policies:
        faults.append(f"{where}: policy={policy!r} is not in the profile's policies {sorted(profile.memory.policies)}")
        policy = None
    if not micro_batch.groups:
        faults.append(f"{where}: no group")
    owner: dict[int, int] = {}
    for g, group in enumerate(micro_batch.groups):
        here = f"{where} group {g}"
        if not group.sequences:
            faults.append(f"{here}: no sequence")
        for rank in sorted(set(group.ranks)):
            if rank in owner:
                faults.append(f"{here}: rank {rank} is also in group {owner[rank]}")
            owner.setdefault(rank, g)
        for index in group.sequences:
            if not 0 <= index < len(tokens):
                faults.append(f"{here}: no sequence has index {index}, there are {len(tokens)}")
            elif index in seen:
                faults.append(f"{here}: sequence {index} is also in {seen[index]}")
            else:
                seen[index] = here
        if group.sp_degree not in profile.sp_degrees:
            faults.append(f"{here}: degree {group.sp_degree} is not in sp_degrees {list(profile.sp_degrees)}")
            continue
        if fault := _placement_fault(group, profile):
            faults.append(f"{here}: {fault}")
        held = sum(tokens[i] for i in group.sequences if 0 <= i < len(tokens))
        if not profile.fits(group.sp_degree, held, policy):
            faults.append(
                f"{here}: {held} tokens on {group.sp_degree} ranks need "
                f"{profile.group_bytes(group.sp_degree, held, policy):.0f} bytes a device, "
                f"memory_bytes={profile.memory.memory_bytes:.0f}"
            )
    return faults


def _placement_fault(group: Group, profile: Profile) -> str | None:
    """What rule 4 has against a group's ranks."""
    degree, start, per_node = group.sp_degree, group.ranks[0], profile.devices_per_node
    shown = list(group.ranks)
    if shown != list(range(start, start + degree)):
        return f"ranks {shown} are not consecutive and ascending"
    if start < 0 or start + degree > profile.num_devices:
        return f"ranks {shown} are not all within 0..{profile.num_devices - 1}"
    power_of_two = degree & (degree - 1) == 0
    if degree <= per_node:
        if start // per_node != (start + degree - 1) // per_node:
            return f"ranks {shown} cross a node of {per_node} although {degree} fit into one"
        if power_of_two and (start % per_node) % degree:
            return f"degree {degree} starts at place {start % per_node} of its node, not at a multiple of {degree}"
    elif start % per_node:
        return f"degree {degree} is larger than a node and does not start at a node's first rank"
    elif power_of_two and start % degree:
        return f"degree {degree} starts at rank {start}, not at a multiple of {degree}"
    return None


def _micro_batch_s(micro_batch: MicroBatch, tokens: list[int], profile: Profile) -> float:
    return profile.compute.fixed_s + max(
        profile.group_s(group.sp_degree, [tokens[i] for i in group.sequences], micro_batch.policy)
        for group in micro_batch.groups
    )
