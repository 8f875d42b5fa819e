"""Whether few of a model's layers stand for all of them: what `flexsp profile` measures is extrapolated to the rest.

First what the config says layer by layer, where the field can be named; then the parameters of each layer, of a model
built on torch's meta device: shapes without numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from flexsp import jsonfields as jf
from flexsp.estimate import ModelShape

EXPERT_LAYERS = (
    "mlp_only_layers", "first_k_dense_replace", "decoder_sparse_step", "moe_layers", "interleave_moe_layer_step",
    "moe_layer_start_index", "moe_layer_end_index", "moe_layer_interval", "moe_layer_freq",
)  # fmt: skip
"""Fields that say which layers have experts."""
ALIKE_ALL_THE_SAME = ("no_rope_layers", *EXPERT_LAYERS)
"""Lists that are not looked at: a layer without rotary embedding costs about what one with it does, and lists of layers
with experts are of indices; the parameters tell those apart."""


def check_alike(config: PreTrainedConfig, shape: ModelShape) -> None:
    """Refuses a model of which few layers do not stand for the others.

    Args:
        config: of the whole model; left as it is.
        shape: of the same.

    Raises:
        ValueError: the layers differ; names the field, or the parameters.
    """
    text = config.get_text_config().to_dict()
    for field, kinds in text.items():
        if isinstance(kinds, list) and len(kinds) == shape.num_layers and field not in ALIKE_ALL_THE_SAME:
            found = list(dict.fromkeys(map(str, kinds)))
            if len(found) > 1:
                counts = ", ".join(f"{list(map(str, kinds)).count(kind)} x {kind}" for kind in found[:4])
                raise _unlike(f"{field}={jf.short(found)}", f"the layers are not alike ({counts})")
    most = text.get("max_window_layers")
    windows = bool(text.get("sliding_window")) and bool(text.get("use_sliding_window", True))
    if windows and not text.get("layer_types"):
        if isinstance(most, int) and 0 < most < shape.num_layers and "use_sliding_window" in text:
            raise _unlike(f"max_window_layers={most}", f"not all of {shape.num_layers} layers have a window")
        pattern = text.get("sliding_window_pattern")
        if isinstance(pattern, int) and pattern > 1:
            raise _unlike(f"sliding_window_pattern={pattern}", "not all layers have a window")
    if 0 < shape.num_dense_layers < shape.num_layers:
        raise _unlike(_experts(text), f"{shape.num_dense_layers} of {shape.num_layers} layers have no experts")
    other = _other_parameters(config)
    if other is not None:
        raise _unlike(_experts(text), f"layer {other} has other parameters than layer 0")


def _unlike(field: str, why: str) -> ValueError:
    return ValueError(
        f"{field}: {why}, and few of them cannot stand for all; measure the whole model with flexsp train instead"
    )


def _experts(text: dict[str, Any]) -> str:
    """The fields that say which layers have experts."""
    return (
        ", ".join(f"{name}={jf.short(text[name])}" for name in EXPERT_LAYERS if text.get(name)) or "num_hidden_layers"
    )


def _other_parameters(config: PreTrainedConfig) -> int | None:
    """The first layer whose parameters are not, by name and shape, those of the first; None where all are alike."""
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(type(config).from_dict(config.to_dict()))
    except Exception:  # of the model's own code; building a part of it will say what is wrong
        return None
    kinds = set(model._no_split_modules or [])
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    shapes = [{name: p.shape for name, p in layer.named_parameters()} for layer in layers]
    return next((at for at, each in enumerate(shapes) if each != shapes[0]), None)
