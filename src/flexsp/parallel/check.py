"""What a model must be to train exactly: everything else is refused by name, before anything is built on it.

First what its config and modules say, where the remedy is known; then what a small model of its kind does (`kinds`),
which finds also what nobody has named.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from flexsp.parallel.kinds import RANDOM, UNCHECKED, fault_of

log = logging.getLogger(__name__)

LAYER_TYPES = ("full_attention", "sliding_attention")
"""What attention layers may be."""
STATES = {
    "chunked_attention": "see only their own chunk of a sequence, which is not computed",
    "linear_attention": "keep a state across tokens",
    "conv": "mix neighbouring tokens by a convolution",
}
"""What other layers do; those that are not here are attention of another kind."""
LOCAL_ROPE_TYPES = ("dynamic", "longrope")
"""Rotary scalings that read the longest position of the tokens at hand: on a share of a row, the wrong one."""
FIXED_BY_ALPHA = ("hunyuan_v1_dense", "hunyuan_v1_moe")
"""Types of models that call a scaling "dynamic" which an `alpha` makes fixed."""


def check_model(model: PreTrainedModel, exact: bool = True) -> None:
    """Refuses a model that would train with another loss or gradient than on one device.

    Args:
        model: a causal language model.
        exact: whether dropout, and other randomness of training, is refused: its random numbers depend on the plan; and
            a model of which no small one can be made to check it by.

    Raises:
        ValueError: names the field of the config, or the layer.
    """
    kind = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(f"is_encoder_decoder=True of {kind}: it has no single row of tokens; use a decoder alone")
    if not model._supports_attention_backend:
        convolutions = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Conv1d)]
        why = f", and its {convolutions[0]} mixes neighbouring tokens" if convolutions else ""
        raise ValueError(f"model={kind} does not call the attention interface of transformers{why}; use one that does")
    config = model.config.get_text_config()
    _check_layers(kind, config)
    _check_causal(kind, config)
    _check_rope(kind, config)
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            f"output_router_logits=True of {kind}: the balancing loss of its experts is over all tokens of a batch, "
            f"which no rank has; set it to False"
        )
    if exact:
        _check_dropout(model, config)
    fault = fault_of(type(model), model.config, training=exact)
    if fault is None:
        return
    waived = fault == RANDOM or fault.startswith(UNCHECKED)
    if not waived or exact:
        remedy = "give up exactness with exact=False" if waived else "use another model"
        raise ValueError(f"model={kind}: {fault}; {remedy}")
    log.warning("model=%s: %s", kind, fault)


def _check_layers(kind: str, config: PreTrainedConfig) -> None:
    others = [each for each in dict.fromkeys(getattr(config, "layer_types", None) or []) if each not in LAYER_TYPES]
    if others:
        why = STATES.get(others[0], "are attention of a kind that is not computed")
        raise ValueError(f"layer_types={others} of {kind} {why}; use a model of {' and '.join(LAYER_TYPES)}")


def _check_causal(kind: str, config: PreTrainedConfig) -> None:
    for field, wrong, right in (("is_causal", False, True), ("use_bidirectional_attention", True, False)):
        if getattr(config, field, None) is wrong:
            raise ValueError(
                f"{field}={wrong} of {kind}: tokens see later ones, which is not computed; set it to {right}"
            )


def _check_rope(kind: str, config: PreTrainedConfig) -> None:
    for parameters in _nested(getattr(config, "rope_parameters", None)):
        fixed = config.model_type in FIXED_BY_ALPHA and parameters.get("alpha")
        if parameters.get("rope_type") in LOCAL_ROPE_TYPES and not fixed:
            raise ValueError(
                f"rope_type={parameters['rope_type']!r} of {kind} depends on the longest position of a rank's own "
                f"tokens; use one of fixed scaling, e.g. 'yarn' or 'linear'"
            )


def _nested(parameters: Any) -> Iterator[dict[str, Any]]:
    """A dict and the dicts in it, as rope_parameters may be given for each type of layer."""
    if isinstance(parameters, dict):
        yield parameters
        for value in parameters.values():
            yield from _nested(value)


def _check_dropout(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    remedy = "set it to 0, or give up exactness with exact=False"
    for field, value in config.to_dict().items():
        named = "dropout" in field or field.endswith("_pdrop")
        other = field.startswith(("classifier", "summary"))  # of heads that are no language model's
        if named and not other and isinstance(value, float) and value > 0:
            raise ValueError(f"{field}={value}: dropout makes loss and gradients depend on the plan; {remedy}")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and module.p > 0:
            raise ValueError(f"{name}.p={module.p}: dropout makes loss and gradients depend on the plan; {remedy}")
