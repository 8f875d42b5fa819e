"""From what was measured to a profile: the fit as coefficients, memory as a limit and bytes, and where all is from."""

from __future__ import annotations

import datetime
import math
import os
import platform
import statistics
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
import transformers
from transformers import PreTrainedConfig

import flexsp
from flexsp.parallel.widths import Widths, attention_widths
from flexsp.profile import AllToAll, Compute, Memory, Policy, Profile
from flexsp.profiler.fit import Fit
from flexsp.profiler.memory import LEAST_MARGIN, memory_limit
from flexsp.profiler.points import Part
from flexsp.profiler.probe import Reading
from flexsp.profiler.splits import Splits


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """All that was measured, before it becomes a profile. Bytes are of one rank of the whole model."""

    config: PreTrainedConfig
    num_parameters: int
    dtype: torch.dtype
    """What is computed in."""
    weights_dtype: torch.dtype
    """What weights are kept in."""
    probe_tokens: int
    """Of a rank in the largest row of degree 1 that was timed."""
    kernels: Collection[str]
    """Attention's."""
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
    unsharded_bytes: float
    """Of `state_bytes`, what is the same however many ranks share the rest."""
    activation_bytes_per_token: float
    """At degree 1."""
    degree_factor: float
    """How much more a token takes at the degree that holds most."""
    residual_bytes: float
    peaks: Sequence[tuple[Part, Sequence[tuple[int, int]]]]
    """By part, (tokens, bytes) of the rows whose peaks were taken, of this rank."""
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
        name=f"{measured.config.model_type} of {_size(measured.num_parameters)} parameters on {world_size} x "
        f"{device_name(device)}",
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
            unsharded_bytes=math.floor(measured.unsharded_bytes),
        ),
        layouts=measured.splits.layouts,
        optimizer_s=measured.optimizer_s,
        tables=measured.fit.tables(measured.layers),
        provenance={
            "source": "measured",
            "device": device_name(device),
            "date": datetime.date.today().isoformat(),
            "versions": _versions(device),
            "num_parameters": measured.num_parameters,
            "dtype": _dtype_name(measured.dtype),
            "weights": _dtype_name(measured.weights_dtype),
            "attention": sorted(measured.kernels),
            "probe_tokens": measured.probe_tokens,
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
            "peaks": [
                {"layers": part.layers, "head": part.head, "tokens": tokens, "bytes": peak}
                for part, peaks in measured.peaks
                for tokens, peak in peaks
            ],
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


def _versions(device: torch.device) -> dict[str, str]:
    found = {
        "flexsp": flexsp.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    if device.type == "cuda":
        found["cuda"] = str(torch.version.cuda)
        if torch.distributed.is_nccl_available():
            found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _size(number: int) -> str:
    """8.03B, 12.4M, 3,200."""
    for unit, of in (("B", 1e9), ("M", 1e6)):
        if number >= of:
            return f"{number / of:.3g}{unit}"
    return f"{number:,}"


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
    numbers = sum(sum(_columns(each, each.kv_heads)) for each in attention_widths(config))
    return int(numbers * dtype.itemsize * 2)


def exchange_columns(config: PreTrainedConfig, degree: int) -> tuple[int, int]:
    """Numbers that a token sends at a degree: queries, keys and values (KV heads repeated), and the output.

    Of one layer, the mean of all where they differ.
    """
    widths, layers = attention_widths(config), config.get_text_config().num_hidden_layers
    columns = [_columns(each, math.lcm(each.kv_heads, degree)) for each in widths]
    there, back = (-(-sum(numbers) // layers) for numbers in zip(*columns, strict=True))
    return there, back


def _columns(widths: Widths, kv_heads: int) -> tuple[int, int]:
    """Numbers of a token's queries, keys and values, and of its output, with so many KV heads."""
    there = widths.heads * widths.head_dim + kv_heads * (widths.head_dim + widths.value_dim)
    return there, widths.heads * widths.value_dim
