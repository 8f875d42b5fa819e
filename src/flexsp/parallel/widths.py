"""Heads of a model's attention and how wide they are, layer by layer, as its config tells.

Configs say it in several ways: one number for all layers, a list, or a config for each layer, where transformers
refuses to read what differs from the whole one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedConfig

CALLS = {"diffllama": 2}
"""Attentions of a layer, where it is not one, by type of model."""
REPEATING = ("jetmoe",)
"""Types of models that repeat KV heads themselves, up to the queries'."""
KV_HEADS_IN_WINDOWS = {"mimo_v2_flash": 2}
"""How many times the KV heads that the config names layers with a window have, by type of model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """What one call of attention is given of a token."""

    heads: int
    kv_heads: int
    head_dim: int
    """Of queries and keys."""
    value_dim: int
    """Of values, and of the output of each head."""


def layer_configs(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    """The text config as each layer sees it."""
    text = config.get_text_config()
    if getattr(text, "is_heterogeneous", False):
        yield from text.per_layer_config
    else:
        for _ in range(text.num_hidden_layers):
            yield text


def attention_widths(config: PreTrainedConfig) -> list[Widths]:
    """One for each call of attention in a forward, layer by layer."""
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads_per_layer", None) or [None] * text.num_hidden_layers
    kinds = getattr(text, "layer_types", None) or [None] * text.num_hidden_layers
    found = []
    for own, own_heads, kind in zip(layer_configs(config), heads, kinds, strict=False):
        found += [_widths(own, own_heads, kind == "sliding_attention")] * CALLS.get(text.model_type, 1)
    return found


def _widths(own: PreTrainedConfig, own_heads: int | None, windowed: bool) -> Widths:
    heads = own_heads or own.num_attention_heads
    kv_heads = getattr(own, "num_key_value_heads", None) or heads
    if windowed:
        kv_heads *= KV_HEADS_IN_WINDOWS.get(own.model_type, 1)
    if own.model_type in REPEATING:
        kv_heads = heads
    head_dim = getattr(own, "head_dim", None) or own.hidden_size // own.num_attention_heads
    nope, rope = getattr(own, "qk_nope_head_dim", None), getattr(own, "qk_rope_head_dim", None)
    if nope and rope:  # latent attention: head_dim is the rotary part alone, and each head has keys of its own
        head_dim, kv_heads = nope + rope, heads
    return Widths(
        heads=heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=getattr(own, "v_head_dim", None) or head_dim
    )
