"""A profile of the model and ranks at hand, measured through the real executor with all ranks busy.

1. Time micro-batches of one degree on all ranks: several mixes of tokens and lengths at degree 1, which give
   quadratic_s, linear_s and fixed_s; two sizes at every other degree, of which what those do not explain is the
   exchange: bandwidth and latency.
2. Measure activation bytes per token: on CUDA from the allocator's peak, on the CPU from what autograd saves.

It takes about `12 + 6 * degrees` steps of at most `probe_tokens` tokens a rank.
"""

from __future__ import annotations

import datetime
import logging
import math
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import transformers
from transformers import PreTrainedModel

import flexsp
from flexsp.data.batch import IntArray, PlannedBatch
from flexsp.parallel import GroupPool, check_degrees, forward_backward
from flexsp.plans import Group, MicroBatch, Plan
from flexsp.profile import AllToAll, Compute, Memory, Profile
from flexsp.profiler.fit import fit_nonnegative
from flexsp.profiler.memory import activation_bytes, model_state_bytes

log = logging.getLogger(__name__)

REPEATS = 3
"""Timings per point, of which the median counts."""
PROBE_TOKENS = 2048
"""Tokens of a rank in the largest timed micro-batch, where its memory holds as many."""
SLOWEST_EXCHANGE_SHARE = 1e-4
"""Where an exchange is too fast to be told from noise, it is taken as this share of its degree's compute."""


@dataclass(frozen=True, slots=True)
class Point:
    """One timed layout: every group of `degree` holds sequences of these lengths, in `count` micro-batches."""

    degree: int
    lengths: tuple[int, ...]
    count: int = 1

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def squares(self) -> int:
        return sum(s * s for s in self.lengths)


def measure_profile(
    model: PreTrainedModel,
    groups: GroupPool,
    *,
    sp_degrees: Sequence[int],
    max_tokens_per_rank: int | None = None,
    memory_fraction: float = 0.9,
    param_dtype: torch.dtype | None = None,
) -> Profile:
    """Measures the profile of a prepared model. A collective; every rank gets the same profile.

    Args:
        model: from `prepare_model`; its gradients are cleared.
        groups: the pool.
        sp_degrees: degrees to measure.
        max_tokens_per_rank: an artificial memory limit; needed on the CPU.
        memory_fraction: of a CUDA device's memory that a plan may fill, where there is no such limit.
        param_dtype: what the model computes in, where that is not the type of its parameters.

    Raises:
        ValueError: a degree that the heads cannot serve, or no memory limit on the CPU.
    """
    world_size = dist.get_world_size()
    device = next(model.parameters()).device
    check_degrees(sp_degrees, model.config, world_size)
    if max_tokens_per_rank is None and device.type == "cpu":
        raise ValueError("max_tokens_per_rank is not set: a CPU has no memory limit of its own; give one in tokens")
    began = time.perf_counter()
    probe = _Probe(model, groups)
    tokens = min(PROBE_TOKENS, max_tokens_per_rank or PROBE_TOKENS)

    ones = _compute_points(tokens)
    seconds = [probe.seconds(point) for point in ones]
    features = np.array([[point.count, point.squares, point.tokens] for point in ones], dtype=np.float64)
    fixed_s, quadratic_s, linear_s = (float(c) for c in fit_nonnegative(features, np.array(seconds)))

    bytes_per_token = exchange_bytes_per_token(model, param_dtype or next(model.parameters()).dtype)
    bandwidths: dict[int, float] = {}
    latencies: dict[int, float] = {}
    for degree in (d for d in sp_degrees if d > 1):
        points = _exchange_points(tokens, degree)
        explained = [fixed_s + (quadratic_s * p.squares + linear_s * p.tokens) / degree for p in points]
        left_s = [max(0.0, probe.seconds(p) - e) for p, e in zip(points, explained, strict=True)]
        slope_s, latencies[degree] = _line([p.tokens for p in points], left_s)
        slope_s = max(slope_s, SLOWEST_EXCHANGE_SHARE * explained[0] / points[0].tokens)
        bandwidths[degree] = bytes_per_token / (degree * slope_s)

    state_bytes = model_state_bytes(model)
    per_token, at_rest = activation_bytes(lambda n: probe.once(Point(1, (n,))), tokens, device)
    if max_tokens_per_rank is not None:
        memory_bytes: float = state_bytes + math.ceil(per_token) * max_tokens_per_rank
        limit = f"artificial: max_tokens_per_rank={max_tokens_per_rank}"
    else:
        state_bytes = max(state_bytes, at_rest)
        memory_bytes = int(torch.cuda.get_device_properties(device).total_memory * memory_fraction)
        limit = f"memory_fraction={memory_fraction} of the device"
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    profile = Profile(
        name=f"{model.config.model_type} on {world_size} x {device_name(device)}",
        num_devices=world_size,
        devices_per_node=min(per_node, world_size),
        sp_degrees=tuple(sp_degrees),
        compute=Compute(quadratic_s=quadratic_s, linear_s=linear_s, fixed_s=fixed_s),
        all_to_all=AllToAll(
            bytes_per_token=bytes_per_token, bandwidth_bytes_per_s=bandwidths, latency_s=latencies
        ),
        memory=Memory(
            memory_bytes=memory_bytes,
            model_state_bytes=state_bytes,
            activation_bytes_per_token=math.ceil(per_token),
            policies={},
        ),
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
            "memory_limit": limit,
            "measured_in_s": round(time.perf_counter() - began, 1),
            "points": [
                {"degree": p.degree, "lengths": list(p.lengths), "micro_batches": p.count, "seconds": s}
                for p, s in probe.measured.items()
            ],
        },
    )  # fmt: skip
    return _same_on_all_ranks(profile, groups)


