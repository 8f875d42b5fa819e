"""What the planner's benchmarks and tests plan for: a published profile, larger clusters made from it, and lengths."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from flexsp.distributions import find
from flexsp.lengths import LengthArray
from flexsp.profile import Memory, Policy, Profile

TABLES: dict[str, Any] = json.loads(Path(__file__).with_name("planner_tables.json").read_text(encoding="utf-8"))

DISTRIBUTIONS = {"wikipedia": "wikipedia", "code": "source-code"}
LEVELS = (
    0.0, 0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9999,
    1.0,
)  # fmt: skip
"""The quantiles that the lengths behind `results/` were drawn from; with all of them the draws would be others."""


def published_profile() -> Profile:
    """GPT-7B on 64 A100-40GB, as published with the FlexSP solver."""
    return Profile.from_json(TABLES["profile"])


def drawn_lengths(corpus: str, count: int, seed: int, most: int) -> LengthArray:
    """`count` lengths (tokens) of at most `most`, drawn from `wikipedia` or `code` at the levels of `LEVELS`."""
    table = find(DISTRIBUTIONS[corpus])
    at = dict(zip(table.levels, table.tokens, strict=True))
    coarse = replace(table, levels=LEVELS, tokens=tuple(at[level] for level in LEVELS))
    random = np.random.default_rng(seed)
    found: list[int] = []
    while len(found) < count:
        lengths = coarse.quantile(random.random(count))
        found += lengths[lengths <= most].tolist()
    return np.array(found[:count], dtype=np.int64)


def larger(profile: Profile, num_devices: int) -> Profile:
    """The profile on more devices: model states sharded further, and degrees up to `num_devices` in powers of two.

    The bandwidth table is extended by what its last doubling did: each doubling of the degree beyond the table keeps
    the ratio of effective bandwidths that the last two entries have.
    """
    degrees, bandwidth = list(profile.sp_degrees), dict(profile.all_to_all.bandwidth_bytes_per_s)
    ratio = bandwidth[degrees[-1]] / bandwidth[degrees[-2]]
    while degrees[-1] * 2 <= num_devices:
        bandwidth[degrees[-1] * 2] = bandwidth[degrees[-1]] * ratio
        degrees.append(degrees[-1] * 2)
    states = profile.memory.model_state_bytes * profile.num_devices / num_devices
    return replace(
        profile,
        num_devices=num_devices,
        sp_degrees=tuple(degrees),
        all_to_all=replace(profile.all_to_all, bandwidth_bytes_per_s=bandwidth),
        memory=replace(profile.memory, model_state_bytes=states),
    )


def with_degrees(profile: Profile, added: tuple[int, ...]) -> Profile:
    """The profile with more degrees, their effective bandwidths interpolated in logs between its own."""
    known = profile.all_to_all.bandwidth_bytes_per_s
    at = np.log(sorted(known))
    values = np.log([known[d] for d in sorted(known)])
    bandwidth = {**known, **{d: float(np.exp(np.interp(np.log(d), at, values))) for d in added if d not in known}}
    return replace(
        profile,
        sp_degrees=tuple(sorted({*profile.sp_degrees, *added})),
        all_to_all=replace(profile.all_to_all, bandwidth_bytes_per_s=bandwidth),
    )


def with_policies(profile: Profile, policies: dict[str, Policy]) -> Profile:
    memory: Memory = replace(profile.memory, policies=policies)
    return replace(profile, memory=memory)
