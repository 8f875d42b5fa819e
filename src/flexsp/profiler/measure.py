"""A profile of a prepared model on the ranks at hand, measured through the real executor with all ranks busy.

0. Choose how every degree splits into heads x context: the fastest (`splits`).
1. Time rows of like sequences at every degree (`points`), and every degree's exchange by itself, by placement.
2. Fit the cost model to all of them at once (`fit`), and try it on mixed micro-batches that the fit has not seen.
3. Time the optimizer's step; measure the peak bytes of rows of several sizes (`memory`).

`layers` does the same with few layers of a model that is not at hand.
"""

from __future__ import annotations

import datetime
import logging
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import transformers
from transformers import PreTrainedConfig, PreTrainedModel

import flexsp
from flexsp.parallel import GroupPool, check_degrees, default_layouts
from flexsp.profile import AllToAll, Compute, Memory, Policy, Profile
from flexsp.profiler.fit import Fit
from flexsp.profiler.memory import (
    LEAST_MARGIN,
    OPTIMIZER_COPIES,
    PeakFit,
    held_bytes,
    memory_limit,
    peak_fit,
    shard_bytes,
)
from flexsp.profiler.points import Mix, Part, Point, fit_points, held_out_mixes
from flexsp.profiler.policies import at_rest_bytes, measurable, read_policies, residual_bytes, whole_policies
from flexsp.profiler.probe import Probe, Reading, Track, silent
from flexsp.profiler.splits import Splits, measured_splits

log = logging.getLogger(__name__)

Made = TypeVar("Made")
PROBE_TOKENS = {"cpu": 2048, "cuda": 32768}
"""Tokens of a rank in the largest timed micro-batch, where its memory holds as many."""
FIRST_TOKENS = 2048
"""Tokens of a rank whose memory is measured before larger rows are tried."""
HELD_OUT = 6
"""Mixed micro-batches on which the fit is tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """All that was measured, before it becomes a profile. Bytes are of one rank of the whole model."""

    config: PreTrainedConfig
    dtype: torch.dtype
    """What is computed in."""
    readings: list[Reading]
    fit: Fit
    splits: Splits
    layers: int
    """What the fit is to be taken for: the model's layers, or 1 where the readings are of the whole model."""
    exchange_bytes_per_s: Mapping[int, Mapping[str, float]]
    """By degree and placement: what one group's exchange by itself reached a device."""
    held_out: list[float]
    """Predicted over measured seconds, less 1, of micro-batches that the fit has not seen."""
    optimizer_s: float
    state_bytes: float
    activation_bytes_per_token: float
    """At degree 1."""
    degree_factor: float
    """How much more a token takes at the degree that holds most."""
    residual_bytes: float
    policies: Mapping[str, Policy] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)
    """Further entries of the provenance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What a rank may hold."""

    max_tokens_per_rank: int | None
    """An artificial limit."""
    fraction: float
    """Of its own memory, where there is none."""

    def room_bytes(self, device: torch.device) -> float | None:
        """None under an artificial limit."""
        return None if self.max_tokens_per_rank else float(memory_limit(device, self.fraction, ranks_per_node())[0])


