"""Why a sequence sits where it sits: its time at each degree, and what the plan would take were it elsewhere."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flexsp.lengths import LengthArray
from flexsp.plans import Group, MicroBatch, Plan
from flexsp.profile import Profile


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One sequence into another group of the plan, all else as it is."""

    micro_batch: int
    group: Group
    change_s: float
    """What the plan's predicted time changes by; below 0 the plan could be better."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AtDegree:
    """One sequence and one degree."""

    sp_degree: int
    alone_s: float | None
    """Its seconds in a group of its own, under its micro-batch's policy; None where memory does not hold it."""
    move: Move | None
    """The cheapest move into another group of this degree; None where no group of it has room."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    micro_batch: int
    group: Group
    share: float
    """Of its group's time, what the sequence takes; 0 where the group takes no time."""
    slack_s: float
    """How much longer its group could run before it would be the slowest of its micro-batch."""
    by_degree: list[AtDegree]


def explain(plan: Plan, lengths: LengthArray, profile: Profile, index: int) -> Explanation:
    """Why sequence `index` sits where it does.

    Args:
        plan: a legal plan for `lengths` (tokens).

    Raises:
        ValueError: there is no such sequence.
    """
    if not 0 <= index < len(lengths):
        raise ValueError(f"sequence={index} must be between 0 and {len(lengths) - 1}; choose one of the batch")
    home, group = next(
        (b, group)
        for b, micro_batch in enumerate(plan.micro_batches)
        for group in micro_batch.groups
        if index in group.sequences
    )
    seconds = [_seconds(micro_batch, lengths, profile) for micro_batch in plan.micro_batches]
    at_home = plan.micro_batches[home].groups.index(group)
    policy, length = plan.micro_batches[home].policy, int(lengths[index])
    own_s = seconds[home][at_home]
    without = [s for g, s in enumerate(seconds[home]) if g != at_home]
    remaining = [i for i in group.sequences if i != index]
    if remaining:
        without.append(profile.group_s(group.sp_degree, lengths[remaining], policy))

    best: dict[int, Move] = {}
    for b, micro_batch in enumerate(plan.micro_batches):
        for g, other in enumerate(micro_batch.groups):
            if other is group or not profile.fits(
                other.sp_degree, int(lengths[list(other.sequences)].sum()) + length, micro_batch.policy
            ):
                continue
            with_it_s = profile.group_s(other.sp_degree, lengths[[*other.sequences, index]], micro_batch.policy)
            if b == home:
                change_s = max([with_it_s, *without]) - max(seconds[home])
            else:
                change_s = max(with_it_s, *seconds[b]) - max(seconds[b])
                # A micro-batch that loses its last sequence is not run at all.
                left_s = max(without) if without else -profile.compute.fixed_s
                change_s += left_s - max(seconds[home])
            if change_s < best.get(other.sp_degree, Move(micro_batch=b, group=other, change_s=math.inf)).change_s:
                best[other.sp_degree] = Move(micro_batch=b, group=plan.micro_batches[b].groups[g], change_s=change_s)
    others_s = profile.group_s(group.sp_degree, lengths[remaining], policy) if remaining else 0.0
    return Explanation(
        micro_batch=home,
        group=group,
        share=1.0 - others_s / own_s if own_s else 0.0,
        slack_s=max(seconds[home]) - own_s,
        by_degree=[
            AtDegree(
                sp_degree=degree,
                alone_s=profile.group_s(degree, [length], policy) if profile.fits(degree, length, policy) else None,
                move=best.get(degree),
            )
            for degree in profile.sp_degrees
        ],
    )


def _seconds(micro_batch: MicroBatch, lengths: LengthArray, profile: Profile) -> list[float]:
    return [
        profile.group_s(group.sp_degree, lengths[list(group.sequences)], micro_batch.policy)
        for group in micro_batch.groups
    ]
