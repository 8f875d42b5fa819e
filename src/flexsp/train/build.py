"""From the configuration to a corpus, a model, an optimizer and a profile."""

from __future__ import annotations

import logging
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from flexsp.data import Corpus, Overlong, Sequences, TokenStore, apply_context_limit, hold_out, open_corpus
from flexsp.data.held_out import Documents
from flexsp.data.options import SKIP
from flexsp.data.rows import NOT_BROKEN, Reason
from flexsp.data.sequences import without_unlabelled
from flexsp.data.tokenizers import BYTES, has_tokenizer
from flexsp.parallel import GroupPool, check_degrees, default_layouts, powers_of_two, prepare_model
from flexsp.parallel.control import PATIENCE
from flexsp.parallel.model import make_mesh
from flexsp.parallel.policies import policies_of
from flexsp.planner.policies import policy_for
from flexsp.planner.static import static_degree
from flexsp.profile import Profile
from flexsp.profiler import load_or_measure, measure_profile, profile_path
from flexsp.track import Track, silent
from flexsp.train.config import Config, DataConfig, ModelConfig
from flexsp.train.display import Display
from flexsp.train.out_of_memory import is_out_of_memory
from flexsp.train.pretrained import Unfit, changed_config, load_pretrained

log = logging.getLogger(__name__)

