"""A small model of the same kind: few layers with at least one of each kind, narrow, its own heads, its own code.

Two uses: the probe, by which a model is checked when it is prepared, and `flexsp verify`, which trains one for real.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

MOST_LAYERS = 8
MOST_WIDTH = 2048
"""A model whose hidden size cannot be made smaller than this is not made."""
VOCABULARY = 128
POSITIONS = 512
"""Enough for what is run, few enough for a table of learned positions."""
TRIED_TOKENS = 10
SPREAD = 0.1
"""Of what is added to the weights: with the tiny initial ones a fault of attention hides in rounding."""

WIDTH = re.compile(
    r"(intermediate_size|ffn_dim|ffn_hidden_size|n_inner|dff|_rank|rank|embedding_size|embed_dim|router_hidden_size"
    r"|hidden_size_per_layer_input|intermediate_size_mlp|dim_model_base)$"
)
EXPERTS = re.compile(r"(^|_)(num|n)_(local_|routed_)?experts$|^zero_expert_num$|^moe_num_experts$")
CHOSEN = re.compile(r"per_tok$|^moe_k$|^top_k_experts$|^moe_top_?k$|^n_group$|^num_shared_experts$|^n_shared_experts$")
SEEN = re.compile(r"window(_size)?$|chunk_size$|^floor_scale$|^index_(topk|block_size)$|^local_attention$")
FIRST_DENSE = re.compile(r"^(first_k_dense_replace|num_dense_layers|moe_layer_start_index|max_window_layers)$")
PERIOD = re.compile(r"(sparse_step|layer_interval|layer_step|layer_freq|every_n_layers|window_pattern)$")
DROPOUT = re.compile(r"dropout|_pdrop$|drop_rate$")
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "eod_token_id")


def small_config(
    config: PreTrainedConfig,
    *,
    layers: int | None = None,
    window: int = 5,
    few_heads: bool = False,
    hidden_size: int | None = None,
    head_dim: int | None = None,
    token_id: int | None = None,
    dropout: bool = False,
) -> PreTrainedConfig:
    """The config of a small model of the kind of `config`, which is left as it is.

    Args:
        config: of the whole model; parts of other kinds (vision, audio) shrink too.
        layers: how many; by default one of each kind that the config names.
        window: sliding windows, chunks and the like are no larger than this, so that short sequences meet them.
        few_heads: at most 8 attention heads and 2 KV heads, instead of the model's own.
        hidden_size: by default a few numbers a head.
        head_dim: by default the model's own, where its config has that field.
        token_id: what padding, begin and end are; by default none.
        dropout: keep the model's; by default there is none.
    """
    fields, name = config.to_dict(), _names(config)
    text = _text(config, fields)
    for key, value in fields.items():
        other = key.endswith("_config") and key != "per_layer_config" and value is not text
        if isinstance(value, dict) and other:
            _shrink_other(value)
    if "head_dim" in text and text["head_dim"] is None:  # it would follow the hidden size
        text["head_dim"] = text[name("hidden_size")] // text[name("num_attention_heads")]
    if few_heads:
        _cut_heads(text, name)
    heads, count = text[name("num_attention_heads")], text[name("num_hidden_layers")]
    kept = _kept_layers(text, count, layers)
    _choose_layers(text, count, kept)
    _shrink(text, window, dropout)
    changes = {
        "num_hidden_layers": len(kept),
        "hidden_size": hidden_size or heads * max(4, -(-32 // heads)),
        "vocab_size": VOCABULARY,
        "vocab_size_per_layer_input": VOCABULARY,
        "word_embed_proj_dim": hidden_size or heads * max(4, -(-32 // heads)),
        "max_position_embeddings": POSITIONS,
        "head_dim": head_dim or text.get("head_dim"),
    }
    for key, value in changes.items():
        if text.get(name(key)) is not None:
            text[name(key)] = value
    for each in (fields, text):
        for key in TOKENS:
            if key in each:
                each[key] = token_id
        each["dtype"] = None
    return type(config).from_dict(fields)


def _text(config: PreTrainedConfig, fields: dict[str, Any]) -> dict[str, Any]:
    """The part of a config's fields that is about text."""
    text = config.get_text_config()
    for key in config.sub_configs:
        if getattr(config, key, None) is text:
            own: dict[str, Any] = fields[key]
            return own
    return fields


def _names(config: PreTrainedConfig) -> Callable[[str], str]:
    """How a config calls its fields."""
    text = config.get_text_config()
    names = dict(text.attribute_map)
    if "num_hidden_layers" not in text.to_dict():
        names.setdefault("num_hidden_layers", "num_layers")
    return lambda field: names.get(field, field)


