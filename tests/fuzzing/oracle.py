"""Is a plan legal? From the JSON documents alone, sharing no code with flexsp: the five rules of a plan."""

from __future__ import annotations

import hashlib
import struct
from fractions import Fraction
from typing import Any


def legal(lengths: list[int], profile: dict[str, Any], plan: dict[str, Any]) -> bool:
    """`profile` and `plan` keep their schemas; `plan` has micro-batches."""
    digest = hashlib.sha256(b"".join(struct.pack("<q", length) for length in lengths)).hexdigest()
    if plan.get("lengths_sha256") not in (None, digest) or plan["num_devices"] != profile["num_devices"]:
        return False
    everyone = [
        i for micro_batch in plan["micro_batches"] for group in micro_batch["groups"] for i in group["sequences"]
    ]
    if sorted(everyone) != list(range(len(lengths))):
        return False
    if not all(_micro_batch_legal(micro_batch, lengths, profile) for micro_batch in plan["micro_batches"]):
        return False
    said = plan.get("predicted_s")
    seconds = sum(_seconds(micro_batch, lengths, profile) for micro_batch in plan["micro_batches"])
    return said is None or abs(said - seconds) <= 1e-6 * max(1.0, seconds)


def _micro_batch_legal(micro_batch: dict[str, Any], lengths: list[int], profile: dict[str, Any]) -> bool:
    groups, policy = micro_batch["groups"], micro_batch.get("policy")
    ranks = [rank for group in groups for rank in group["ranks"]]
    if not groups or len(set(ranks)) < len(ranks):
        return False
    if policy is not None and policy not in profile["memory"].get("policies", {}):
        return False
    return all(_group_legal(group, policy, lengths, profile) for group in groups)


def _group_legal(group: dict[str, Any], policy: str | None, lengths: list[int], profile: dict[str, Any]) -> bool:
    ranks, per_node = group["ranks"], profile["devices_per_node"]
    degree = len(ranks)
    if not group["sequences"] or degree not in profile["sp_degrees"]:
        return False
    first = ranks[0]
    if ranks != [first + place for place in range(degree)] or first < 0 or ranks[-1] >= profile["num_devices"]:
        return False
    nodes = {rank // per_node for rank in ranks}
    power = bin(degree).count("1") == 1
    if degree <= per_node:
        if len(nodes) > 1 or (power and first % per_node % degree):
            return False
    elif first % per_node or (power and first % degree):
        return False
    memory = profile["memory"]
    per_token = memory["policies"][policy] if policy else memory
    held = Fraction(per_token["activation_bytes_per_token"]) * sum(lengths[i] for i in group["sequences"]) / degree
    return Fraction(memory["model_state_bytes"]) + held <= Fraction(memory["memory_bytes"])


def _seconds(micro_batch: dict[str, Any], lengths: list[int], profile: dict[str, Any]) -> float:
    compute, exchange, policy = profile["compute"], profile["all_to_all"], micro_batch.get("policy")
    factor = profile["memory"]["policies"][policy].get("compute_factor", 1.0) if policy else 1.0

    def group_s(group: dict[str, Any]) -> float:
        degree, held = len(group["ranks"]), [lengths[i] for i in group["sequences"]]
        seconds = factor * sum(compute["quadratic_s"] * s * s + compute["linear_s"] * s for s in held) / degree
        if degree > 1:
            bandwidth = exchange["bandwidth_bytes_per_s"][str(degree)]
            seconds += exchange["bytes_per_token"] * sum(held) / (degree * bandwidth)
            seconds += exchange.get("latency_s", {}).get(str(degree), 0.0)
        return float(seconds)

    return float(compute["fixed_s"] + max(map(group_s, micro_batch["groups"])))
