"""From the configuration to the profile by which a run plans."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedModel

from flexsp.parallel import GroupPool, check_degrees, default_layouts, powers_of_two
from flexsp.parallel.policies import policies_of
from flexsp.planner.policies import policy_for
from flexsp.planner.static import static_degree
from flexsp.profile import Profile
from flexsp.profiler import load_or_measure, measure_profile, profile_path
from flexsp.train.config import Config
from flexsp.train.display import Display
from flexsp.train.run_model import param_dtype

log = logging.getLogger(__name__)

ONE_DEGREE = ("static", "batch-adaptive")
"""Planners that choose no activation policy."""


def build_profile(config: Config, model: PreTrainedModel, groups: GroupPool, display: Display) -> Profile:
    """The profile that the configuration names, or the one of this machine.

    Raises:
        ValueError: it lists degrees that the heads cannot serve.
    """
    planner, world_size = config.planner, dist.get_world_size()
    if planner.profile:
        profile = Profile.load(planner.profile)
        if profile.num_devices != world_size:
            profile = profile.for_devices(world_size)
            log.info("profile: %s: %s", planner.profile, profile.provenance["assumptions"][-1])
        profile = _with_layouts(profile, model)
        profile = _with_policies(profile, model)
    else:
        profile = _measured_profile(config, model, groups, display)
    return profile


def check_profile(profile: Profile, config: Config, learned: Path | None = None) -> None:
    """Says what a rank holds and which degree the context limit forces. `learned`: where an earlier run saved it.

    Raises:
        ValueError: no degree holds a sequence of the context limit, under the policies that the planner can choose.
    """
    artificial = " (artificial: planner.max_tokens_per_rank)" if "max_tokens_per_rank" in profile.provenance else ""
    policy = policy_for(profile, config.data.max_length) if config.planner.name not in ONE_DEGREE else None
    try:
        forced = static_degree(profile, config.data.max_length, policy)
    except ValueError as error:
        remedy = "" if learned is None else f"; or delete {learned}, which an earlier run learned"
        raise ValueError(f"{error}{remedy}") from None
    log.info(
        "memory: a rank holds %s tokens%s%s, so the context limit of %s forces sp_degree %d",
        f"{profile.capacity_tokens(1, policy):,}", f" under policy {policy}" if policy else "", artificial,
        f"{config.data.max_length:,}", forced,
    )  # fmt: skip


def planner_options(config: Config) -> dict[str, Any]:
    """What the run's planner is called with."""
    options: dict[str, Any] = dict(config.planner.options)
    if config.planner.name == "static":
        options.setdefault("max_length", int(config.data.max_length))
    return options


def _with_layouts(profile: Profile, model: PreTrainedModel) -> Profile:
    """A given profile, with a ring for the degrees that it has no layout for and Ulysses alone cannot serve.

    Raises:
        ValueError: a layout of the profile does not fit the model's heads.
    """
    added = {d: v for d, v in default_layouts(model.config, profile.sp_degrees).items() if d not in profile.layouts}
    if added:
        text = ", ".join(f"{d} as {v.ulysses} x {v.ring}" for d, v in added.items())
        log.info("profile: degrees that do not divide the heads run as ulysses x ring, which it does not say: %s", text)
        profile = replace(profile, layouts={**profile.layouts, **added})
    check_degrees(profile.sp_degrees, model.config, dist.get_world_size(), profile.layouts)
    return profile


def _with_policies(profile: Profile, model: PreTrainedModel) -> Profile:
    """A given profile with those of its policies that the model runs."""
    policies = policies_of(model)
    reasons = [reason for name in profile.memory.policies if (reason := policies.refusal(name)) is not None]
    if not reasons:
        return profile
    log.info("profile: policies that the model does not run are left out: %s", "; ".join(reasons))
    kept = {name: each for name, each in profile.memory.policies.items() if policies.refusal(name) is None}
    return replace(profile, memory=replace(profile.memory, policies=kept))


def _measured_profile(config: Config, model: PreTrainedModel, groups: GroupPool, display: Display) -> Profile:
    planner = config.planner
    degrees = sorted(planner.sp_degrees) or powers_of_two(dist.get_world_size())
    check_degrees(degrees, model.config, dist.get_world_size(), default_layouts(model.config, degrees))
    most = int(planner.max_tokens_per_rank) * degrees[-1]
    if 0 < most < config.data.max_length:  # known before anything is measured
        raise ValueError(
            f"data.max_length={config.data.max_length} tokens fit into no group: the most that any degree of {degrees} "
            f"holds is {most}; lower the limit, allow a higher degree, or raise planner.max_tokens_per_rank"
        )
    settings: dict[str, Any] = {
        "sp_degrees": degrees,
        "max_tokens_per_rank": int(planner.max_tokens_per_rank) or None,
        "memory_fraction": planner.memory_fraction,
        "param_dtype": param_dtype(config.model),
        "policies": planner.policies,
    }
    measure = partial(measure_profile, model, groups, track=display.tell, **settings)
    knobs = (
        "weights", "reduce_dtype", "activation_checkpointing", "loss_chunk_tokens", "shard_layers",
        "reshard_after_forward", "replicate", "attention",
    )  # fmt: skip
    wiring = {key: getattr(config.model, key) for key in knobs}
    saved = profile_path(planner.profile_dir, model, {**settings, **wiring, "transport": groups.transport})
    return load_or_measure(saved, measure, groups.control)
