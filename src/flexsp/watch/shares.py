"""Where the rank-seconds of a step's micro-batches went.

    elapsed x ranks = busy in groups + idle + gathers and reductions

A micro-batch takes `elapsed`; its slowest group is busy for W of it, and what is left is when parameters are gathered
and gradients reduced. A rank whose group is done earlier than W, or that has no group, waits for the rest: idle.

    rank 0-1  |gather| group of 0-1 ------------ W |reduce|
    rank 2    |gather| group of 2 -----  idle ---- |reduce|
    rank 3    |gather| idle (unused) ------------- |reduce|
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flexsp.lengths import LengthArray
from flexsp.plans import Plan
from flexsp.profile import Profile

PerRank = Sequence[Sequence[float]]
"""Seconds by rank and micro-batch."""


def time_shares(plan: Plan, elapsed_s: PerRank, busy_s: PerRank, exchange_s: PerRank) -> dict[str, Any]:
    """The shares of one step, as metrics.jsonl has them.

    Args:
        plan: what was run.
        elapsed_s: of a micro-batch, waiting included.
        busy_s: inside layers, head and loss, exchanges included.
        exchange_s: of that, in exchanges.
    """
    by_micro_batch: list[float] = []
    idle, unused, gathers, elapsed, busy, exchange = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for b, micro_batch in enumerate(plan.micro_batches):
        took_s = max(rank[b] for rank in elapsed_s) * plan.num_devices
        groups_s = [max(busy_s[rank][b] for rank in group.ranks) for group in micro_batch.groups]
        slowest_s = max(groups_s)
        used = [rank for group in micro_batch.groups for rank in group.ranks]
        unused_s = (plan.num_devices - len(used)) * slowest_s
        waited_s = sum(g.sp_degree * (slowest_s - s) for g, s in zip(micro_batch.groups, groups_s, strict=True))
        by_micro_batch.append(_share(waited_s + unused_s, took_s))
        idle += waited_s + unused_s
        unused += unused_s
        gathers += took_s - plan.num_devices * slowest_s
        elapsed += took_s
        busy += sum(busy_s[rank][b] for rank in used)
        exchange += sum(exchange_s[rank][b] for rank in used)
    return {
        "idle_share": _share(idle, elapsed),
        "unused_share": _share(unused, elapsed),
        "gather_share": _share(gathers, elapsed),
        "exchange_share": _share(exchange, busy),
        "micro_batch_idle_share": by_micro_batch,
    }


def predicted_exchange_share(plan: Plan, lengths: LengthArray, profile: Profile) -> float:
    """What `exchange_share` would be if times were as the profile says.

    Args:
        plan: what was run.
        lengths: (K,) tokens of the global batch.
        profile: of as many devices.
    """
    busy, exchange = 0.0, 0.0
    for micro_batch in plan.micro_batches:
        for group in micro_batch.groups:
            degree, held = group.sp_degree, lengths[list(group.sequences)]
            busy += degree * profile.group_s(degree, held, micro_batch.policy)
            exchange_s = float(held.sum()) * profile.exchange_s_per_token(degree) + profile.latency_s(degree)
            exchange += degree * exchange_s
    return _share(exchange, busy)


def _share(part: float, whole: float) -> float:
    """Within 0 and 1, whatever rounding does; 0 of nothing."""
    return min(max(part / whole, 0.0), 1.0) if whole > 0 else 0.0
