"""A profile of a model that is not at hand, from few of its layers: flexsp never builds the whole of it.

Three parts of the model are built one after another and run through the real executor:

    few layers, a small vocabulary      all points of the fit
    one layer, a small vocabulary       what a layer costs, by difference
    one layer, the whole vocabulary     what the output head, the embedding and the loss cost, by difference

The fit has the seconds of a layer and those of the head as unknowns of its own (`fit`) and gives them for all layers.
Bytes a token, peaks at rest and the optimizer's step are put together the same way. All layers must be alike.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig

from flexsp.estimate import ModelShape, model_shape
from flexsp.parallel import GroupPool, check_degrees, default_layouts, prepare_model
from flexsp.parallel.control import from_first_rank
from flexsp.profile import Profile
from flexsp.profiler.fit import Fit
from flexsp.profiler.make import Limit, Measured, make_profile
from flexsp.profiler.measure import (
    HELD_OUT,
    alone_bytes_per_s,
    degree_factor,
    exchange_alone,
    measured_peaks,
    read_points,
)
from flexsp.profiler.memory import OPTIMIZER_COPIES, PeakFit, shard_bytes
from flexsp.profiler.parts import HEAD_TOKENS, SMALL_VOCABULARY, build_part, parts_of
from flexsp.profiler.points import MANY, Mix, Part, Point, fit_points, held_out_mixes
from flexsp.profiler.policies import PolicyReading, measurable, policies_by_parts, read_policies
from flexsp.profiler.policies import residual_bytes as residual_under
from flexsp.profiler.probe import Probe, Reading
from flexsp.profiler.splits import Splits, measured_splits
from flexsp.track import Track, silent


def measure_layers(
    config: PreTrainedConfig,
    groups: GroupPool,
    *,
    sp_degrees: Sequence[int],
    probe_tokens: int,
    device: torch.device,
    memory_fraction: float = 0.9,
    param_dtype: torch.dtype | None = None,
    weights_dtype: torch.dtype = torch.float32,
    activation_checkpointing: bool = False,
    shard_layers: bool = True,
    sharded_over: int | None = None,
    max_tokens_per_rank: int | None = None,
    policies: Sequence[str] = (),
    track: Track = silent,
) -> Profile:
    """Measures the profile of a model that is given by its config. A collective; every rank gets the same profile.

    Args:
        config: of a causal language model.
        groups: the pool.
        sp_degrees: degrees to measure.
        probe_tokens: tokens of a rank in the largest timed micro-batch.
        device: of this rank.
        memory_fraction: of a rank's memory that a plan may fill.
        param_dtype: what the model computes in; by default the type of its weights.
        weights_dtype: what weights, gradients and optimizer states are kept in.
        activation_checkpointing: recompute each layer in the backward.
        shard_layers: gather parameters layer by layer, as `prepare_model` has it.
        sharded_over: devices over which the model states are taken to be sharded; by default the ranks.
        max_tokens_per_rank: an artificial memory limit.
        policies: activation policies to measure; a plan may then choose among them.
        track: shows progress.

    Raises:
        ValueError: a model that cannot be run exactly, a degree that the heads cannot serve, a policy that the model
            does not run, or no memory left for activations.
    """
    check_degrees(sp_degrees, config, dist.get_world_size(), default_layouts(config, sp_degrees))
    shape = model_shape(config.to_dict())
    began, dtype = time.perf_counter(), param_dtype or weights_dtype
    limit = Limit(max_tokens_per_rank=max_tokens_per_rank, fraction=memory_fraction)
    done: list[_PartDone] = []
    for part in parts_of(shape):
        vocabulary = max(1, round(part.head * shape.vocab_size))
        model = build_part(config, part.layers, vocabulary, probe_tokens * max(sp_degrees), device, weights_dtype)
        prepare_model(
            model,
            param_dtype=param_dtype,
            activation_checkpointing=activation_checkpointing,
            shard_layers=shard_layers,
        )
        if not done:
            policies = measurable(policies, model, device)
        probe = Probe(model, groups, part)
        done.append(_run_part(probe, shape, probe_tokens, sp_degrees, limit, dtype, policies, track, first=not done))
        del model, probe
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    first = done[0]
    fit = Fit(
        [reading for each in done for reading in each.readings],
        sp_degrees,
        {d: max(by.values()) / (probe_tokens * d) for d, by in first.alone.items()},
    )
    said = fit.for_part(first.part)
    devices = sharded_over or dist.get_world_size()
    per_token, residual_bytes = whole_model_tokens(done, shape)
    gathered_itemsize = dtype.itemsize if shard_layers else None
    share, whole = whole_model_states(done, shape, devices, weights_dtype.itemsize, gathered_itemsize)
    layers = 1 if first.part.whole else shape.num_layers
    measured = Measured(
        config=config,
        num_parameters=shape.num_parameters,
        dtype=dtype,
        weights_dtype=weights_dtype,
        probe_tokens=probe_tokens,
        kernels=first.kernels,
        readings=[reading for each in done for reading in each.readings],
        fit=fit,
        splits=first.splits,
        layers=layers,
        exchange_bytes_per_s=alone_bytes_per_s(first.alone, probe_tokens, config, dtype),
        held_out=[said.mix_s(mix) / seconds - 1.0 for mix, seconds in first.tried],
        optimizer_s=first.optimizer_s * weights_dtype.itemsize * shape.num_parameters / devices / first.shard_bytes,
        state_bytes=share + whole,
        unsharded_bytes=whole,
        activation_bytes_per_token=per_token,
        degree_factor=first.degree_factor,
        residual_bytes=residual_bytes,
        peaks=[(each.part, each.peaks.peaks) for each in done],
        policies=policies_by_parts(
            [each.policies for each in done],
            lambda values: _by_difference(done, values, shape),
            fit.for_layers(layers).mix_s,
        ),
        notes={
            "shard_layers": shard_layers,
            "activation_checkpointing": activation_checkpointing,
            "assumptions": []
            if first.part.whole
            else [
                f"measured on {', '.join(str(each.part.layers) for each in done)} layers with vocabularies of "
                f"{', '.join(str(round(each.part.head * shape.vocab_size)) for each in done)}, put together for "
                f"{shape.num_layers} layers and {shape.vocab_size}; all layers alike"
            ],
        },
    )
    return from_first_rank(lambda: make_profile(measured, sp_degrees, device, limit, began), groups)


@dataclass(frozen=True, slots=True, kw_only=True)
class _PartDone:
    """What one part gave."""

    part: Part
    readings: list[Reading]
    tried: list[tuple[Mix, float]]
    alone: dict[int, dict[str, float]]
    splits: Splits
    optimizer_s: float
    peaks: PeakFit
    degree_factor: float
    policies: Mapping[str, PolicyReading]
    shard_bytes: int
    kernels: frozenset[str]


def _run_part(
    probe: Probe,
    shape: ModelShape,
    probe_tokens: int,
    degrees: Sequence[int],
    limit: Limit,
    dtype: torch.dtype,
    policies: Sequence[str],
    track: Track,
    first: bool,
) -> _PartDone:
    """Times one part; the first also at all degrees, with its exchange, held-out rows and optimizer."""
    part = probe.part
    full_head = part.head == 1.0 and not part.whole and shape.vocab_size > SMALL_VOCABULARY
    tokens = min(probe_tokens, HEAD_TOKENS) if full_head else probe_tokens
    points = _head_points(tokens) if full_head else fit_points(tokens, degrees if first else [1])
    mixes = held_out_mixes(tokens, degrees, probe.world_size, HELD_OUT) if first else []
    splits = measured_splits(probe, tokens, degrees, track) if first else Splits(layouts={}, seconds={})
    probe.layouts = splits.layouts
    what = f"measuring {part.layers} of {shape.num_layers} layers{', whole vocabulary' if full_head else ''}"
    readings, tried = read_points(probe, points, mixes, track, what)
    room_bytes = None if full_head else limit.room_bytes(probe.device)
    peaks_of = partial(measured_peaks, tokens=tokens, room_bytes=room_bytes)
    return _PartDone(
        part=part,
        readings=readings,
        tried=tried,
        alone=exchange_alone(probe, tokens, degrees, dtype) if first else {},
        splits=splits,
        optimizer_s=probe.optimizer_s() if first else 0.0,
        peaks=peaks_of(probe),
        degree_factor=degree_factor(probe, tokens, degrees) if first and room_bytes is not None else 1.0,
        policies=read_policies(probe, policies, tokens, peaks_of, track, timed=not full_head),
        shard_bytes=shard_bytes(probe.model),
        kernels=frozenset(probe.kernels),
    )


def _head_points(tokens: int) -> list[Point]:
    """Rows of short sequences, in which the head weighs most."""
    short = max(1, tokens // MANY)
    return [Point(1, (1,), count=4), *(Point(1, (short,) * count) for count in (MANY, MANY // 2))]


def _by_difference(done: Sequence[_PartDone], values: Sequence[float], shape: ModelShape) -> float:
    """What a number of each part comes to for the whole model: so much a layer, so much for head and embedding."""
    first, last, whole = done[0].part, done[-1].part, values[0]
    if first.whole:
        return whole
    one = next((value for each, value in zip(done[1:], values[1:], strict=True) if each.part.layers == 1), whole)
    if first.layers > 1:
        whole += (shape.num_layers - first.layers) * max(0.0, values[0] - one) / (first.layers - 1)
    if last.head == 1.0 and first.head < 1.0:
        whole += max(0.0, values[-1] - one)
    return whole


def whole_model_tokens(done: Sequence[_PartDone], shape: ModelShape) -> tuple[float, float]:
    """Activation bytes a token of a rank of the whole model, and the worst residual of any part's peak.

    The residual is mostly what the process does beside, so it is not taken to grow with the layers.
    """
    per_token = _by_difference(done, [each.peaks.bytes_per_token for each in done], shape)
    return per_token, max(residual_under([each.policies for each in done]), *(e.peaks.residual_bytes for e in done))


def whole_model_states(
    done: Sequence[_PartDone], shape: ModelShape, devices: int, weight_bytes: int, gathered_itemsize: int | None
) -> tuple[float, float]:
    """Bytes of a rank of the whole model whatever the tokens: its share of what is sharded, and what it holds whole.

    The share is of weights, gradients and optimizer states. Whole is what a part held at rest beyond its own shards of
    parameters and gradients: the process, and whatever was gathered. Layer by layer that is the most of any part and a
    layer more (the one that is fetched ahead); all at once it grows with the layers.

    Args:
        done: the parts.
        shape: of the whole model.
        devices: over which it is sharded.
        weight_bytes: of a parameter as it is kept.
        gathered_itemsize: bytes of a gathered parameter; None where all are gathered at once.
    """
    beside = [max(0.0, each.peaks.at_rest_bytes - 2 * each.shard_bytes) for each in done]
    if gathered_itemsize is None:
        held = _by_difference(done, beside, shape)
    else:
        ahead = 0 if done[0].part.whole else gathered_itemsize * shape.layer_parameters
        held = max(beside) + ahead
    return (2 + OPTIMIZER_COPIES) * weight_bytes * shape.num_parameters / devices, held