def measure_profile(
    model: PreTrainedModel,
    groups: GroupPool,
    *,
    sp_degrees: Sequence[int],
    max_tokens_per_rank: int | None = None,
    memory_fraction: float = 0.9,
    param_dtype: torch.dtype | None = None,
    policies: Sequence[str] = (),
    track: Track = silent,
) -> Profile:
    """Measures the profile of a prepared model. A collective; every rank gets the same profile.

    Args:
        model: from `prepare_model`; its gradients are cleared, its weights untouched.
        groups: the pool.
        sp_degrees: degrees to measure.
        max_tokens_per_rank: an artificial memory limit.
        memory_fraction: of the memory of a device (a CPU: of the process's limit or its share of the machine's) that a
            plan may fill, where there is no artificial limit.
        param_dtype: what the model computes in, where that is not the type of its parameters.
        policies: activation policies to measure; a plan may then choose among them.
        track: shows progress.

    Raises:
        ValueError: a degree that the heads cannot serve, a policy that the model does not run, or no memory left for
            activations.
    """
    check_degrees(sp_degrees, model.config, dist.get_world_size(), default_layouts(model.config, sp_degrees))
    began = time.perf_counter()
    dtype = param_dtype or next(model.parameters()).dtype
    probe = Probe(model, groups, Part(layers=model.config.get_text_config().num_hidden_layers, head=1.0, whole=True))
    policies = measurable(policies, model, probe.device)
    limit = Limit(max_tokens_per_rank=max_tokens_per_rank, fraction=memory_fraction)
    most = PROBE_TOKENS[probe.device.type]
    tokens = min(most, FIRST_TOKENS, max_tokens_per_rank or most)
    room_bytes = limit.room_bytes(probe.device)
    peaks = measured_peaks(probe, tokens, room_bytes)
    peaks_of = partial(measured_peaks, tokens=tokens, room_bytes=room_bytes)
    if room_bytes is not None:  # half of what the rank with the least room holds
        held = int(-probe.largest(-room_bytes) / 2 - peaks.at_rest_bytes) // int(peaks.bytes_per_token)
        tokens = max(tokens, min(most, held))
    splits = measured_splits(probe, tokens, sp_degrees, track)
    probe.layouts = splits.layouts
    factor = degree_factor(probe, tokens, sp_degrees) if room_bytes is not None else 1.0
    mixes = held_out_mixes(tokens, sp_degrees, probe.world_size, HELD_OUT)
    readings, tried = read_points(probe, fit_points(tokens, sp_degrees), mixes, track)
    alone = exchange_alone(probe, tokens, sp_degrees, dtype)
    under = read_policies(probe, policies, tokens, peaks_of, track)
    fit = Fit(readings, sp_degrees, {d: max(by.values()) / (tokens * d) for d, by in alone.items()})
    measured = Measured(
        config=model.config,
        dtype=dtype,
        readings=readings,
        fit=fit,
        splits=splits,
        layers=1,
        exchange_bytes_per_s=alone_bytes_per_s(alone, tokens, model.config, dtype),
        held_out=[fit.for_part(probe.part).mix_s(mix) / seconds - 1.0 for mix, seconds in tried],
        optimizer_s=probe.optimizer_s(),
        state_bytes=max(peaks.at_rest_bytes, at_rest_bytes([under])) + OPTIMIZER_COPIES * shard_bytes(model),
        activation_bytes_per_token=peaks.bytes_per_token,
        residual_bytes=max(peaks.residual_bytes, residual_bytes([under])),
        policies=whole_policies(under),
        degree_factor=factor,
    )
    return from_first_rank(lambda: make_profile(measured, sp_degrees, probe.device, limit, began), groups)


def read_points(
    probe: Probe, points: Sequence[Point], mixes: Sequence[Mix], track: Track, what: str = "measuring"
) -> tuple[list[Reading], list[tuple[Mix, float]]]:
    """Times points, and mixed micro-batches for trying the fit on: those with their seconds."""
    readings: list[Reading] = []
    tried: list[tuple[Mix, float]] = []
    for item, say in track([*points, *mixes], what):
        if isinstance(item, Point):
            readings.append(probe.read(item))
            row = f"sp_degree {item.degree}, {item.count} x {len(item.lengths)} of {item.lengths[0]:,} tokens"
            say(f"{row}: {readings[-1].seconds:.4f} s")
        else:
            tried.append((item, statistics.fmean(probe.times([item]))))
            say(f"mixed, held out: {tried[-1][1]:.4f} s")
    return readings, tried


