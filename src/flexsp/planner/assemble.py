"""From a planner's choice of degrees and sequences to a Plan with ranks and predictions."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from flexsp.lengths import LengthArray, lengths_sha256
from flexsp.planner.bound import lower_bound_s
from flexsp.planner.by_tables import table_s
from flexsp.planner.placement import place
from flexsp.plans import Group, MicroBatch, Plan, Status
from flexsp.profile import Profile

GroupChoice = tuple[int, list[int]]
"""An sp_degree and the sequences that a group of it holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatchChoice:
    """A planner's choice for one micro-batch."""

    groups: Sequence[GroupChoice]
    policy: str | None = None
    starts: Sequence[int] | None = None
    """First rank of each group, where the planner placed them itself; by default `place` does."""


OPTIMAL_GAP = 1e-9
"""A plan this close to the bound, relatively, is optimal: the rest is rounding."""


def assemble(
    planner: str,
    lengths: LengthArray,
    profile: Profile,
    micro_batches: Sequence[Sequence[GroupChoice] | MicroBatchChoice],
    solve_s: float,
) -> Plan:
    """The Plan of these micro-batches; each must come with its starts or have a placement (as `place` finds it).

    `solve_s` is what choosing took; the bound's time is added.
    """
    choices = [c if isinstance(c, MicroBatchChoice) else MicroBatchChoice(groups=c) for c in micro_batches]
    began = time.perf_counter()
    built = tuple(_micro_batch(choice, lengths, profile) for choice in choices)
    predicted_s = sum(micro_batch.predicted_s or 0.0 for micro_batch in built)
    bound_s = min(lower_bound_s(lengths, profile), predicted_s)  # above it by rounding at most
    proven = predicted_s <= bound_s * (1 + OPTIMAL_GAP)
    return Plan(
        num_devices=profile.num_devices,
        micro_batches=built,
        planner=planner,
        lengths_sha256=lengths_sha256(lengths),
        status=Status.OPTIMAL if proven else Status.FEASIBLE,
        predicted_s=predicted_s,
        predicted_table_s=table_s(built, lengths, profile),
        lower_bound_s=bound_s,
        solve_s=solve_s + time.perf_counter() - began,
    )


def _micro_batch(choice: MicroBatchChoice, lengths: LengthArray, profile: Profile) -> MicroBatch:
    degrees = [degree for degree, _ in choice.groups]
    starts = choice.starts
    if starts is None:
        starts = place(degrees, profile.num_devices, profile.devices_per_node)
    assert starts is not None, f"planner chose degrees {degrees} that have no placement"
    built = [
        Group(
            ranks=tuple(range(start, start + degree)),
            sequences=tuple(sequences),
            predicted_s=profile.group_s(degree, lengths[sequences], choice.policy),
        )
        for start, (degree, sequences) in zip(starts, choice.groups, strict=True)
    ]
    built.sort(key=lambda group: group.ranks[0])
    slowest_s = max(group.predicted_s or 0.0 for group in built)
    return MicroBatch(groups=tuple(built), predicted_s=profile.compute.fixed_s + slowest_s, policy=choice.policy)


def too_long(
    lengths: LengthArray, profile: Profile, degrees: Sequence[int], policies: Sequence[str | None] = (None,)
) -> str | None:
    """Why the longest sequence fits into no group of these degrees under these policies; None where it fits.

    The reason says which sequence, what it needs, and what would make it fit.
    """
    index = int(lengths.argmax())
    length = int(lengths[index])
    if not degrees:
        return (
            f"no degree of sp_degrees={list(profile.sp_degrees)} has a legal place on "
            f"num_devices={profile.num_devices} with devices_per_node={profile.devices_per_node}; list other degrees"
        )
    degree, policy = max(
        ((d, p) for d in degrees for p in policies), key=lambda choice: profile.capacity_tokens(*choice)
    )
    capacity = profile.capacity_tokens(degree, policy)
    if length <= capacity:
        return None
    per_token = profile.activation_bytes_per_token(policy)
    room_bytes = profile.memory.memory_bytes - profile.memory.model_state_bytes
    under = f" under policy {policy!r}" if policy else ""
    return (
        f"lengths[{index}]={length} tokens fit into no group: sp_degree={degree}{under} holds at most {capacity} "
        f"tokens, and with {length} needs {profile.group_bytes(degree, length, policy):.4g} bytes a device of "
        f"memory_bytes={profile.memory.memory_bytes:.4g}; a degree of {math.ceil(length * per_token / room_bytes)} or "
        f"activations of {room_bytes * degree / length:.4g} bytes a token (now {per_token:.4g}) would hold it, or drop "
        f"or split the sequence"
    )


def infeasible(planner: str, lengths: LengthArray, profile: Profile, reason: str, solve_s: float) -> Plan:
    return Plan(
        num_devices=profile.num_devices,
        micro_batches=(),
        planner=planner,
        lengths_sha256=lengths_sha256(lengths),
        status=Status.INFEASIBLE,
        reason=reason,
        solve_s=solve_s,
    )
