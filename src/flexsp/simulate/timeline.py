"""When what runs in a step, by the cost model of `flexsp.profile`.

A micro-batch begins where the one before it ends. Its fixed cost comes first, on all ranks; then its groups run at
once, and the slowest ends it. Whoever is done sooner, or has no group, is idle until then.
"""

from __future__ import annotations

from dataclasses import dataclass

from flexsp.legality import violations
from flexsp.lengths import LengthArray
from flexsp.plans import Group, Plan
from flexsp.profile import Profile


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """One group of one micro-batch."""

    micro_batch: int
    ranks: tuple[int, ...]
    sequences: tuple[int, ...]
    """Indices into the lengths of the global batch."""
    tokens: int
    longest_tokens: int
    begin_s: float
    """Since the step began; the micro-batch's fixed cost lies before it."""
    seconds: float
    """Compute and exchange."""
    exchange_s: float
    """Part of `seconds`."""
    idle_s: float
    """From its end to that of the slowest group of the micro-batch."""
    memory_bytes: float
    """On each of its devices."""

    @property
    def sp_degree(self) -> int:
        return len(self.ranks)

    @property
    def compute_s(self) -> float:
        return self.seconds - self.exchange_s

    @property
    def end_s(self) -> float:
        return self.begin_s + self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatchSpan:
    """One micro-batch: `fixed_s` on all ranks, then its groups."""

    begin_s: float
    fixed_s: float
    slowest_s: float
    """Seconds of the slowest group."""
    policy: str | None
    groups: tuple[Span, ...]
    idle_ranks: tuple[int, ...]
    """Ranks without a group."""

    @property
    def seconds(self) -> float:
        return self.fixed_s + self.slowest_s

    @property
    def end_s(self) -> float:
        return self.begin_s + self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Where the device-seconds of a step go; the four add up to 1."""

    compute: float
    exchange: float
    fixed: float
    idle: float
    """Waiting for the slowest group of the micro-batch, and ranks without a group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """One step."""

    num_devices: int
    devices_per_node: int
    micro_batches: tuple[MicroBatchSpan, ...]

    @property
    def step_s(self) -> float:
        """Seconds of the step: the plan's predicted_s. The optimizer's own time is not in it."""
        return sum(micro_batch.seconds for micro_batch in self.micro_batches)

    @property
    def spans(self) -> list[Span]:
        return [span for micro_batch in self.micro_batches for span in micro_batch.groups]

    def shares(self) -> Shares:
        compute = sum(span.compute_s * span.sp_degree for span in self.spans)
        exchange = sum(span.exchange_s * span.sp_degree for span in self.spans)
        fixed = sum(micro_batch.fixed_s for micro_batch in self.micro_batches) * self.num_devices
        idle = sum(span.idle_s * span.sp_degree for span in self.spans) + sum(
            len(micro_batch.idle_ranks) * micro_batch.slowest_s for micro_batch in self.micro_batches
        )
        whole = (self.step_s * self.num_devices) or 1.0
        return Shares(compute=compute / whole, exchange=exchange / whole, fixed=fixed / whole, idle=idle / whole)


def replay(plan: Plan, lengths: LengthArray, profile: Profile) -> Timeline:
    """The timeline of `plan`, whoever made it, for a global batch of (K,) `lengths` in tokens.

    Raises:
        ValueError: the plan is not one, or not legal for these lengths and this profile; the message gives the first
            fault.
    """
    if faults := violations(plan, lengths, profile):
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise ValueError(f"plan: {faults[0]}{more}; correct it, or see all faults with flexsp check")
    built = []
    begin_s = 0.0
    for b, micro_batch in enumerate(plan.micro_batches):
        seconds = [
            profile.group_s(group.sp_degree, lengths[list(group.sequences)], micro_batch.policy)
            for group in micro_batch.groups
        ]
        slowest_s = max(seconds)
        used = {rank for group in micro_batch.groups for rank in group.ranks}
        built.append(
            MicroBatchSpan(
                begin_s=begin_s,
                fixed_s=profile.compute.fixed_s,
                slowest_s=slowest_s,
                policy=micro_batch.policy,
                groups=tuple(
                    _span(b, group, lengths, profile, micro_batch.policy, begin_s, group_s, slowest_s)
                    for group, group_s in zip(micro_batch.groups, seconds, strict=True)
                ),
                idle_ranks=tuple(rank for rank in range(plan.num_devices) if rank not in used),
            )
        )
        begin_s += built[-1].seconds
    return Timeline(num_devices=plan.num_devices, devices_per_node=profile.devices_per_node, micro_batches=tuple(built))


def _span(
    micro_batch: int,
    group: Group,
    lengths: LengthArray,
    profile: Profile,
    policy: str | None,
    begin_s: float,
    seconds: float,
    slowest_s: float,
) -> Span:
    held = lengths[list(group.sequences)]
    tokens, degree = int(held.sum()), group.sp_degree
    return Span(
        micro_batch=micro_batch,
        ranks=group.ranks,
        sequences=group.sequences,
        tokens=tokens,
        longest_tokens=int(held.max()),
        begin_s=begin_s + profile.compute.fixed_s,
        seconds=seconds,
        exchange_s=tokens * profile.exchange_s_per_token(degree) + profile.latency_s(degree),
        idle_s=slowest_s - seconds,
        memory_bytes=profile.group_bytes(degree, tokens, policy),
    )