def exchange_alone(
    probe: Probe, tokens: int, degrees: Sequence[int], dtype: torch.dtype
) -> dict[int, dict[str, float]]:
    """Seconds of one layer's exchanges of rows of so many tokens a rank, by degree and placement."""
    config = probe.model.config
    return {
        d: probe.exchange_s(d, tokens, exchange_columns(config, d), dtype)
        for d in degrees
        if d > 1 and d not in probe.layouts  # a ring's traffic is partly hidden: by itself it says little
    }


def alone_bytes_per_s(
    alone: Mapping[int, Mapping[str, float]], tokens: int, config: PreTrainedConfig, dtype: torch.dtype
) -> dict[int, dict[str, float]]:
    """The same as bytes a second and device."""
    layer_bytes = exchange_bytes_per_token(config, dtype) / config.get_text_config().num_hidden_layers
    return {d: {place: layer_bytes * tokens / s for place, s in by.items()} for d, by in alone.items()}


def measured_peaks(probe: Probe, tokens: int, room_bytes: float | None) -> PeakFit:
    """The peaks of rows of up to `tokens`, and of four times as many where they fit into half of `room_bytes`."""
    sizes = [max(1, tokens // 4), max(2, tokens)]
    least_bytes = 0.0
    if room_bytes is not None:
        sizes += [2 * tokens, 4 * tokens]
        least_bytes = -probe.largest(-room_bytes)  # what the rank with the least room has, so that all stop alike
    own = peak_fit(probe.run, sizes, probe.device, least_bytes / 2, probe.largest)
    return PeakFit(
        bytes_per_token=probe.largest(own.bytes_per_token),
        at_rest_bytes=probe.largest(own.at_rest_bytes),
        residual_bytes=probe.largest(own.residual_bytes),
    )


def degree_factor(probe: Probe, tokens: int, degrees: Sequence[int]) -> float:
    """How much more of a token a rank holds at the degree that holds most than at degree 1, of which peaks are taken.

    Degrees above 1 hold what they exchange, repeated KV heads, and the keys and gradients that go around a ring.
    """
    held: dict[int, float] = {}
    for degree in sorted({1, *degrees}):
        probe.run(tokens, degree)  # makes what is made once
        held[degree] = probe.largest(held_bytes(partial(probe.run, tokens, degree), probe.device))
    return max(each / held[1] for each in held.values())


def make_profile(
    measured: Measured, degrees: Sequence[int], device: torch.device, limit: Limit, began: float
) -> Profile:
    """The profile of what was measured; `began`: `time.perf_counter()` at the start."""
    world_size, per_node = dist.get_world_size(), ranks_per_node()
    per_token = math.ceil(measured.activation_bytes_per_token * measured.degree_factor)
    state_bytes = math.ceil(measured.state_bytes)
    limit_bytes, said = memory_limit(device, limit.fraction, per_node)
    margin_bytes = max(2.0 * measured.residual_bytes, LEAST_MARGIN[device.type] * limit_bytes)
    memory_bytes = limit_bytes - margin_bytes
    artificial = {}
    if limit.max_tokens_per_rank is not None:
        memory_bytes, margin_bytes = float(state_bytes + per_token * limit.max_tokens_per_rank), 0.0
        artificial = {"max_tokens_per_rank": limit.max_tokens_per_rank}
        said = f"artificial: max_tokens_per_rank={limit.max_tokens_per_rank}"
    elif memory_bytes <= state_bytes:
        raise ValueError(
            f"memory_bytes={int(memory_bytes)} ({said}, less a margin) is not above model_state_bytes={state_bytes}: "
            f"nothing is left for activations; use more devices or devices of more memory"
        )
    c = measured.fit.for_layers(measured.layers)
    bytes_per_token = exchange_bytes_per_token(measured.config, measured.dtype)
    errors = [abs(error) for error in measured.held_out]
    residuals = measured.fit.residuals()
    splits_s = measured.splits.seconds
    return Profile(
        name=f"{measured.config.model_type} on {world_size} x {device_name(device)}",
        num_devices=world_size,
        devices_per_node=min(per_node, world_size),
        sp_degrees=tuple(degrees),
        compute=Compute(quadratic_s=c.quadratic_s, linear_s=c.linear_s, fixed_s=c.fixed_s),
        all_to_all=AllToAll(
            bytes_per_token=bytes_per_token,
            bandwidth_bytes_per_s={d: bytes_per_token / (d * max(s, 1e-15)) for d, s in c.exchange_s.items()},
            latency_s=dict(c.latency_s),
        ),
        memory=Memory(
            memory_bytes=int(memory_bytes),
            model_state_bytes=state_bytes,
            activation_bytes_per_token=per_token,
            policies={
                name: replace(p, activation_bytes_per_token=p.activation_bytes_per_token * measured.degree_factor)
                for name, p in measured.policies.items()
            },
        ),
        layouts=measured.splits.layouts,
        optimizer_s=measured.optimizer_s,
        tables=measured.fit.tables(measured.layers),
        provenance={
            "source": "measured",
            "device": device_name(device),
            "date": datetime.date.today().isoformat(),
            "versions": {
                "flexsp": flexsp.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "python": platform.python_version(),
            },
            "memory_limit": said,
            **artificial,
            "margin_bytes": int(margin_bytes),
            "memory_of_degrees": round(measured.degree_factor, 4),
            "measured_in_s": round(time.perf_counter() - began, 1),
            "fit": {
                "points": len(residuals),
                "residual_median": statistics.median(map(abs, residuals)),
                "residual_worst": max(map(abs, residuals)),
                "held_out": len(errors),
                "held_out_median": statistics.median(errors),
                "held_out_worst": max(errors),
            },
            "exchange_bytes_per_s": {str(d): dict(by) for d, by in measured.exchange_bytes_per_s.items()},
            **({"splits_s": {str(d): dict(by) for d, by in splits_s.items()}} if splits_s else {}),
            **measured.notes,
            "points": [
                {
                    "layers": r.part.layers, "head": r.part.head, "degree": r.point.degree,
                    "lengths": list(r.point.lengths), "micro_batches": r.point.count, "seconds": r.seconds,
                    "spread": round(r.spread, 3), "residual": round(residual, 4),
                }
                for r, residual in zip(measured.readings, residuals, strict=True)
            ],
        },
    )  # fmt: skip


def ranks_per_node() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))


