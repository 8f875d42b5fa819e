"""The parts of a model that are measured in place of the whole: few layers, some of the vocabulary."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from flexsp import jsonfields as jf
from flexsp.estimate import ModelShape
from flexsp.estimate.cluster import DTYPES
from flexsp.estimate.memory import model_state_bytes
from flexsp.estimate.shape import FP32_BYTES
from flexsp.loss_chunks import LOGIT_BYTES, chunk_tokens
from flexsp.profiler.points import Part

FEW_LAYERS = 3
SMALL_VOCABULARY = 1024
HEAD_TOKENS = 4096
"""At most so many tokens a rank run through the whole vocabulary: enough to tell what the head costs."""


def read_model_config(path: str | Path) -> PreTrainedConfig:
    """The Hugging Face config in a directory or a JSON file.

    Raises:
        ValueError: it cannot be read, or transformers does not know it.
    """
    file = Path(path)
    file = file / "config.json" if os.path.isdir(file) else file
    fields = jf.read_object(file)
    model_type = jf.as_string(jf.required(fields, "model_type", str(file)), f"{file}: model_type")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{file}: model_type={model_type!r} is unknown to transformers {transformers.__version__}; correct it, or "
            f"install a version that knows it"
        )
    del fields["model_type"]
    try:
        config = AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # of the config's own code: of any kind
        said = " ".join(str(error).split())
        raise ValueError(f"{file}: transformers cannot make a config of it ({said}); correct it") from None
    assert isinstance(config, PreTrainedConfig)
    return config


def parts_of(shape: ModelShape) -> list[Part]:
    """The parts to measure, the one for all points first; the whole model where it is no more than that."""
    small = min(1.0, SMALL_VOCABULARY / shape.vocab_size)
    if shape.num_layers <= FEW_LAYERS and small == 1.0:
        return [Part(layers=shape.num_layers, head=1.0, whole=True)]
    parts = [Part(layers=layers, head=small) for layers in sorted({min(FEW_LAYERS, shape.num_layers), 1}, reverse=True)]
    return parts if small == 1.0 else [*parts, Part(layers=1, head=1.0)]


def build_part(
    config: PreTrainedConfig,
    layers: int,
    vocabulary: int,
    longest: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A model of so many layers and so large a vocabulary, otherwise as `config` says, with random weights.

    Args:
        config: of the whole model; left as it is.
        layers, vocabulary: of the part.
        longest: tokens of the longest sequence that it must take.
        device: where it is built.
        dtype: of its weights.
    """
    fields = config.to_dict()
    text, text_config = fields.get("text_config") or fields, config.get_text_config()
    count, name_of = text_config.num_hidden_layers, text_config.attribute_map
    for key, value in text.items():
        if isinstance(value, list) and len(value) == count:  # what is said layer by layer
            text[key] = value[:layers]
    text[name_of.get("num_hidden_layers", "num_hidden_layers")] = layers
    text[name_of.get("vocab_size", "vocab_size")] = vocabulary
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        text[key] = None
    positions = name_of.get("max_position_embeddings", "max_position_embeddings")
    if text.get(positions) is not None:
        text[positions] = max(text[positions], longest)
    part = type(config).from_dict(fields)
    torch.manual_seed(0)
    try:
        with device:
            return AutoModelForCausalLM.from_config(part, dtype=dtype)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"model_type={config.model_type!r}: transformers cannot make a part of {layers} layers of it ({error}); "
            f"measure the whole model with flexsp train instead"
        ) from None


def needed_bytes(
    shape: ModelShape, probe_tokens: int, dtype: str = "bfloat16", *, weight_bytes: int = 4, ranks: int = 1
) -> int:
    """What measuring will hold on a rank at the most, about, beside what the process holds before.

    Of the first part and the last one the larger; of each the most of what its building holds, the optimizer's step
    and the largest row. Each rank builds a part whole before it is sharded.

    Args:
        shape: of the whole model.
        probe_tokens: of a rank in the largest row.
        dtype: what is computed in.
        weight_bytes: of a parameter as it is kept.
        ranks: over which a part is sharded.
    """
    parts = parts_of(shape)

    def held(part: Part, tokens: int) -> float:
        own = _shape_of(shape, part)
        states, gathered = model_state_bytes(own, ranks, dtype, weight_bytes=weight_bytes)
        built = weight_bytes * (own.num_parameters + own.layer_parameters)  # a layer twice, on its way to its shards
        logits = LOGIT_BYTES * own.vocab_size * min(tokens, chunk_tokens(own.vocab_size))
        row = tokens * own.num_layers * layer_token_bytes(own, dtype) + logits
        ends = FP32_BYTES * (own.embedding_parameters + own.head_parameters)  # gradients on their way to their shards
        running = states / 2 + gathered + ends + row  # half of the states are weights and gradients
        # the step has a temporary of a parameter each, and only the first part makes one
        return max(built, running, states * 5 / 4 + gathered if part == parts[0] else 0.0)

    return int(max(held(parts[0], probe_tokens), held(parts[-1], min(probe_tokens, HEAD_TOKENS))))


def pinned_bytes(shape: ModelShape, probe_tokens: int, dtype: str) -> int:
    """What policy `offload` will hold on the host, about, of the largest row that is timed."""
    layers = parts_of(shape)[0].layers
    return probe_tokens * layers * layer_token_bytes(shape, dtype)


def layer_token_bytes(shape: ModelShape, dtype: str) -> int:
    """What a layer keeps of a token for its backward."""
    return sum(shape.kept_bytes_per_layer(DTYPES[dtype]).values())


def _shape_of(shape: ModelShape, part: Part) -> ModelShape:
    return replace(shape, num_layers=part.layers, vocab_size=max(1, round(part.head * shape.vocab_size)))
