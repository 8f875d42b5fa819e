"""From the configuration to the model of a run, on all its ranks."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from flexsp.data.tokenizers import BYTES, has_tokenizer
from flexsp.parallel import prepare_model
from flexsp.parallel.control import PATIENCE
from flexsp.parallel.model import make_mesh
from flexsp.train.config import Config, ModelConfig
from flexsp.train.out_of_memory import is_out_of_memory
from flexsp.train.pretrained import Unfit, changed_config, load_pretrained

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def build_on_first_rank(config: ModelConfig, seed: int) -> PreTrainedModel:
    """The model of the configuration: with weights on rank 0, and on torch's meta device elsewhere, for `prepare`.

    A collective that lasts as long as rank 0 loads. Random numbers go on alike on all ranks, as if each had drawn what
    rank 0 has.

    Raises:
        ValueError: on all ranks alike: one of them cannot build or load it.
    """
    # its own group: however long rank 0 loads is no fault, and its end is noticed at once
    patient = dist.new_group(backend="gloo", timeout=PATIENCE)
    model, said = None, ""
    try:
        model = build_model(config, seed, empty=dist.get_rank() != 0)
    except ValueError as error:  # said below, so that nobody waits for this rank
        said = str(error)
    every: list[Any] = [None] * dist.get_world_size()
    state = torch.get_rng_state() if dist.get_rank() == 0 else None
    dist.all_gather_object(every, (said, state), group=patient)
    dist.destroy_process_group(patient)
    for rank, (fault, _) in enumerate(every):
        if fault:
            raise ValueError(f"rank {rank}: {fault}" if rank else fault)
    torch.set_rng_state(every[0][1])
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


def prepare(model: PreTrainedModel, config: ModelConfig) -> PreTrainedModel:
    """Wires the model to the ranks as the configuration says, with rank 0's weights on all of them. A collective."""
    return prepare_model(
        model,
        mesh=make_mesh(config.replicate),
        param_dtype=param_dtype(config),
        reduce_dtype=DTYPES[config.reduce_dtype],
        activation_checkpointing=config.activation_checkpointing,
        loss_chunk_tokens=config.loss_chunk_tokens or None,
        shard_layers=config.shard_layers,
        reshard_after_forward=config.reshard_after_forward,
        attention=config.attention or None,
        exact=config.exact,
        from_first_rank=True,
    )


def param_dtype(config: ModelConfig) -> torch.dtype | None:
    return DTYPES[config.dtype] if config.dtype != config.weights else None


def tokenizer_of(config: Config) -> str:
    """Where the tokenizer of a run's model lies; empty: there is none, or tokens are bytes."""
    in_model = config.model.path if has_tokenizer(config.model.path) else ""
    named = config.data.tokenizer or in_model
    return "" if named == BYTES else named
