"""A model that lies in a folder, its config changed where that is asked for, and no weight of it drawn anew."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from flexsp import jsonfields as jf

log = logging.getLogger(__name__)

ROPE = "rope_parameters"
OLD_ROPE = ("rope_scaling", "rope_theta")
"""What older files say `rope_parameters` with; transformers takes it before them."""
NAMED = 3
"""How many weights an error names."""


class Unfit(ValueError):
    """The folder and `model.config` do not go together."""


def load_pretrained(path: str, fields: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The model of a folder, with all weights from there.

    Args:
        path: the folder.
        fields: `model.config`: what its config says otherwise.
        dtype: of the weights.

    Raises:
        Unfit: fields that the config does not have, or weights that the folder lacks or has in other shapes.
        Exception: of any kind: transformers cannot load it.
    """
    config = {"config": changed_config(path, fields)} if fields else {}
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # a table of what is said below in a line
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True, **config
        )  # mismatched sizes are not ignored: told of, by name
    finally:
        transformers_logging.set_verbosity(verbosity)
    _check_loaded(path, fields, found)
    return model


def changed_config(path: str, fields: Mapping[str, Any]) -> PreTrainedConfig:
    """The config in a folder with other values for some of its fields; tables in it are changed field by field.

    Raises:
        Unfit: a field that it does not have, or another model_type.
    """
    config = AutoConfig.from_pretrained(path, local_files_only=True)
    model_type = fields.get("model_type", config.model_type)
    if model_type != config.model_type:
        raise Unfit(
            f"model.config.model_type={jf.short(model_type)} is not the {config.model_type!r} of model.path={path!r}; "
            f"leave it out, or give another folder"
        )
    # from the file, not from the config: what it derives from other fields must follow those
    said, _ = PreTrainedConfig.get_config_dict(path, local_files_only=True)
    return type(config).from_dict(_changed(said, config, fields, "model.config"))


def _changed(said: Mapping[str, Any], config: PreTrainedConfig, fields: Mapping[str, Any], where: str) -> Any:
    """What a config.json says, changed. `config`: made of it."""
    changed = dict(said)
    known = {*config.to_dict(), *config.attribute_map}
    for alias, value in fields.items():
        if alias not in known:
            instead = f"rotary positions are {where}.{ROPE}" if alias in OLD_ROPE else "correct its name"
            raise Unfit(f"{where}.{alias[:60]}={jf.short(value)} is no field of {type(config).__name__}; {instead}")
        name = config.attribute_map.get(alias, alias)
        for other in [each for each, meant in config.attribute_map.items() if meant == name]:
            changed.pop(other, None)
        now = getattr(config, name, None)
        if isinstance(now, PreTrainedConfig) and isinstance(value, Mapping):
            changed[name] = _changed(said.get(name) or {}, now, value, f"{where}.{name}")
        else:
            changed[name] = _updated(now, value)
        if name == ROPE:  # `now` has what it says
            changed.pop(OLD_ROPE[0], None)
    return changed


def _updated(now: Any, value: Any) -> Any:
    """`value`; what a table does not say stays."""
    if not (isinstance(now, Mapping) and isinstance(value, Mapping)):
        return value
    return {**now, **{key: _updated(now.get(key), inner) for key, inner in value.items()}}


def _check_loaded(path: str, fields: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """
    Raises:
        Unfit: a weight would begin at random.
    """
    remedy = "correct model.config" if fields else "give a whole model"
    if mismatched := sorted(found["mismatched_keys"]):
        texts = [f"{name} is {tuple(there)} in it and {tuple(here)} by the config" for name, there, here in mismatched]
        raise Unfit(f"model.path={path!r} holds weights of other shapes: {_some(texts)}; {remedy}")
    if missing := sorted(found["missing_keys"]):
        raise Unfit(f"model.path={path!r} lacks weights, which would begin at random: {_some(missing)}; {remedy}")
    if unused := sorted(found["unexpected_keys"]):
        log.warning("model.path=%r: weights that the model does not have are not taken: %s", path, _some(unused))


def _some(texts: list[str]) -> str:
    more = f" and {len(texts) - NAMED} more" if len(texts) > NAMED else ""
    return f"{', '.join(texts[:NAMED])}{more}"
