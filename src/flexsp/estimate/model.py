"""A profile from a model's shape and a cluster's data sheets; docs/estimate.md gives each formula and its source."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import flexsp
from flexsp.estimate import memory, seconds, splits
from flexsp.estimate.cluster import DTYPES, Cluster
from flexsp.estimate.shape import ModelShape
from flexsp.loss_chunks import chunk_tokens
from flexsp.profile import AllToAll, Compute, Memory, Profile

ZERO_STAGES = (1, 2, 3)


def estimate_profile(
    shape: ModelShape,
    cluster: Cluster,
    *,
    num_devices: int | None = None,
    sp_degrees: Sequence[int] | None = None,
    dtype: str = "bfloat16",
    weights: str = "float32",
    memory_fraction: float = 0.9,
    zero_stage: int = 3,
    reduce_dtype: str = "float32",
    date: str | None = None,
) -> Profile:
    """A profile of a model on a cluster that need not be there.

    Args:
        shape: the model.
        cluster: what the devices and links are.
        num_devices: how many devices; by default as many as the cluster file says.
        sp_degrees: the degrees of plans; by default the powers of two. Any degree will do: what the heads do not
            divide, or what is sooner so, splits into heads x context, and `layouts` of the profile says how.
        dtype: what the model computes in.
        weights: what weights, gradients and optimizer states are kept in.
        memory_fraction: of a device's memory that a plan may fill.
        zero_stage: what is sharded over all devices; 3 is what the executor does.
        reduce_dtype: what gradients are reduced in; float32 is what the executor does.
        date: noted in the profile, e.g. "2026-01-31".

    Raises:
        ValueError: an argument is out of range, or the model does not fit; the message says what would make it fit.
    """
    for name, value in (("dtype", dtype), ("weights", weights), ("reduce_dtype", reduce_dtype)):
        if value not in DTYPES:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(DTYPES)}")
    if zero_stage not in ZERO_STAGES:
        raise ValueError(f"zero_stage={zero_stage} is unknown; choose one of {', '.join(map(str, ZERO_STAGES))}")
    if not 0 < memory_fraction <= 1:
        raise ValueError(f"memory_fraction={memory_fraction} must be above 0 and at most 1; leave some for the driver")
    if dtype == "float32":
        reduce_dtype = "float32"  # gradients are computed in no less
    cluster = cluster.with_devices(cluster.num_devices if num_devices is None else num_devices)
    degrees = _degrees(cluster.num_devices, sp_degrees)
    per_micro_batch_s, per_step_s = seconds.parameter_traffic_s(shape, cluster, dtype, zero_stage, reduce_dtype)
    room = _memory(shape, cluster, dtype, weights, zero_stage, memory_fraction)
    rank_tokens = (room.memory_bytes - room.model_state_bytes) / room.activation_bytes_per_token
    tried = {d: splits.splits_of(shape, cluster, d, dtype, rank_tokens) for d in degrees if d > 1}
    chosen = {d: splits.soonest(each) for d, each in tried.items()}
    provenance = _provenance(shape, cluster, dtype, weights, memory_fraction, zero_stage, reduce_dtype, date)
    return Profile(
        name=f"{shape.name} on {cluster.num_devices} x {cluster.device}",
        num_devices=cluster.num_devices,
        devices_per_node=min(cluster.devices_per_node, cluster.num_devices),
        sp_degrees=degrees,
        compute=Compute(
            quadratic_s=seconds.quadratic_s(shape, cluster, dtype),
            linear_s=seconds.linear_s(shape, cluster, dtype),
            fixed_s=per_micro_batch_s + shape.num_layers * cluster.layer_launch_s,
        ),
        all_to_all=AllToAll(
            bytes_per_token=shape.exchange_bytes_per_token(DTYPES[dtype]),
            bandwidth_bytes_per_s={d: split.bandwidth_bytes_per_s for d, split in chosen.items()},
            latency_s={d: split.latency_s for d, split in chosen.items()},
        ),
        memory=room,
        layouts={d: split.layout for d, split in chosen.items() if split.layout.ring > 1},
        optimizer_s=seconds.optimizer_s(shape, cluster, per_step_s, DTYPES[weights]),
        provenance=splits.explained(provenance, tried, chosen),
    )


def _degrees(num_devices: int, sp_degrees: Sequence[int] | None) -> tuple[int, ...]:
    """The degrees of plans: any that the devices can form."""
    if sp_degrees is None:
        return tuple(1 << power for power in range(num_devices.bit_length()))
    for degree in sp_degrees:
        if not 1 <= degree <= num_devices:
            raise ValueError(
                f"sp_degree={degree} must be between 1 and num_devices={num_devices}; use another or more devices"
            )
    return tuple(sorted(set(sp_degrees)))


def _memory(
    shape: ModelShape, cluster: Cluster, dtype: str, weights: str, zero_stage: int, memory_fraction: float
) -> Memory:
    share, whole = _held_bytes(shape, cluster, dtype, weights, zero_stage, memory_fraction)
    return Memory(
        memory_bytes=math.floor(cluster.memory_bytes * memory_fraction),
        model_state_bytes=math.ceil(share + whole),
        activation_bytes_per_token=shape.activation_bytes_per_token("none", DTYPES[dtype]),
        policies=memory.policies(shape, cluster, dtype),
        unsharded_bytes=math.floor(whole),
    )


def _held_bytes(
    shape: ModelShape, cluster: Cluster, dtype: str, weights: str, zero_stage: int, memory_fraction: float
) -> tuple[float, float]:
    """What a device holds whatever its tokens: its share of the model states, and what it holds whole, with a chunk of
    the loss.

    Raises:
        ValueError: it leaves no room for the activations of a token.
    """
    share, whole = memory.model_state_bytes(shape, cluster.num_devices, dtype, zero_stage, DTYPES[weights])
    room = cluster.memory_bytes * memory_fraction
    least_room = memory.least_room_bytes(shape, dtype)
    if share + whole + least_room <= room:
        return share, whole + memory.loss_bytes(shape, dtype, room - share - whole)
    needed = (share + whole) / 2**30
    short = (
        f"model states of {needed:.1f} GiB a device leave no room for loss and activations in {room / 2**30:.1f} GiB "
        f"({memory_fraction:g} of {cluster.device})"
    )
    left = room - whole - least_room
    if left > 0:
        least = math.ceil(share * cluster.num_devices / left)
        if least > cluster.devices_per_node:
            least = math.ceil(least / cluster.devices_per_node) * cluster.devices_per_node
        raise ValueError(f"num_devices={cluster.num_devices}: {short}; use at least {least} devices")
    if zero_stage < 3:
        raise ValueError(f"zero_stage={zero_stage}: {short}, on any number of devices; use zero_stage 3")
    raise ValueError(
        f"{shape.name}: {short}, on any number of devices: one layer's parameters and the embeddings are gathered "
        f"whole; use a device with more memory"
    )


def _provenance(
    shape: ModelShape,
    cluster: Cluster,
    dtype: str,
    weights: str,
    memory_fraction: float,
    zero_stage: int,
    reduce_dtype: str,
    date: str | None,
) -> dict[str, Any]:
    hidden = 1 - cluster.gather_exposed
    traffic = {
        1: "no parameter traffic within a micro-batch (ZeRO-1)",
        2: f"one reduce-scatter of gradients in {reduce_dtype} (ZeRO-2)",
        3: f"two all-gathers of the parameters in {dtype}, one reduce-scatter of gradients in {reduce_dtype} (ZeRO-3)",
    }[zero_stage]
    sources = {name: source for name, source in cluster.sources.items() if name != f"{_other(dtype)}_flops_per_s"}
    return {
        "source": "estimated",
        "device": f"{cluster.num_devices} x {cluster.device}, {cluster.name}",
        **({"date": date} if date else {}),
        "versions": {"flexsp": flexsp.__version__},
        "dtype": dtype,
        "weights": weights,
        "assumptions": [
            *shape.assumptions,
            "nothing was run; shares of the peak and of the links are those of the cluster file",
            "norms are fused kernels; eager ones hold more activations",
            f"a device's part of a row is above a chunk of the loss ({chunk_tokens(shape.vocab_size)} tokens), so the "
            "backward computes its logits again; shorter ones do not pay that",
            f"policies: compute_factor for sequences of {memory.POLICY_TOKENS} tokens; shorter ones pay more",
            f"{memory_fraction:g} of a device's memory may be filled; the rest is for the driver, NCCL and fragments",
        ],
        "sources": [f"{name}: {source}" for name, source in sources.items()],
        "fields": {
            "compute.quadratic_s": "7 FLOPs per token squared, head, head_dim and layer (causal FlashAttention-2) / "
            f"({cluster.attention_efficiency:g} of {_tera(cluster, dtype)} TFLOP/s)",
            "compute.linear_s": "6 FLOPs per parameter that a token multiplies with, and 2 more of the head's / "
            f"({cluster.linear_efficiency:g} of {_tera(cluster, dtype)} TFLOP/s)",
            "compute.fixed_s": f"{traffic}; {hidden:.0%} of it hidden behind compute; "
            f"{cluster.layer_launch_s:g} s of launches a layer",
            "all_to_all.bytes_per_token": f"q, k, v and output of every layer, forward and backward, in {dtype}",
            "all_to_all.bandwidth_bytes_per_s": "links inside the node, network cards across nodes, "
            f"{cluster.exchange_copies:g} copies through device memory; repeated KV heads counted in",
            "all_to_all.latency_s": f"{seconds.EXCHANGES_PER_LAYER} all-to-alls a layer",
            "memory.memory_bytes": f"{memory_fraction:g} of the device's memory",
            "memory.model_state_bytes": _state_field(zero_stage, dtype, weights),
            "memory.unsharded_bytes": "of model_state_bytes, all but what is sharded over the devices",
            "memory.activation_bytes_per_token": "what each layer keeps for its backward (after arXiv 2205.05198)",
            "memory.policies": "selective: norms and MLP computed again; full: whole layers computed again; "
            "offload: activations to the host and back",
            "optimizer_s": f"{seconds.OPTIMIZER_PASSES} numbers in {weights} of each parameter of the share through "
            "memory",
        },
    }


def _state_field(zero_stage: int, dtype: str, weights: str) -> str:
    states = f"weights whole in {dtype}, optimizer states over all devices (ZeRO-{zero_stage})"
    if zero_stage == 3:
        each = memory.STATES * DTYPES[weights]
        states = f"{each} bytes a parameter over all devices, what is gathered whole in {dtype} (ZeRO-3)"
    return f"{states}, and a chunk of the loss, or what it holds of the most tokens that fit"


def _tera(cluster: Cluster, dtype: str) -> str:
    return f"{cluster.peak_flops_per_s[dtype] / 1e12:g}"


def _other(dtype: str) -> str:
    return next(name for name in DTYPES if name != dtype)
