"""How a degree splits into heads x context: every split's exchange from the cluster's links, and which is the soonest.

A group of d = U x R ranks: U consecutive ranks trade tokens for heads (Ulysses), every U-th rank is on the same ring. A
ring step sends what a rank holds of keys and values to the next rank while it attends to them, which hides the step as
long as attention lasts; attention is the longer, the longer its sequences are, so a bandwidth holds for one length.

Letters: N = heads, K = KV heads, H = head_dim, L = lcm(K, U), e = bytes of an element.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flexsp.estimate import seconds
from flexsp.estimate.cluster import DTYPES, Cluster
from flexsp.estimate.memory import POLICY_TOKENS
from flexsp.estimate.shape import FP32_BYTES, ModelShape
from flexsp.profile import Layout

HIDING_TOKENS = POLICY_TOKENS
"""The length of sequences whose attention hides a ring's traffic: high degrees are for long ones."""
WORTH = 0.03
"""Of its seconds that a split with less Ulysses must save: what an estimate cannot tell apart."""
FORWARD = 2 / 7
"""Attention's forward as a share of forward and backward: two matrix products of seven."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """What a degree's exchange costs with one layout."""

    layout: Layout
    bandwidth_bytes_per_s: float
    """Effective: of the bytes that Ulysses alone would trade without repeating KV heads."""
    latency_s: float
    hiding_tokens: int
    """The length of sequences that the bandwidth holds for, where there is a ring."""
    ring_s: float
    """Seconds that the ring sends, per token of a device; 0 where there is none."""
    hidden_s: float
    """How many of them attention hides."""
    token_s: float
    """Seconds per token of a device, compute included, in a full row of sequences of `hiding_tokens`."""

    @property
    def name(self) -> str:
        """ "32x2": ulysses x ring."""
        return f"{self.layout.ulysses}x{self.layout.ring}"


