"""What activation policies hold and cost: rows of one device, timed with a policy and without in turn."""

from __future__ import annotations

import logging
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from flexsp.data.batch import PlannedBatch
from flexsp.parallel.policies import OFFLOAD, policies_of
from flexsp.profile import Policy
from flexsp.profiler.memory import PeakFit
from flexsp.profiler.points import SHARES, Mix, Point
from flexsp.profiler.probe import Probe, timed_step
from flexsp.track import Track

log = logging.getLogger(__name__)

LEAST_PAIRS, MOST_PAIRS = 3, 5
"""Timings of a row, with and without."""
ENOUGH_S = 1.0
"""After so long no more than the least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One row of every rank, timed with a policy and without."""

    point: Point
    without_s: float
    with_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyReading:
    """One policy on a model, or on a part of one."""

    peaks: PeakFit
    pairs: tuple[Pair, ...]
    """Empty where only peaks were measured."""


class ProbeUnder(Probe):
    """A probe whose micro-batches run under a policy."""

    def __init__(self, probe: Probe, policy: str) -> None:
        self.__dict__.update(vars(probe))
        self.policy = policy

    def batch(self, mixes: Sequence[Mix]) -> PlannedBatch:
        batch = Probe.batch(self, mixes)
        micro_batches = tuple(replace(each, policy=self.policy) for each in batch.plan.micro_batches)
        return replace(batch, plan=replace(batch.plan, micro_batches=micro_batches))


def measurable(policies: Sequence[str], model: PreTrainedModel, device: torch.device) -> tuple[str, ...]:
    """The policies that can be measured here.

    Args:
        policies: asked for.
        model: prepared.
        device: of the model; a CPU has no host beside it to hold activations, so offload is left out there.

    Raises:
        ValueError: the model does not run one of them.
    """
    policies_of(model).check(policies)
    if OFFLOAD in policies and device.type == "cpu":
        log.info("profile: policy offload is left out: activations of a CPU have nowhere else to go")
        policies = [policy for policy in policies if policy != OFFLOAD]
    return tuple(dict.fromkeys(policies))


def read_policies(
    probe: Probe,
    policies: Sequence[str],
    tokens: int,
    peaks: Callable[[Probe], PeakFit],
    track: Track,
    timed: bool = True,
) -> dict[str, PolicyReading]:
    """Measures policies on a probe's model. A collective.

    Args:
        probe: of the model, or a part of it.
        policies: from `measurable`.
        tokens: of a rank in the timed rows.
        peaks: measures peaks.
        track: shows progress.
        timed: whether rows are timed.
    """
    rows = [Point(1, (max(1, tokens // share),) * share) for share in SHARES if tokens >= share] if timed else []
    found = {}
    for policy, say in track(list(policies), "measuring policies") if policies else []:
        under = ProbeUnder(probe, policy)
        pairs = tuple(_pair(probe, under, row) for row in rows)
        found[policy] = PolicyReading(peaks=peaks(under), pairs=pairs)
        ratios = ", ".join(f"{pair.with_s / pair.without_s:.2f}" for pair in pairs)
        say(f"policy {policy}: {found[policy].peaks.bytes_per_token:,.0f} bytes a token" + (f", x {ratios}" * timed))
    return found


def _pair(probe: Probe, under: ProbeUnder, row: Point) -> Pair:
    batches = [each.batch(row.mixes(probe.world_size)) for each in (probe, under)]
    for batch in batches:
        timed_step(probe.model, batch, probe.groups)
    taken: list[list[float]] = []  # the same on all ranks, so that all stop alike
    while len(taken) < LEAST_PAIRS or (len(taken) < MOST_PAIRS and sum(map(sum, taken)) < ENOUGH_S):
        taken.append([timed_step(probe.model, batch, probe.groups) for batch in batches])
    without_s, with_s = (statistics.median(each) for each in zip(*taken, strict=True))
    return Pair(point=row, without_s=without_s, with_s=with_s)


def whole_policies(readings: Mapping[str, PolicyReading]) -> dict[str, Policy]:
    """The policies of a model of which all was measured."""
    return {
        name: policy(each.peaks.bytes_per_token, [pair.with_s / pair.without_s for pair in each.pairs])
        for name, each in readings.items()
    }


def policies_by_parts(
    parts: Sequence[Mapping[str, PolicyReading]],
    by_difference: Callable[[Sequence[float]], float],
    micro_batch_s: Callable[[Mix], float],
) -> dict[str, Policy]:
    """The policies of a model of which parts were measured.

    Seconds that a policy adds, and bytes a token, are put together as those of the parts are. Offload alone holds no
    more of many layers than of few: the part of most layers says it all but for the head.

    Args:
        parts: readings of each part; the last one not timed where it is there for the head.
        by_difference: from a number of each part to that of the whole model.
        micro_batch_s: what the fit says of a micro-batch of the whole model, without a policy.
    """
    found = {}
    for name in parts[0]:
        readings = [part[name] for part in parts]
        slopes = [each.peaks.bytes_per_token for each in readings]
        if name == OFFLOAD:  # as if all parts had as many layers
            slopes = [slope + (max(0.0, slopes[0] - slopes[1]) if at else 0.0) for at, slope in enumerate(slopes)]
        ratios = []
        for at, pair in enumerate(readings[0].pairs):
            extra = [each.pairs[at].with_s - each.pairs[at].without_s for each in readings if each.pairs]
            extra += [extra[-1]] * (len(readings) - len(extra))  # the head has no policy: it adds nothing
            ratios.append(1.0 + by_difference(extra) / micro_batch_s([(1, pair.point.lengths)]))
        found[name] = policy(by_difference(slopes), ratios)
    return found


def policy(bytes_per_token: float, ratios: Sequence[float]) -> Policy:
    """A profile's entry: the median of the ratios, which cannot be a gain."""
    factor = max(1.0, statistics.median(ratios)) if ratios else 1.0
    return Policy(activation_bytes_per_token=math.ceil(bytes_per_token), compute_factor=round(factor, 4))


def residual_bytes(readings: Sequence[Mapping[str, PolicyReading]]) -> float:
    """The most that a peak was above its line under any policy."""
    return max((each.peaks.residual_bytes for part in readings for each in part.values()), default=0.0)


def at_rest_bytes(readings: Sequence[Mapping[str, PolicyReading]]) -> float:
    """The most that is held whatever the tokens, under any policy."""
    return max((each.peaks.at_rest_bytes for part in readings for each in part.values()), default=0.0)
