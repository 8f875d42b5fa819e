"""The Hugging Face hook: what a model must be to run exactly, and how it is wired to FSDP2."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedConfig, PreTrainedModel

from flexsp.parallel import clock
from flexsp.parallel.attention import NAME, REFUSED_ARGUMENTS

EXPERT_FIELDS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
LOCAL_ROPE_TYPES = ("dynamic", "longrope")
"""Rotary scalings that read the longest position of the tokens at hand: on a share of a row, the wrong one."""


def servable_degrees(config: PreTrainedConfig, world_size: int) -> list[int]:
    """Degrees up to `world_size` that divide the model's heads, which is what Ulysses serves."""
    heads = config.get_text_config().num_attention_heads
    return [degree for degree in range(1, world_size + 1) if heads % degree == 0]


def check_degrees(degrees: Iterable[int], config: PreTrainedConfig, world_size: int) -> None:
    """Refuses a degree that the model's heads or the ranks cannot serve.

    Raises:
        ValueError: names the degree and those that would work.
    """
    servable = servable_degrees(config, world_size)
    heads = config.get_text_config().num_attention_heads
    for degree in degrees:
        if degree not in servable:
            raise ValueError(
                f"sp_degree={degree} cannot be served with num_attention_heads={heads} on world_size={world_size}; "
                f"degrees that work: {servable}"
            )


def check_model(model: PreTrainedModel, exact: bool = True) -> None:
    """Refuses a model that would train with another loss or gradient than on one device.

    Args:
        model: a causal language model.
        exact: whether dropout is refused: its random numbers depend on the plan.

    Raises:
        ValueError: names the field of the config.
    """
    config = model.config.get_text_config()
    kind = type(model).__name__
    if not model._supports_attention_backend:
        raise ValueError(f"model={kind} does not call the attention interface of transformers; use one that does")
    kinds = set(getattr(config, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    if kinds:
        raise ValueError(f"layer_types={sorted(kinds)} of {kind} keep state across tokens; use full attention layers")
    windowed = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True) and windowed:
        raise ValueError(f"sliding_window={config.sliding_window} of {kind} is not computed; set it to None")
    for field in ("attn_logit_softcapping", *REFUSED_ARGUMENTS):
        if getattr(config, field, None) is not None:
            raise ValueError(f"{field}={getattr(config, field)} of {kind} is not computed; use a model without it")
    for field in EXPERT_FIELDS:
        if (getattr(config, field, None) or 0) > 1:
            raise ValueError(
                f"{field}={getattr(config, field)} of {kind}: experts that no token chose on a rank get no gradient "
                f"there, which FSDP2 cannot reduce; use a dense model"
            )
    rope = getattr(config, "rope_parameters", None) or {}
    for parameters in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if parameters.get("rope_type") in LOCAL_ROPE_TYPES:
            raise ValueError(
                f"rope_type={parameters['rope_type']!r} of {kind} depends on the longest position of a rank's own "
                f"tokens; use one of fixed scaling, e.g. 'yarn' or 'linear'"
            )
    if exact:
        _check_dropout(model, config)


def _check_dropout(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    remedy = "set it to 0, or give up exactness with exact=False"
    for field, value in config.to_dict().items():
        named = "dropout" in field or field.endswith("_pdrop")
        if named and "classifier" not in field and isinstance(value, float) and value > 0:
            raise ValueError(f"{field}={value}: dropout makes loss and gradients depend on the plan; {remedy}")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and module.p > 0:
            raise ValueError(f"{name}.p={module.p}: dropout makes loss and gradients depend on the plan; {remedy}")


def prepare_model(
    model: PreTrainedModel,
    *,
    mesh: DeviceMesh | None = None,
    param_dtype: torch.dtype | None = None,
    activation_checkpointing: bool = False,
    shard_layers: bool = True,
    reshard_after_forward: bool = True,
    exact: bool = True,
) -> PreTrainedModel:
    """Makes an unmodified Hugging Face causal LM run plans: our attention, and FSDP2 over all ranks.

    Args:
        model: whole, with the same weights on every rank; moved to the mesh's device layer by layer.
        mesh: by default one dimension, `dp_shard`, over all ranks.
        param_dtype: what parameters are gathered and computed in, e.g. torch.bfloat16; gradients are reduced in fp32.
        activation_checkpointing: recompute each layer in the backward.
        shard_layers: gather parameters layer by layer; without, all at once, which is faster for a small model.
        reshard_after_forward: free a layer's gathered parameters between its forward and its backward (ZeRO-3).
        exact: refuse dropout.

    Returns:
        The same model, changed in place and in training mode.

    Raises:
        ValueError: the model cannot be run exactly; see `check_model`.
    """
    check_model(model, exact)
    if mesh is None:
        device_type = "cuda" if "nccl" in dist.get_backend() else "cpu"
        mesh = init_device_mesh(device_type, (dist.get_world_size(),), mesh_dim_names=("dp_shard",))
    model.set_attn_implementation(NAME)
    if activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy = MixedPrecisionPolicy()
    if param_dtype is not None:
        policy = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=torch.float32)
    layer_classes = set(model._no_split_modules or [])
    layers = [module for module in model.modules() if type(module).__name__ in layer_classes]
    for layer in layers if shard_layers else []:
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    clock.install(model, layers, next(model.parameters()).device)
    model.train()
    return model
