"""What a Hugging Face config leaves unsaid: how the layers of each `model_type` are built.

A config gives sizes. Whether a projection has a bias, how many norms a layer has and whether the MLP is gated is in the
model's code. This table holds it for the types we know; each was compared with the model that transformers builds.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

GATED_ACTIVATIONS = ("silu", "swish", "swiglu", "geglu")
"""Activations that, in a type we do not know, suggest a gated MLP."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """How the layers of a model type are built. A string in place of a flag names the config's field that decides."""

    gated: bool = True
    """Whether the MLP has three matrices (gate, up, down) and not two."""
    qkv_bias: bool | str = False
    out_bias: bool | str = False
    mlp_bias: bool | str = False
    bias_default: bool = False
    """What such a field is where the config lacks it."""
    head_bias: bool = False
    """Whether the output head has a bias."""
    layer_norm: bool = False
    """LayerNorm, which has a bias, and not RMSNorm."""
    norm_weights: bool = True
    """Whether norms have parameters."""
    norms_per_layer: int = 2
    qk_norm: str = ""
    """Norms of queries and keys: "head" is one over head_dim, "full" one over all heads."""
    embedding_norm: bool = False
    positions: str = ""
    """The field that gives the number of learned positions."""
    extra_positions: int = 0
    tied: bool = False
    """What `tie_word_embeddings` is where the config does not say."""
    head_dim: int | None = None
    """What `head_dim` is where the config does not say; None is hidden_size / heads."""
    shared_gate: bool = False
    """Whether the shared expert has a gate of its own."""


_LLAMA = Family(qkv_bias="attention_bias", out_bias="attention_bias", mlp_bias="mlp_bias")
_GPT = Family(gated=False, qkv_bias=True, out_bias=True, mlp_bias=True, layer_norm=True)
_GEMMA = Family(qkv_bias="attention_bias", out_bias="attention_bias", tied=True, head_dim=256)
_QWEN3 = Family(qkv_bias="attention_bias", out_bias="attention_bias", qk_norm="head", head_dim=128)
_OLMO2 = Family(qkv_bias="attention_bias", out_bias="attention_bias", qk_norm="full")

FAMILIES = {
    "llama": _LLAMA,
    "granite": _LLAMA,
    "granitemoe": _LLAMA,
    "mistral": Family(),
    "mixtral": Family(),
    "qwen2": Family(qkv_bias=True),
    "qwen2_moe": Family(qkv_bias=True, shared_gate=True),
    "qwen3": _QWEN3,
    "qwen3_moe": replace(_QWEN3, head_dim=None),
    "gemma": _GEMMA,
    "gemma2": replace(_GEMMA, norms_per_layer=4),
    "gemma3_text": replace(_GEMMA, norms_per_layer=4, qk_norm="head"),
    "phi3": Family(),
    "olmo": Family(qkv_bias="attention_bias", out_bias="attention_bias", norm_weights=False),
    "olmo2": _OLMO2,
    "olmo3": _OLMO2,
    "olmoe": _OLMO2,
    "gpt2": replace(_GPT, positions="n_positions", tied=True),
    "gpt_bigcode": replace(_GPT, positions="n_positions", tied=True),
    "gpt_neo": replace(_GPT, qkv_bias=False, positions="max_position_embeddings", tied=True),
    "gpt_neox": replace(_GPT, qkv_bias="attention_bias", out_bias="attention_bias", bias_default=True),
    "starcoder2": replace(
        _GPT, qkv_bias="use_bias", out_bias="use_bias", mlp_bias="use_bias", bias_default=True, tied=True
    ),
    "phi": replace(_GPT, norms_per_layer=1, head_bias=True),
    "opt": replace(
        _GPT, qkv_bias="enable_bias", out_bias="enable_bias", mlp_bias="enable_bias", bias_default=True,
        tied=True, positions="max_position_embeddings", extra_positions=2,
    ),
    "bloom": replace(_GPT, embedding_norm=True, tied=True),
    "falcon": replace(_GPT, qkv_bias="bias", out_bias="bias", mlp_bias="bias", tied=True),
}  # fmt: skip


def family_of(model_type: str, activation: str) -> tuple[Family, str | None]:
    """The family of a model type, and what was assumed where the type is not known."""
    if model_type in FAMILIES:
        return FAMILIES[model_type], None
    gated = any(name in activation for name in GATED_ACTIVATIONS)
    kind = "gated (three matrices)" if gated else "not gated (two matrices)"
    return (
        replace(_LLAMA, gated=gated),
        f"model_type={model_type!r} is not known: MLP taken as {kind} by hidden_act={activation!r}, "
        f"norms and biases as in llama",
    )
