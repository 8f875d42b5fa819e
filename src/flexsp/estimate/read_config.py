"""A model's sizes from its Hugging Face config: a dict, a JSON file, or a directory with a config.json."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flexsp import jsonfields as jf
from flexsp.estimate.families import Family, family_of
from flexsp.estimate.shape import ModelShape

HIDDEN = ("hidden_size", "n_embd", "n_embed", "d_model")
LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
HEADS = ("num_attention_heads", "n_head", "num_heads")
WIDTH = ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
MOST_SIZE, MOST_LAYERS = 1 << 24, 1 << 14
"""More are a slip of the keyboard: layers are counted one by one."""
CHOSEN = ("num_experts_per_tok", "moe_top_k", "top_k")


def load_model_shape(path: str | Path) -> ModelShape:
    """Reads a config.json, or the one in a directory.

    Raises:
        ValueError: the file cannot be read, or a field is missing or wrong; the message names both.
    """
    path = Path(path)
    if os.path.isdir(path):
        path = path / "config.json"
    document = jf.read_object(path)
    # A directory is named by the model, a config.json by its directory, another file by itself.
    name = path.resolve().parent.name if path.name == "config.json" else path.stem
    if not document.get("_name_or_path"):
        document["_name_or_path"] = name
    return model_shape(document, str(path))


def model_shape(config: Mapping[str, Any], where: str = "model config") -> ModelShape:
    """The sizes in a Hugging Face config, e.g. `config.to_dict()`.

    Args:
        config: the fields; of a model with a `text_config`, that is read.
        where: what to call the config in errors.

    Raises:
        ValueError: a field is missing or wrong, or the attention is of a kind that the estimate does not know.
    """
    assumptions: list[str] = []
    fields = _Fields(_text_config(config, where, assumptions), where)
    model_type = fields.text("model_type", "")
    family, assumed = family_of(model_type, fields.text(("hidden_act", "hidden_activation", "activation_function"), ""))
    if assumed:
        assumptions.append(assumed)
    window = fields.values.get("sliding_window")
    if window and fields.flag("use_sliding_window", True):
        assumptions.append(
            f"sliding_window={window} is not estimated: attention is taken as fully causal in every layer"
        )
    if fields.values.get("kv_lora_rank"):
        raise ValueError(
            f"{where}: kv_lora_rank={fields.values['kv_lora_rank']}: latent attention is not estimated; "
            f"use a model with plain or grouped-query attention"
        )
    hidden, heads = fields.size(HIDDEN), fields.size(HEADS)
    kv_heads = _kv_heads(fields, model_type, heads)
    head_dim = fields.size("head_dim", family.head_dim or 0) or hidden // heads
    if head_dim == 0:
        raise ValueError(f"{where}: hidden_size={hidden} must be at least num_attention_heads={heads}; correct one")
    if heads % kv_heads:
        raise ValueError(f"{where}: num_key_value_heads={kv_heads} must divide num_attention_heads={heads}; correct it")
    layers = fields.size(LAYERS, most=MOST_LAYERS)
    vocab = fields.size("vocab_size")
    norm = (2 if family.layer_norm else 1) * hidden if family.norm_weights else 0
    positions = fields.size(family.positions) + family.extra_positions if family.positions else 0
    experts = _experts(fields, hidden, layers)
    return ModelShape(
        name=_name(fields, config, model_type),
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        vocab_size=vocab,
        gated=family.gated,
        tied=fields.flag("tie_word_embeddings", bool(config.get("tie_word_embeddings", family.tied))),
        num_positions=positions,
        attention_vector_parameters=_attention_vectors(fields, family, model_type, hidden, heads, kv_heads, head_dim),
        mlp_bias=_has(fields, family, family.mlp_bias),
        shared_gate=family.shared_gate,
        final_parameters=norm * (2 if family.embedding_norm else 1) + (vocab if family.head_bias else 0),
        assumptions=tuple(assumptions),
        **experts,
    )


def _text_config(config: Mapping[str, Any], where: str, assumptions: list[str]) -> Mapping[str, Any]:
    nested = config.get("text_config")
    if nested is None:
        return config
    assumptions.append("text_config alone is counted: no vision or audio part")
    return jf.as_object(dict(nested) if isinstance(nested, Mapping) else nested, f"{where}: text_config")


def _name(fields: _Fields, config: Mapping[str, Any], model_type: str) -> str:
    given = fields.values.get("_name_or_path") or config.get("_name_or_path") or model_type or "model"
    return Path(str(given)).name


def _kv_heads(fields: _Fields, model_type: str, heads: int) -> int:
    if model_type == "falcon" and not fields.flag("new_decoder_architecture", False):
        return 1 if fields.flag("multi_query", True) else heads
    if model_type == "gpt_bigcode":
        return 1 if fields.flag("multi_query", True) else heads
    return fields.size(("num_key_value_heads", "num_kv_heads"), heads)


def _attention_vectors(
    fields: _Fields, family: Family, model_type: str, hidden: int, heads: int, kv_heads: int, head_dim: int
) -> int:
    """Norms and biases of one layer outside its MLP."""
    norms = family.norms_per_layer
    if model_type == "falcon":  # one norm where attention and MLP run side by side, unless the newer kind has two
        newer = fields.flag("new_decoder_architecture", False)
        side_by_side = fields.flag("parallel_attn", True)
        norms = fields.size("num_ln_in_parallel_attn", 2) if newer else 1 if side_by_side else 2
    vectors = norms * (2 if family.layer_norm else 1) * hidden if family.norm_weights else 0
    if family.qk_norm == "head":
        vectors += 2 * head_dim
    elif family.qk_norm == "full":
        vectors += (heads + kv_heads) * head_dim
    if _has(fields, family, family.qkv_bias):
        vectors += (heads + 2 * kv_heads) * head_dim
    if _has(fields, family, family.out_bias):
        vectors += hidden
    return vectors


def _has(fields: _Fields, family: Family, flag: bool | str) -> bool:
    return flag if isinstance(flag, bool) else fields.flag(flag, family.bias_default)


def _experts(fields: _Fields, hidden: int, layers: int) -> dict[str, Any]:
    """Widths and experts of the MLPs."""
    dense_width = fields.size(WIDTH, 4 * hidden)
    num_experts = fields.size(EXPERTS, 1)
    if num_experts == 1:
        return {"intermediate_size": dense_width}
    width = fields.size("moe_intermediate_size", dense_width)
    shared = fields.size("shared_expert_intermediate_size", 0, least=0)
    shared = shared or width * fields.size("n_shared_experts", 0, least=0)
    dense = set(range(fields.size("first_k_dense_replace", 0, least=0)))
    where = f"{fields.where}: mlp_only_layers"
    dense |= {jf.as_integer(i, where, 0) for i in jf.as_list(fields.values.get("mlp_only_layers") or [], where)}
    step = fields.size("decoder_sparse_step", 1)
    dense |= {i for i in range(layers) if (i + 1) % step}
    chosen = fields.size(CHOSEN)
    if chosen > num_experts:
        raise ValueError(
            f"{fields.where}: num_experts_per_tok={chosen} is above num_experts={num_experts}; correct one of them"
        )
    num_dense = len([i for i in dense if i < layers])
    return {
        "intermediate_size": width,
        "num_experts": num_experts,
        "experts_per_token": chosen,
        "shared_intermediate_size": shared,
        "num_dense_layers": num_dense,
        "dense_intermediate_size": dense_width if num_dense else 0,
    }


class _Fields:
    """The fields of a config, under any of their names. A field that is null counts as missing."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self.values, self.where = values, where

    def size(
        self, names: str | tuple[str, ...], default: int | None = None, least: int = 1, most: int = MOST_SIZE
    ) -> int:
        """A positive integer up to `most`; `default` where none of the names is there."""
        name = self._name(names)
        if name is None:
            if default is None:
                first = names if isinstance(names, str) else names[0]
                raise ValueError(
                    f"{self.where}: the field {first!r} is missing; give the config.json of a causal model"
                )
            return default
        return jf.as_integer(self.values[name], f"{self.where}: {name}", least, most)

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise ValueError(f"{self.where}: {name}={jf.short(value)} must be true or false; correct it")
        return value

    def text(self, names: str | tuple[str, ...], default: str) -> str:
        name = self._name(names)
        return default if name is None else jf.as_string(self.values[name], f"{self.where}: {name}")

    def _name(self, names: str | tuple[str, ...]) -> str | None:
        for name in (names,) if isinstance(names, str) else names:
            if self.values.get(name) is not None:
                return name
        return None
