"""From the configuration to a corpus, a model, an optimizer and a profile."""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from flexsp.data import Corpus, Overlong, Sequences, apply_context_limit, hold_out, open_corpus
from flexsp.parallel import GroupPool, check_degrees, default_layouts, powers_of_two, prepare_model
from flexsp.parallel.model import make_mesh
from flexsp.parallel.policies import policies_of
from flexsp.planner.degrees import usable_degrees
from flexsp.planner.static import static_degree
from flexsp.profile import Profile
from flexsp.profiler import load_or_measure, measure_profile, profile_path
from flexsp.train.config import Config, ModelConfig, TrainConfig
from flexsp.train.display import Display

log = logging.getLogger(__name__)

ONE_DEGREE = ("static", "batch-adaptive")
"""Planners that choose no activation policy."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}


def build_sequences(config: Config, held_out: bool = False) -> Sequences:
    """Opens the corpus and applies the context limit; says what that touched.

    `held_out`: those of the documents that are kept from training, instead of the others'.
    """
    corpus: Corpus = open_corpus(config.data.source)
    if config.data.held_out:
        corpus = hold_out(corpus, config.data.held_out, config.train.seed)[held_out]
    sequences, touched = apply_context_limit(corpus, config.data.max_length, Overlong(config.data.overlong))
    log.info(
        "data: %s: %d documents, %s tokens, the longest %s; %d empty ones left out",
        corpus.name, len(corpus.lengths), f"{int(corpus.lengths.sum()):,}", f"{int(corpus.lengths.max()):,}",
        corpus.num_empty,
    )  # fmt: skip
    fate = "dropped" if config.data.overlong == Overlong.DROP else "split, none of their tokens lost"
    log.info(
        "data: %d documents of %s tokens exceed max_length=%d: %s; %d sequences of %s tokens remain",
        touched.documents, f"{touched.tokens:,}", config.data.max_length, fate, len(sequences.lengths),
        f"{int(sequences.lengths.sum()):,}",
    )  # fmt: skip
    return sequences


def build_model(config: ModelConfig, seed: int) -> PreTrainedModel:
    """The model of the configuration, the same on every rank.

    Raises:
        ValueError: transformers cannot build or load it.
    """
    torch.manual_seed(seed)
    weights = DTYPES[config.weights]
    try:
        if config.path:
            model = AutoModelForCausalLM.from_pretrained(config.path, dtype=weights, local_files_only=True)
        else:
            fields = dict(config.config)
            model_type = fields.pop("model_type", "")
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields), dtype=weights)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError) as error:
        key = f"model.path={config.path!r}" if config.path else f"model.config={config.config!r}"
        said = " ".join(str(error).split())
        raise ValueError(f"{key}: transformers cannot make this model ({said}); correct it") from None
    assert isinstance(model, PreTrainedModel)
    return model


def check_fit(model: PreTrainedModel, sequences: Sequences, max_length: int) -> None:
    """Refuses data that the model cannot take.

    Raises:
        ValueError: token ids beyond the vocabulary, or positions beyond the model's.
    """
    config = model.config.get_text_config()
    if sequences.corpus.max_token >= config.vocab_size:
        raise ValueError(
            f"{sequences.corpus.name}: token id {sequences.corpus.max_token} is beyond vocab_size={config.vocab_size}; "
            f"tokenize for this model or set model.config.vocab_size to at least {sequences.corpus.max_token + 1}"
        )
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise ValueError(
            f"data.max_length={max_length} exceeds max_position_embeddings={positions} of the model; lower the one or "
            f"set model.config.max_position_embeddings"
        )


def prepare(model: PreTrainedModel, config: ModelConfig) -> PreTrainedModel:
    """Wires the model to the ranks as the configuration says."""
    return prepare_model(
        model,
        mesh=make_mesh(config.replicate),
        param_dtype=_param_dtype(config),
        reduce_dtype=DTYPES[config.reduce_dtype],
        activation_checkpointing=config.activation_checkpointing,
        loss_chunk_tokens=config.loss_chunk_tokens or None,
        shard_layers=config.shard_layers,
        reshard_after_forward=config.reshard_after_forward,
        attention=config.attention or None,
        exact=config.exact,
    )


def _param_dtype(config: ModelConfig) -> torch.dtype | None:
    return DTYPES[config.dtype] if config.dtype != config.weights else None


def build_optimizer(
    model: PreTrainedModel, config: TrainConfig
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """The optimizer and the learning-rate schedule.

    Raises:
        ValueError: options that the optimizer does not have, or an unknown schedule.
    """
    try:
        optimizer = OPTIMIZERS[config.optimizer](
            model.parameters(), lr=config.lr, weight_decay=config.weight_decay, **config.optimizer_options
        )  # type: ignore[call-arg]
    except (TypeError, ValueError) as error:
        raise ValueError(f"train.optimizer_options={config.optimizer_options}: {error}; correct them") from None
    try:
        schedule = transformers.get_scheduler(config.lr_schedule, optimizer, config.warmup_steps, config.steps)
    except ValueError as error:
        raise ValueError(f"train.lr_schedule={config.lr_schedule!r}: {error}; choose another") from None
    return optimizer, schedule


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


def policy_for(profile: Profile, max_length: int) -> str | None:
    """The policy that the context limit needs, the one that holds least where none is enough; None: it needs none."""
    widest = min(profile.memory.policies, key=profile.activation_bytes_per_token, default=None)
    holds = any(profile.capacity_tokens(degree) >= max_length for degree in usable_degrees(profile))
    return None if holds else widest


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
        "param_dtype": _param_dtype(config.model),
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