def device_name(device: torch.device) -> str:
    """What the ranks run on, for people and for the key of a saved profile."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU rank, {os.cpu_count()} cores a machine"


def exchange_bytes_per_token(model: PreTrainedModel, dtype: torch.dtype) -> int:
    """Bytes that a token moves through the exchanges of forward and backward: q, k, v and the output, both ways.

    KV heads count as the model has them: what a degree repeats of them is in its effective bandwidth.
    """
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int((2 * heads + 2 * kv_heads) * head_dim * dtype.itemsize * config.num_hidden_layers * 2)


def _compute_points(tokens: int) -> list[Point]:
    """Mixes that tell the three terms of compute apart: long, short, half as many, hardly any."""
    short = max(1, tokens // 16)
    return [
        Point(1, (tokens,)),
        Point(1, (tokens // 2, tokens // 2)),
        Point(1, (short,) * 16),
        Point(1, (short,) * 8),
        Point(1, (1,), count=4),
    ]


def _exchange_points(tokens: int, degree: int) -> list[Point]:
    """Short sequences, so that the exchange weighs as much as it can beside the compute."""
    short = max(1, tokens // 16)
    return [Point(degree, (short,) * (8 * degree)), Point(degree, (short,) * (2 * degree))]


def _line(tokens: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Slope and intercept, both >= 0, through two points given by descending tokens."""
    slope = max(0.0, (seconds[0] - seconds[1]) / (tokens[0] - tokens[1]))
    intercept = seconds[0] - slope * tokens[0]
    if intercept < 0:
        return seconds[0] / tokens[0], 0.0
    return slope, intercept


class _Probe:
    """Runs layouts on random tokens through the executor and keeps their times."""

    def __init__(self, model: PreTrainedModel, groups: GroupPool) -> None:
        self.model, self.groups = model, groups
        self.measured: dict[Point, float] = {}

    def seconds(self, point: Point) -> float:
        """Median seconds of the slowest rank, after a warm-up."""
        self.once(point)
        self.measured[point] = statistics.median(self.once(point) for _ in range(REPEATS))
        log.info("measured sp_degree %d, %d tokens a group: %.3f s", point.degree, point.tokens, self.measured[point])
        return self.measured[point]

    def once(self, point: Point) -> float:
        batch = _batch(point, dist.get_world_size(), self.model.config.get_text_config().vocab_size)
        return timed_step(self.model, batch, self.groups)


def timed_step(model: PreTrainedModel, batch: PlannedBatch, groups: GroupPool) -> float:
    """Seconds of forward and backward of one batch, of the slowest rank; gradients are cleared, weights untouched."""
    device = next(model.parameters()).device
    model.zero_grad()
    groups.prepare([batch.plan])
    dist.barrier(group=groups.control)
    began = time.perf_counter()
    forward_backward(model, batch, groups)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX, group=groups.control)
    model.zero_grad()
    return seconds.item()


class _RandomTokens:
    """A SequenceSource of random tokens; every one has a label, so that a row of one token has something to learn."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def read(self, sequence: int, start: int, stop: int) -> tuple[IntArray, IntArray]:
        tokens = np.random.default_rng([sequence, start]).integers(0, self.vocab_size, stop - start)
        return tokens, tokens


def _batch(point: Point, world_size: int, vocab_size: int) -> PlannedBatch:
    """As many groups of the point's degree as there is room for, alike."""
    micro_batches, num_sequences = [], 0
    for _ in range(point.count):
        built = []
        for start in range(0, world_size - point.degree + 1, point.degree):
            ids = tuple(range(num_sequences, num_sequences + len(point.lengths)))
            built.append(Group(ranks=tuple(range(start, start + point.degree)), sequences=ids))
            num_sequences += len(ids)
        micro_batches.append(MicroBatch(groups=tuple(built)))
    return PlannedBatch(
        step=0,
        sequence_ids=np.arange(num_sequences),
        lengths=np.array(point.lengths * (num_sequences // len(point.lengths)), dtype=np.int64),
        plan=Plan(num_devices=world_size, micro_batches=tuple(micro_batches)),
        source=_RandomTokens(vocab_size),
    )


def _same_on_all_ranks(profile: Profile, groups: GroupPool) -> Profile:
    held = [profile]
    dist.broadcast_object_list(held, src=0, group=groups.control)
    return held[0]
