"""The seconds of a profile, each from a model's shape and a cluster's figures.

Letters: d = sp_degree, g = devices per node, n = nodes, P = parameters, N = heads, K = KV heads. Ulysses trades among
`ulysses` consecutive ranks of a group, all of them unless it has a ring; `splits` has the ring's part.
"""

from __future__ import annotations

import math
from collections import Counter

from flexsp.estimate.cluster import DTYPES, Cluster
from flexsp.estimate.shape import FP32_BYTES, ModelShape

EXCHANGES_PER_LAYER = 4
"""All-to-alls of one layer: q, k, v in one and the output in one, forward, and the same backward."""
OPTIMIZER_PASSES = 7
"""Numbers per parameter that Adam moves, in the type that weights are kept in: weight, gradient and moments read,
weight and moments written."""


def quadratic_s(shape: ModelShape, cluster: Cluster, dtype: str) -> float:
    """Seconds of attention per token squared, on one device."""
    return shape.attention_flops_per_square() / (cluster.peak_flops_per_s[dtype] * cluster.attention_efficiency)


def linear_s(shape: ModelShape, cluster: Cluster, dtype: str, *, loss_in_chunks: bool = True) -> float:
    """Seconds per token of everything else, on one device.

    Args:
        shape: the model.
        cluster: the device.
        dtype: what the model computes in.
        loss_in_chunks: whether rows are above one chunk of the loss, so that the backward runs the head forward again.
    """
    flops = shape.linear_flops_per_token()
    if loss_in_chunks:
        flops += shape.flops_by_kind()["head"] // 3  # a forward is a third of forward and backward
    return matrices_s(flops, cluster, dtype)


def matrices_s(flops: float, cluster: Cluster, dtype: str) -> float:
    """Seconds of so many FLOPs in matrix products, on one device."""
    return flops / (cluster.peak_flops_per_s[dtype] * cluster.linear_efficiency)


def gather_s(num_bytes: float, cluster: Cluster) -> float:
    """Seconds of an all-gather of so many bytes to all devices, or of the reduce-scatter of as many.

    Inside a node each device receives what it does not hold over its links. Across nodes each node receives what it
    does not hold through its network cards; both run at once, so the slower one counts.
    """
    devices, nodes = cluster.num_devices, cluster.num_nodes
    if devices == 1:
        return 0.0
    inside = min(devices, cluster.devices_per_node)
    seconds = 0.0
    if inside > 1:
        rate = cluster.links_bytes_per_s(inside) * cluster.gather_link_efficiency
        seconds = num_bytes * (inside - 1) / inside / rate
    if nodes > 1:
        rate = cluster.devices_per_node * cluster.nic_bytes_per_s * cluster.gather_nic_efficiency
        seconds = max(seconds, num_bytes * (nodes - 1) / nodes / rate)
    return seconds


def parameter_traffic_s(
    shape: ModelShape, cluster: Cluster, dtype: str, zero_stage: int, reduce_dtype: str
) -> tuple[float, float]:
    """Seconds of parameters' and gradients' traffic that compute does not hide: per micro-batch, and per step.

    ZeRO-3 gathers the parameters in the forward and again in the backward and reduces the gradients, for every
    micro-batch. ZeRO-2 reduces the gradients of every micro-batch and gathers once a step; ZeRO-1 does both once.
    """
    gather = gather_s(shape.num_parameters * DTYPES[dtype], cluster)
    reduce = gather_s(shape.num_parameters * DTYPES[reduce_dtype], cluster)
    per_micro_batch = {1: 0.0, 2: reduce, 3: 2 * gather + reduce}[zero_stage]
    per_step = {1: reduce + gather, 2: gather, 3: 0.0}[zero_stage]
    return cluster.gather_exposed * per_micro_batch, per_step


def optimizer_s(shape: ModelShape, cluster: Cluster, per_step_s: float, weight_bytes: int = FP32_BYTES) -> float:
    """Seconds of Adam on this device's share of the parameters, and of what is gathered once a step."""
    moved_bytes = OPTIMIZER_PASSES * weight_bytes * shape.num_parameters / cluster.num_devices
    return moved_bytes / cluster.memory_bytes_per_s + per_step_s


def kv_repetition(shape: ModelShape, ulysses: int) -> float:
    """What an exchange carries over what `exchange_bytes_per_token` counts: KV heads are repeated to lcm(K, ranks)."""
    repeated = math.lcm(shape.num_kv_heads, ulysses)
    return (shape.num_heads + repeated) / (shape.num_heads + shape.num_kv_heads)


def exchange_bytes_per_s(cluster: Cluster, ulysses: int, ring: int = 1) -> float:
    """Bandwidth of Ulysses' exchange in a group of `ulysses x ring` ranks, per device, of all bytes that it holds.

    Per byte, the sum of: the part for the other devices of its node over the links, the part for other nodes over the
    network cards, and the copies that pack and unpack it. It is that of the slowest device, where the ranks that trade
    do not fill their nodes.
    """
    if ulysses < 2:
        raise ValueError(f"ulysses={ulysses} exchanges nothing; ask for 2 or more")
    inside = {count for nodes in _nodes_of_ulysses(cluster, ulysses, ring) for count in nodes.values()}
    return 1 / max(_exchange_s_per_byte(cluster, ulysses, count) for count in inside)


def _exchange_s_per_byte(cluster: Cluster, ulysses: int, inside: int) -> float:
    """Seconds of a device that has `inside` of the ranks that trade, itself one of them, in its node."""
    s_per_byte = cluster.exchange_copies / cluster.memory_bytes_per_s
    if inside > 1:
        links = cluster.links_bytes_per_s(inside) * cluster.exchange_link_efficiency
        s_per_byte += (inside - 1) / ulysses / links
    s_per_byte += (ulysses - inside) / ulysses / (cluster.nic_bytes_per_s * cluster.exchange_nic_efficiency)
    return s_per_byte


def exchange_latency_s(shape: ModelShape, cluster: Cluster, ulysses: int, ring: int = 1) -> float:
    """Seconds that the all-to-alls of a micro-batch take beside their bytes."""
    other_nodes = max(len(nodes) for nodes in _nodes_of_ulysses(cluster, ulysses, ring)) - 1
    once = cluster.exchange_launch_s + other_nodes * cluster.exchange_node_s
    return EXCHANGES_PER_LAYER * shape.num_layers * once


def _nodes_of_ulysses(cluster: Cluster, ulysses: int, ring: int) -> list[Counter[int]]:
    """How many ranks of each node trade with one another, for every ring rank of a group that starts at a node."""
    return [
        Counter(rank // cluster.devices_per_node for rank in range(first, first + ulysses))
        for first in range(0, ulysses * ring, ulysses)
    ]