def layouts_of(num_heads: int, degree: int) -> list[Layout]:
    """Every layout that serves a degree, the one with the most Ulysses first: its ranks must divide the heads."""
    return [
        Layout(ulysses=ulysses, ring=degree // ulysses)
        for ulysses in range(min(degree, num_heads), 0, -1)
        if degree % ulysses == 0 and num_heads % ulysses == 0
    ]


def splits_of(shape: ModelShape, cluster: Cluster, degree: int, dtype: str, rank_tokens: float) -> list[Split]:
    """Every split of a degree above 1, the one with the most Ulysses first.

    Args:
        shape: the model.
        cluster: the links.
        degree: of the group.
        dtype: what the model computes in.
        rank_tokens: tokens that a device's memory holds.
    """
    tokens = max(1, min(HIDING_TOKENS, math.floor(rank_tokens * degree)))
    return [
        _split(shape, cluster, layout, dtype, rank_tokens, tokens) for layout in layouts_of(shape.num_heads, degree)
    ]


def soonest(splits: Sequence[Split]) -> Split:
    """The split to use: of those within `WORTH` of the soonest, the first, which has the most Ulysses."""
    limit_s = min(split.token_s for split in splits) / (1 - WORTH)
    return next(split for split in splits if split.token_s <= limit_s)


def _split(shape: ModelShape, cluster: Cluster, layout: Layout, dtype: str, rank_tokens: float, tokens: int) -> Split:
    itemsize = DTYPES[dtype]
    bytes_per_token = shape.exchange_bytes_per_token(itemsize)
    attention_s = seconds.quadratic_s(shape, cluster, dtype) * tokens
    ring_s = hidden_s = exchange_s = latency_s = 0.0
    bandwidth = math.inf
    if layout.ulysses > 1:
        bandwidth = seconds.exchange_bytes_per_s(cluster, layout.ulysses, layout.ring)
        bandwidth /= seconds.kv_repetition(shape, layout.ulysses)
        exchange_s = bytes_per_token / bandwidth
        latency_s = seconds.exchange_latency_s(shape, cluster, layout.ulysses, layout.ring)
    if layout.ring > 1:
        keys_s, gradients_s = (each / step_bytes_per_s(cluster, layout) for each in step_bytes(shape, layout, itemsize))
        ring_s = 2 * (layout.ring - 1) * keys_s + layout.ring * gradients_s
        hidden_s = ring_s - exposed_s(keys_s, gradients_s, attention_s, layout.ring)
        exchange_s += ring_s - hidden_s + merged_bytes(shape, layout, itemsize) / cluster.memory_bytes_per_s
        latency_s += ring_latency_s(shape, cluster, layout)
        bandwidth = bytes_per_token / exchange_s
    work_s = attention_s + seconds.linear_s(shape, cluster, dtype)
    return Split(
        layout=layout,
        bandwidth_bytes_per_s=bandwidth,
        latency_s=latency_s,
        hiding_tokens=tokens,
        ring_s=ring_s,
        hidden_s=hidden_s,
        token_s=work_s + exchange_s + latency_s / rank_tokens,
    )


def step_bytes(shape: ModelShape, layout: Layout, itemsize: int) -> tuple[int, int]:
    """What a rank sends in one ring step, per token that it holds, over all layers: keys and values, their gradients.

    A rank holds L / U KV heads of the tokens of U ranks. Gradients travel in fp32.
    """
    numbers = 2 * math.lcm(shape.num_kv_heads, layout.ulysses) * shape.head_dim * shape.num_layers
    return numbers * itemsize, numbers * max(FP32_BYTES, itemsize)


def ring_bytes_per_token(shape: ModelShape, layout: Layout, itemsize: int) -> int:
    """What a token's keys and values send around the ring: R - 1 steps forward, as many in the backward, where their
    gradients take R, the last one home."""
    if layout.ring == 1:
        return 0
    keys, gradients = step_bytes(shape, layout, itemsize)
    return 2 * (layout.ring - 1) * keys + layout.ring * gradients


def merged_bytes(shape: ModelShape, layout: Layout, itemsize: int) -> float:
    """What putting a ring's parts together moves through device memory, per token, as the executor does it in fp32.

    A step meets all of a rank's queries once, the step with its own keys half of them once more. A number of the output
    is scaled in place (8 bytes), its part scaled (e + 4) and added (12); one of the queries' gradient is added (8 + e).
    One of the keys' and values' gradient is zeroed (4), added to (8 + e) and joined with what arrives (12).
    """
    meetings = layout.ring + 0.5
    queries = meetings * (32 + 2 * itemsize)
    keys = meetings * (8 + itemsize) + 4 * layout.ring + 12 * (layout.ring - 1)
    numbers = shape.num_heads * queries + 2 * math.lcm(shape.num_kv_heads, layout.ulysses) * keys
    return numbers * shape.head_dim * shape.num_layers


def hops(cluster: Cluster, layout: Layout) -> set[bool]:
    """Of the hops of a group's rings: whether each leaves its node."""
    degree, per_node = layout.ulysses * layout.ring, cluster.devices_per_node
    return {rank // per_node != (rank + layout.ulysses) % degree // per_node for rank in range(degree)}


def step_bytes_per_s(cluster: Cluster, layout: Layout) -> float:
    """Rate of a ring step, that of its slowest hop: all ranks wait for it.

    A hop inside a node has what joins two devices; one to another node has the device's own part of the network cards,
    though its neighbours may leave theirs idle. The shares reached are those of gathers, which are such rings too.
    """
    inside = cluster.links_bytes_per_s(2) * cluster.gather_link_efficiency
    across = cluster.nic_bytes_per_s * cluster.gather_nic_efficiency
    return min(across if leaves else inside for leaves in hops(cluster, layout))


def exposed_s(keys_s: float, gradients_s: float, attention_s: float, ring: int) -> float:
    """Seconds of a ring's traffic that its attention does not hide.

    Each of R steps attends for as long (zigzag). Keys and values travel behind all steps but the last, gradients behind
    the step after their own; the last gradients have nothing to hide behind.

    Args:
        keys_s: to send keys and values one step on.
        gradients_s: to send their gradients one step on.
        attention_s: of forward and backward, all steps together.
        ring: R, 2 or more.
    """
    forward_s, backward_s = FORWARD * attention_s / ring, (1 - FORWARD) * attention_s / ring
    forward = (ring - 1) * max(0.0, keys_s - forward_s)
    first, last = max(0.0, keys_s - backward_s), max(0.0, gradients_s - backward_s)
    between = (ring - 2) * max(0.0, keys_s + gradients_s - backward_s)
    return forward + first + between + last + gradients_s


def ring_latency_s(shape: ModelShape, cluster: Cluster, layout: Layout) -> float:
    """Seconds that a ring's steps take beside their bytes, where rows are too short to hide them."""
    steps = 3 * layout.ring - 2
    once = cluster.exchange_launch_s + (cluster.exchange_node_s if any(hops(cluster, layout)) else 0.0)
    return shape.num_layers * steps * once


# ---- what a profile says of it


def explained(
    provenance: Mapping[str, Any], tried: Mapping[int, Sequence[Split]], chosen: Mapping[int, Split]
) -> dict[str, Any]:
    """The provenance of a profile, with how its degrees came to their layouts; as it was without a degree above 1.

    Args:
        provenance: with `fields` and `assumptions`.
        tried: the splits of each degree above 1.
        chosen: the one that each degree has.
    """
    if not tried:
        return dict(provenance)
    rings = {d: split for d, split in chosen.items() if split.layout.ring > 1}
    fields = dict(provenance["fields"])
    fields["layouts"] = (
        f"of every split into ulysses x ring the soonest, with the most Ulysses of those within {WORTH:.0%}, in full "
        f"rows of sequences of {HIDING_TOKENS} tokens, or of all that the group holds"
    )
    seconds_of = {str(d): {each.name: each.token_s for each in some} for d, some in tried.items()}
    told = {**provenance, "fields": fields, "splits_s_per_token": seconds_of}
    if rings:
        fields["all_to_all.bandwidth_bytes_per_s"] += "; of a ring, what attention does not hide, and merging its parts"
        fields["all_to_all.latency_s"] += "; of a ring, 3 R - 2 steps a layer, none of them hidden"
        told["ring_hidden"] = {
            str(d): {"tokens": split.hiding_tokens, "share": split.hidden_s / split.ring_s}
            for d, split in rings.items()
        }
        told["assumptions"] = [*provenance["assumptions"], _hiding(list(rings.values()))]
    return told


def _hiding(rings: Sequence[Split]) -> str:
    lengths = sorted({split.hiding_tokens for split in rings})
    said = f"{lengths[0]}" if len(lengths) == 1 else f"{lengths[0]} to {lengths[-1]} (ring_hidden has each degree's)"
    return (
        f"rings travel behind the attention of sequences of {said} tokens, which does not slow down by it; "
        f"longer sequences hide more and shorter ones less"
    )
