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
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from flexsp.data import Corpus, Overlong, Sequences, apply_context_limit, open_corpus
from flexsp.parallel import GroupPool, check_degrees, prepare_model, servable_degrees
from flexsp.planner.static import static_degree
from flexsp.profile import Profile
from flexsp.profiler import load_or_measure, measure_profile, profile_path
from flexsp.train.config import Config, ModelConfig, TrainConfig
from flexsp.train.display import Display

log = logging.getLogger(__name__)

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}


def build_sequences(config: Config) -> Sequences:
    """Opens the corpus and applies the context limit; says what that touched."""
    corpus: Corpus = open_corpus(config.data.source)
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
    try:
        if config.path:
            model = AutoModelForCausalLM.from_pretrained(config.path, dtype=torch.float32, local_files_only=True)
        else:
            fields = dict(config.config)
            model_type = fields.pop("model_type", "")
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **fields), dtype=torch.float32)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        key = f"model.path={config.path!r}" if config.path else f"model.config={config.config!r}"
        raise ValueError(f"{key}: transformers cannot make this model ({error}); correct it") from None
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
        param_dtype=_param_dtype(config),
        activation_checkpointing=config.activation_checkpointing,
        shard_layers=config.shard_layers,
        reshard_after_forward=config.reshard_after_forward,
        exact=config.exact,
    )


def _param_dtype(config: ModelConfig) -> torch.dtype | None:
    return torch.bfloat16 if config.dtype == "bfloat16" else None


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
        check_degrees(profile.sp_degrees, model.config, world_size)
        if profile.memory.policies:
            names = ", ".join(profile.memory.policies)
            log.info("profile: %s: policies %s are left out: micro-batches do not run them yet", planner.profile, names)
            profile = replace(profile, memory=replace(profile.memory, policies={}))
    else:
        profile = _measured_profile(config, model, groups, display)
    return profile


def check_profile(profile: Profile, config: Config, learned: Path | None = None) -> None:
    """Says what a rank holds and which degree the context limit forces. `learned`: where an earlier run saved it.

    Raises:
        ValueError: no degree holds a sequence of the context limit.
    """
    artificial = " (artificial: planner.max_tokens_per_rank)" if "max_tokens_per_rank" in profile.provenance else ""
    try:
        forced = static_degree(profile, config.data.max_length)
    except ValueError as error:
        remedy = "" if learned is None else f"; or delete {learned}, which an earlier run learned"
        raise ValueError(f"{error}{remedy}") from None
    log.info(
        "memory: a rank holds %s tokens%s, so the context limit of %s forces sp_degree %d",
        f"{profile.capacity_tokens(1):,}", artificial, f"{config.data.max_length:,}", forced,
    )  # fmt: skip


def _measured_profile(config: Config, model: PreTrainedModel, groups: GroupPool, display: Display) -> Profile:
    planner = config.planner
    degrees = sorted(planner.sp_degrees) or [
        d for d in servable_degrees(model.config, dist.get_world_size()) if d & (d - 1) == 0
    ]
    check_degrees(degrees, model.config, dist.get_world_size())
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
    }
    measure = partial(measure_profile, model, groups, track=display.tell, **settings)
    knobs = ("activation_checkpointing", "shard_layers", "reshard_after_forward")
    wiring = {key: getattr(config.model, key) for key in knobs}
    saved = profile_path(planner.profile_dir, model, {**settings, **wiring})
    return load_or_measure(saved, measure, groups.control)