ONE_DEGREE = ("static", "batch-adaptive")
"""Planners that choose no activation policy."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def open_on_all_ranks(config: Config, track: Track = silent) -> TokenStore:
    """The corpus, the same on every rank. A collective that lasts as long as tokenizing does.

    Args:
        config: of the run.
        track: shows how far it is.

    Raises:
        ValueError: on all ranks alike: what the first of them found wrong, or that they see different data.
    """
    # its own group: the ranks of one node may be ready hours before those of another
    patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    corpus, said = None, ("", "")
    try:
        corpus = open_corpus(
            config.data.source,
            config.data,
            model_path=config.model.path,
            track=track,
            patient=dist.get_rank() != 0,
        )
        said = corpus.fingerprint, ""
    except ValueError as error:
        said = "", str(error)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, said, group=patient)
    dist.destroy_process_group(patient)
    for _, error_text in every:
        if error_text:
            raise ValueError(error_text)
    other = [rank for rank, (fingerprint, _) in enumerate(every) if fingerprint != every[0][0]]
    if other:
        raise ValueError(
            f"data.source={config.data.source!r}: ranks {other} see other tokens than rank 0; give all nodes the same "
            f"files and the same tokenizer"
        )
    assert corpus is not None
    for reason, (count, first) in corpus.left_out.items():
        if reason != Reason.EMPTY:
            why = "nothing would be learnt from them" if reason in NOT_BROKEN else "data.on_broken='skip'"
            log.info("data: %d rows left out: %s (the first: %s); %s", count, reason, first, why)
    return corpus


def build_sequences(config: Config, corpus: Corpus, held_out: bool = False) -> Sequences:
    """The sequences of a corpus under the context limit; says what that touched.

    Args:
        config: of the run.
        corpus: the whole.
        held_out: those of the documents that are kept from training, instead of the others'.

    Raises:
        ValueError: nothing is left.
    """
    if config.data.held_out:
        corpus = hold_out(corpus, config.data.held_out, config.train.seed)[held_out]
    sequences, touched = apply_context_limit(corpus, config.data.max_length, Overlong(config.data.overlong))
    sequences, unlabelled = without_unlabelled(sequences)
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
    if unlabelled:
        log.info("data: %d pieces of split documents left out: nothing would be learnt from them", unlabelled)
    return sequences


def build_on_first_rank(config: ModelConfig, seed: int) -> PreTrainedModel:
    """The model of the configuration: with weights on rank 0, and on torch's meta device elsewhere, for `prepare`.

    A collective that lasts as long as rank 0 loads. Random numbers go on alike on all ranks, as if each had drawn what
    rank 0 has.

    Raises:
        ValueError: on all ranks alike, where rank 0 cannot build or load it; or this rank's own, where others can.
    """
    # its own group: however long rank 0 loads is no fault, and its end is noticed at once
    patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    model, failed = None, None
    try:
        model = build_model(config, seed, empty=dist.get_rank() != 0)
    except ValueError as error:  # said below, so that nobody waits for this rank
        failed = error
    every: list[Any] = [None] * dist.get_world_size()
    state = torch.get_rng_state() if dist.get_rank() == 0 else None
    dist.all_gather_object(every, (str(failed or ""), state), group=patient)
    dist.destroy_process_group(patient)
    said, state = every[0]
    if said:
        raise ValueError(said)
    if failed is not None:
        raise failed
    torch.set_rng_state(state)
    assert model is not None
    return model


def build_model(config: ModelConfig, seed: int, empty: bool = False) -> PreTrainedModel:
    """The model of the configuration, the same wherever it is built.

    Args:
        config: of the model.
        seed: of initial weights.
        empty: on torch's meta device, of the config alone: no weights are read, drawn or held.

    Raises:
        ValueError: transformers cannot build or load it, or a folder and what is changed in its config do not fit.
    """
    torch.manual_seed(seed)
    weights = DTYPES[config.weights]
    try:
        if config.path and not empty:
            model = load_pretrained(config.path, config.config, weights)
        else:
            described = _read_config(config)
            with torch.device("meta") if empty else nullcontext():
                model = AutoModelForCausalLM.from_config(described, dtype=weights)
    except Exception as error:  # of the model's own code: of any kind
        # the latter of this rank alone, and nothing to correct in the model
        if isinstance(error, Unfit) or is_out_of_memory(error):
            raise
        given = (("model.path", config.path), ("model.config", config.config))
        key = ", ".join(f"{key}={value!r}" for key, value in given if value)
        said = " ".join(str(error).split())
        raise ValueError(f"{key}: transformers cannot make this model ({said}); correct it") from None
    assert isinstance(model, PreTrainedModel)
    return model


def _read_config(config: ModelConfig) -> PreTrainedConfig:
    """Of transformers; it raises whatever that does."""
    if config.path and config.config:
        return changed_config(config.path, config.config)
    if config.path:
        return AutoConfig.from_pretrained(config.path, local_files_only=True)
    fields = dict(config.config)
    return AutoConfig.for_model(fields.pop("model_type", ""), **fields)


def check_fit(model: PreTrainedModel, sequences: Sequences, data: DataConfig) -> Sequences:
    """The sequences that the model can take: all, or those within its vocabulary where broken rows are left out.

    Raises:
        ValueError: token ids beyond the vocabulary where that is an error, or positions beyond the model's.
    """
    config, max_length = model.config.get_text_config(), data.max_length
    sequences = _within_vocabulary(sequences, config.vocab_size, data)
    positions = getattr(config, "max_position_embeddings", None)
    if positions is not None and max_length > positions:
        raise ValueError(
            f"data.max_length={max_length} exceeds max_position_embeddings={positions} of the model; lower the one or "
            f"set model.config.max_position_embeddings"
        )
    return sequences


def _within_vocabulary(sequences: Sequences, vocab_size: int, data: DataConfig) -> Sequences:
    corpus = sequences.corpus
    largest = corpus.largest if isinstance(corpus, TokenStore | Documents) else None
    if largest is None or not (beyond := largest >= vocab_size).any():
        return sequences
    worst = int(largest.argmax())
    if data.on_broken != SKIP:
        raise ValueError(
            f"{corpus.describe(worst)}: token id {largest[worst]} is beyond vocab_size={vocab_size}, as are ids of "
            f"{beyond.sum()} of {len(beyond)} documents; tokenize for this model, set data.on_broken='skip' to leave "
            f"them out, or without model.path set model.config.vocab_size to at least {largest[worst] + 1}"
        )
    kept = ~beyond[sequences.documents]
    log.info(
        "data: %d documents left out: token ids beyond vocab_size=%d (the first: %s); data.on_broken='skip'",
        beyond.sum(), vocab_size, corpus.describe(int(beyond.argmax())),
    )  # fmt: skip
    if not kept.any():
        raise ValueError(f"{corpus.name}: no document is within vocab_size={vocab_size}; tokenize for this model")
    return Sequences(
        corpus=corpus,
        documents=sequences.documents[kept],
        offsets=sequences.offsets[kept],
        lengths=sequences.lengths[kept],
    )


def tokenizer_of(config: Config) -> str:
    """Where the tokenizer of a run's model lies; empty: there is none, or tokens are bytes."""
    in_model = config.model.path if has_tokenizer(config.model.path) else ""
    named = config.data.tokenizer or in_model
    return "" if named == BYTES else named


def prepare(model: PreTrainedModel, config: ModelConfig) -> PreTrainedModel:
    """Wires the model to the ranks as the configuration says, with rank 0's weights on all of them. A collective."""
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
        from_first_rank=True,
    )


def _param_dtype(config: ModelConfig) -> torch.dtype | None:
    return DTYPES[config.dtype] if config.dtype != config.weights else None


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
