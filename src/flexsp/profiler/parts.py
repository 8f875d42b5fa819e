"""The parts of a model that are measured in place of the whole: few layers, some of the vocabulary."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from flexsp import jsonfields as jf
from flexsp.estimate import ModelShape
from flexsp.estimate.shape import FP32_BYTES
from flexsp.loss_chunks import LOGIT_BYTES, LOGITS_BYTES
from flexsp.profiler.memory import OPTIMIZER_COPIES
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


def needed_bytes(shape: ModelShape, probe_tokens: int, itemsize: int, weight_bytes: int = 4) -> int:
    """What measuring will hold on a rank at the most, about: the larger of the first part and the last.

    Args:
        shape: of the whole model.
        probe_tokens: of a rank in the largest row.
        itemsize: of a number as it is computed.
        weight_bytes: of a parameter as it is kept.
    """
    layer_token_bytes = sum(shape.kept_bytes_per_layer(itemsize).values())
    parts = parts_of(shape)
    first, last = parts[0], parts[-1]

    def states(part: Part) -> float:
        ends = (shape.embedding_parameters + shape.head_parameters) * part.head
        return (part.layers * shape.layer_parameters + ends) * weight_bytes * (2 + OPTIMIZER_COPIES)

    def held(part: Part, tokens: int) -> float:
        logits = LOGIT_BYTES * min(tokens * shape.vocab_size * part.head, LOGITS_BYTES / FP32_BYTES)
        return states(part) + tokens * part.layers * layer_token_bytes + logits

    return int(max(held(first, probe_tokens), held(last, min(probe_tokens, HEAD_TOKENS))))
