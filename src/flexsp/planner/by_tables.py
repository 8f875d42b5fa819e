"""Where a profile has measured tables: what they make of a plan, and the formula that fits them best at the lengths of
one batch.

Two terms may miss a device's behaviour over all lengths and still hit it over those of a batch. Every sequence gives
an equation in seconds a token, weighted by its tokens: quadratic * s + linear at degree 1; what a higher degree's table
has above its share of that is the degree's exchange. Cost: O(K D).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from flexsp.lengths import LengthArray
from flexsp.plans import MicroBatch
from flexsp.profile import FloatArray, Profile

LEAST_S_PER_TOKEN = 1e-15
"""Of an exchange that the table does not show."""


def table_s(micro_batches: Iterable[MicroBatch], lengths: LengthArray, profile: Profile) -> float | None:
    """Seconds of all micro-batches by the measured tables; None where the profile has none."""
    if not profile.tables:
        return None
    return sum(
        profile.compute.fixed_s
        + max(
            profile.group_table_s(group.sp_degree, lengths[list(group.sequences)].tolist(), micro_batch.policy)
            for group in micro_batch.groups
        )
        for micro_batch in micro_batches
    )


def localized(profile: Profile, lengths: LengthArray) -> Profile:
    """`profile` with compute and exchange fitted to its tables at these lengths, for searching with; it has no tables.

    Memory, degrees and the fixed cost stay. Without a table of degree 1 nothing changes.
    """
    if 1 not in profile.tables:
        return replace(profile, tables={})
    tokens = lengths.astype(np.float64)
    quadratic_s, linear_s = _line(tokens, profile.table_s_per_token(1, tokens))
    bandwidth, latency = (dict(by) for by in (profile.all_to_all.bandwidth_bytes_per_s, profile.all_to_all.latency_s))
    for degree in profile.tables:
        if degree > 1:
            share = (quadratic_s * tokens + linear_s) / degree
            above = np.average(profile.table_s_per_token(degree, tokens) - share, weights=tokens)
            bandwidth[degree] = profile.all_to_all.bytes_per_token / (degree * max(float(above), LEAST_S_PER_TOKEN))
            latency[degree] = 0.0  # it is in the table's seconds a token
    return replace(
        profile,
        compute=replace(profile.compute, quadratic_s=quadratic_s, linear_s=linear_s),
        all_to_all=replace(profile.all_to_all, bandwidth_bytes_per_s=bandwidth, latency_s=latency),
        tables={},
    )


def _line(tokens: FloatArray, seconds: FloatArray) -> tuple[float, float]:
    """Slope and intercept, both >= 0, of seconds a token over tokens, each point weighing as many."""
    weights = np.sqrt(tokens)
    features = np.stack([tokens, np.ones_like(tokens)], axis=1) * weights[:, None]
    slope, intercept = (float(c) for c in np.linalg.lstsq(features, seconds * weights, rcond=None)[0])
    if slope < 0.0:
        return 0.0, float(np.average(seconds, weights=tokens))
    if intercept < 0.0:
        return float((seconds * tokens * tokens).sum() / (tokens**3).sum()), 0.0
    return slope, intercept