def _cut_heads(text: dict[str, Any], name: Callable[[str], str]) -> None:
    heads, kv_heads = text[name("num_attention_heads")], text.get(name("num_key_value_heads"))
    if kv_heads is None:
        text[name("num_attention_heads")] = min(heads, 8)
        return
    few = min(kv_heads, 2)
    text[name("num_key_value_heads")], text[name("num_attention_heads")] = few, few * min(heads // kv_heads, 4)


def _kept_layers(text: dict[str, Any], count: int, asked: int | None) -> list[int]:
    """Which of the model's layers the small one has: the first of each kind, and more of the first where asked."""
    by_layer = [value for value in text.values() if isinstance(value, list) and len(value) == count]
    single = text.get("per_layer_config") or {}
    kinds: dict[str, int] = {}
    for layer in range(count):
        own = [value for key, value in single.items() if str(key).isdigit() and int(key) == layer]
        kinds.setdefault(repr([[value[layer] for value in by_layer], own]), layer)
    kept = sorted(kinds.values())[:MOST_LAYERS]
    if text.get("num_kv_shared_layers"):  # the last layers attend to keys and values of earlier ones of their kind
        text["num_kv_shared_layers"] = len(kept)
        return kept + kept
    periods = [value for key, value in text.items() if PERIOD.search(key) and type(value) is int]
    least = asked or min(count, max([2, *(period for period in periods if period <= MOST_LAYERS)]))
    more = [layer for layer in range(count) if layer not in kept]
    return sorted(kept + more[: max(0, least - len(kept))])


def _choose_layers(text: dict[str, Any], count: int, kept: list[int]) -> None:
    """What is said layer by layer, for the layers that are kept."""
    for key, value in text.items():
        if isinstance(value, list) and len(value) == count:
            text[key] = [value[layer] for layer in kept]
        elif isinstance(value, list) and key.endswith("_layers") and all(type(x) is int for x in value):
            text[key] = [place for place, layer in enumerate(kept) if layer in value][: len(kept) - 1]
    if isinstance(single := text.get("per_layer_config"), dict):
        text["per_layer_config"] = {
            f"{place:02d}": value
            for place, layer in enumerate(kept)
            for key, value in single.items()
            if str(key).isdigit() and int(key) == layer
        }


def _shrink(fields: dict[str, Any], window: int, dropout: bool) -> None:
    """Caps of widths, experts and windows, in nested parts too."""
    for key, value in fields.items():
        if isinstance(value, dict):
            _shrink(value, window, dropout)
        elif isinstance(value, list) and value and all(type(x) is int for x in value) and WIDTH.search(key):
            fields[key] = [min(x, 64) for x in value]
        elif type(value) is float and DROPOUT.search(key):
            fields[key] = value if dropout else 0.0  # refused, or given up on, by name
        elif type(value) is int and (cap := _cap(key, window)) is not None:
            fields[key] = min(value, cap)


def _cap(key: str, window: int) -> int | None:
    for pattern, cap in ((WIDTH, 64), (EXPERTS, 8), (CHOSEN, 2), (SEEN, window), (FIRST_DENSE, 1)):
        if pattern.search(key):
            return cap
    return 1 if key == "topk_group" else None


def _shrink_other(fields: dict[str, Any]) -> None:
    """A vision or audio part: small, as nothing of it is run."""
    for key, value in fields.items():
        if isinstance(value, dict):
            _shrink_other(value)
        elif type(value) is int:
            for pattern, cap in ((r"layers$|^depth$", 1), (r"heads$", 2), (r"(size|dim|_channels|_rank)$", 64)):
                if re.search(pattern, key):
                    fields[key] = min(value, cap)


def small_configs(config: PreTrainedConfig, *, few_heads: bool = False, **options: Any) -> Iterator[PreTrainedConfig]:
    """Small configs to try in turn, the smallest first: some models derive one size from others."""
    fields, name = config.to_dict(), _names(config)
    text = _text(config, fields)
    heads, hidden_size = text[name("num_attention_heads")], text[name("hidden_size")]
    changes: list[dict[str, Any]] = [
        {},
        {"token_id": 1},
        {"hidden_size": heads * 16, "head_dim": 16},
        {"hidden_size": hidden_size, "token_id": 1},
    ]
    for few in (True, False) if few_heads else (False,):
        for change in changes:
            if change.get("hidden_size", 0) <= MOST_WIDTH:
                with contextlib.suppress(Exception):  # a config's own validation, of any kind
                    yield small_config(config, few_heads=few, **options, **change)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Small models are made on the CPU, and the user notices nothing: no warnings, no change of random numbers."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)


def make_small(
    kind: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype, *, seed: int = 0, **options: Any
) -> Any:
    """A small model of this class, on the CPU, in training mode, with random weights moved off the initial ones.

    To be called `quiet`ly.

    Args:
        kind: the class.
        config: of the whole model.
        dtype: of parameters and buffers.
        seed: of the weights.
        options: of `small_config`, but for sizes, which are found by trying.

    Raises:
        Exception: whatever the model's own code raises at every size.
    """
    error: Exception | None = None
    for small in small_configs(config, **options):
        try:
            model = _build(kind, small, dtype, seed)
            with torch.no_grad():
                tokens = torch.arange(TRIED_TOKENS)[None]
                model(input_ids=tokens, position_ids=tokens, use_cache=False)
                model(input_ids=tokens, use_cache=False)
        except Exception as caught:  # it does not fit these sizes: try others
            error = caught
        else:
            return model
    raise error or ValueError("its config has no smaller sizes")


def _build(kind: type[PreTrainedModel], config: PreTrainedConfig, dtype: torch.dtype, seed: int) -> Any:
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would change those of GPUs too
    model = kind._from_config(config, dtype=torch.float32, attn_implementation="eager")
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others lack fp64
    model = model.to(dtype).train()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=dtype) * SPREAD)
    return model
