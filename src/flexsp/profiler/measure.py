"""A profile of a prepared model on the ranks at hand, measured through the real executor with all ranks busy.

0. Choose how every degree splits into heads x context: the fastest (`splits`).
1. Time rows of like sequences at every degree (`points`), in rounds, and every degree's exchange by itself, by
   placement.
2. Fit the cost model to all of them at once (`fit`), and try it on mixed micro-batches that the fit has not seen.
3. Time the optimizer's step; measure the peak bytes of rows of several sizes (`memory`).

`layers` does the same with few layers of a model that is not at hand.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig, PreTrainedModel

from flexsp.parallel import GroupPool, check_degrees, default_layouts
from flexsp.parallel.control import from_first_rank
from flexsp.profile import Profile
from flexsp.profiler.fit import Fit
from flexsp.profiler.make import Limit, Measured, exchange_bytes_per_token, exchange_columns, make_profile
from flexsp.profiler.memory import OPTIMIZER_COPIES, PeakFit, held_bytes, peak_fit, shard_bytes
from flexsp.profiler.points import Mix, Part, Point, fit_points, held_out_mixes
from flexsp.profiler.policies import at_rest_bytes, measurable, read_policies, residual_bytes, whole_policies
from flexsp.profiler.probe import ROUNDS, Probe, Reading, but_the_slowest
from flexsp.profiler.splits import measured_splits
from flexsp.track import Track, silent

PROBE_TOKENS = {"cpu": 2048, "cuda": 32768}
"""Tokens of a rank in the largest timed micro-batch, where its memory holds as many."""
FIRST_TOKENS = 2048
"""Tokens of a rank whose memory is measured before larger rows are tried."""
HELD_OUT = 6
"""Mixed micro-batches on which the fit is tried."""


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
    at_rest = max(peaks.at_rest_bytes, at_rest_bytes([under]))
    shard = shard_bytes(model)
    measured = Measured(
        config=model.config,
        num_parameters=sum(p.numel() for p in model.parameters()),
        dtype=dtype,
        weights_dtype=next(model.parameters()).dtype,
        probe_tokens=tokens,
        kernels=probe.kernels,
        readings=readings,
        fit=fit,
        splits=splits,
        layers=1,
        exchange_bytes_per_s=alone_bytes_per_s(alone, tokens, model.config, dtype),
        held_out=[fit.for_part(probe.part).mix_s(mix) / seconds - 1.0 for mix, seconds in tried],
        optimizer_s=probe.optimizer_s(),
        state_bytes=at_rest + OPTIMIZER_COPIES * shard,
        unsharded_bytes=max(0.0, at_rest - 2 * shard),  # parameters and gradients are at rest too
        activation_bytes_per_token=peaks.bytes_per_token,
        residual_bytes=max(peaks.residual_bytes, residual_bytes([under])),
        peaks=[(probe.part, peaks.peaks)],
        policies=whole_policies(under),
        degree_factor=factor,
    )
    return from_first_rank(lambda: make_profile(measured, sp_degrees, probe.device, limit, began), groups)


def read_points(
    probe: Probe, points: Sequence[Point], mixes: Sequence[Mix], track: Track, what: str = "measuring"
) -> tuple[list[Reading], list[tuple[Mix, float]]]:
    """Times points, and mixed micro-batches for trying the fit on: those with their seconds. All of them in rounds."""
    items: list[Point | Mix] = [*points, *mixes]
    taken: list[list[float]] = [[] for _ in items]
    for (item, seconds), say in track([*zip(items, taken, strict=True)] * ROUNDS, what):
        mixed = not isinstance(item, Point)
        seconds += probe.times([item] if mixed else item.mixes(probe.world_size))
        row = "mixed, held out" if mixed else str(item)
        say(f"{row}: {statistics.fmean(but_the_slowest(seconds)):.4f} s")
    readings = [Reading.of(point, probe.part, seconds) for point, seconds in zip(points, taken, strict=False)]
    means = [statistics.fmean(but_the_slowest(seconds)) for seconds in taken[len(points) :]]
    return readings, list(zip(mixes, means, strict=True))


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
        peaks=own.peaks,
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