def device_name(device: torch.device) -> str:
    """What the ranks run on, for people and for the key of a saved profile."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU rank, {os.cpu_count()} cores a machine"


def exchange_bytes_per_token(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Bytes that a token moves through the exchanges of forward and backward: q, k, v and the output, both ways.

    KV heads count as the model has them: what a degree repeats of them is in its effective bandwidth.
    """
    queries, kv = _widths(config)
    return int((2 * queries + 2 * kv) * dtype.itemsize * config.get_text_config().num_hidden_layers * 2)


def exchange_columns(config: PreTrainedConfig, degree: int) -> tuple[int, int]:
    """Numbers that a token sends at a degree: queries, keys and values (KV heads repeated), and the output."""
    queries, kv = _widths(config)
    heads = (
        getattr(config.get_text_config(), "num_key_value_heads", None) or config.get_text_config().num_attention_heads
    )
    repeats = math.lcm(heads, degree) // heads
    return queries + 2 * kv * repeats, queries


def _widths(config: PreTrainedConfig) -> tuple[int, int]:
    """Numbers of a token's queries, and of its keys."""
    text = config.get_text_config()
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    return heads * head_dim, kv_heads * head_dim


def from_first_rank(make: Callable[[], Made], groups: GroupPool) -> Made:
    """What rank 0 makes, or its ValueError, on all ranks."""
    held: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            held[0] = make()
        except ValueError as error:
            held[0] = error
    dist.broadcast_object_list(held, src=0, group=groups.control)
    if isinstance(held[0], ValueError):
        raise held[0]
    return cast(Made, held[0])
