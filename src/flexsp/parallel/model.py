"""The Hugging Face hook: how a model is wired to our attention and to FSDP2."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import PreTrainedModel

from flexsp.parallel import clock, loss, policies
from flexsp.parallel.attention import NAME
from flexsp.parallel.check import check_model
from flexsp.parallel.experts import give_experts_gradients
from flexsp.parallel.groups import own_device
from flexsp.parallel.kinds import asked_of
from flexsp.parallel.needs import Attention
from flexsp.parallel.policies import FULL, NONE
from flexsp.parallel.weights import FirstRank


def prepare_model(
    model: PreTrainedModel,
    *,
    mesh: DeviceMesh | None = None,
    param_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    activation_checkpointing: bool = False,
    loss_chunk_tokens: int | None = None,
    shard_layers: bool = True,
    reshard_after_forward: bool = True,
    attention: str | None = None,
    exact: bool = True,
    from_first_rank: bool = False,
) -> PreTrainedModel:
    """Makes an unmodified Hugging Face causal LM run plans: our attention, and FSDP2 over all ranks.

    Args:
        model: whole, with the same weights on every rank; moved to the mesh's device layer by layer.
        mesh: from `make_mesh`, or one of the same dimensions; by default one dimension, `dp_shard`, over all ranks.
        param_dtype: what parameters are gathered and computed in, e.g. torch.bfloat16; by default their own type.
        reduce_dtype: what gradients are reduced in; by default fp32 where `param_dtype` is given, else their own type.
        activation_checkpointing: policy "full" where a plan names none: recompute each layer in the backward.
        loss_chunk_tokens: the loss is computed for so many tokens at a time; None: for what fits
            `flexsp.loss_chunks.LOGITS_BYTES`.
        shard_layers: gather parameters layer by layer; without, all at once, which is faster for a small model.
        reshard_after_forward: free a layer's gathered parameters between its forward and its backward (ZeRO-3).
        attention: the kernel of `flexsp.parallel.kernels` to use; None: the first that serves.
        exact: refuse dropout.
        from_first_rank: take all parameters and buffers from rank 0, and which of them are frozen. The others' model is
            of the same config; nobody looks at its values, and it may be on torch's meta device, so that only rank 0
            ever holds all weights.

    Returns:
        The same model, changed in place and in training mode.

    Raises:
        ValueError: the model cannot be run exactly; see `check_model`. Or with `from_first_rank`, on all ranks alike:
            they have not built the same model.
    """
    check_model(model, exact)
    _check_real(model, from_first_rank)
    mesh = mesh or make_mesh()
    computed = param_dtype or next(model.parameters()).dtype
    asked = asked_of(type(model), model.config, training=exact)
    needs = Attention.of(model.config, mesh.device_type, computed, attention, asked)
    object.__setattr__(model, "_flexsp_attention", needs)
    model.set_attn_implementation(NAME)
    if reduce_dtype is None and param_dtype is not None:
        reduce_dtype = torch.float32
    types = MixedPrecisionPolicy(param_dtype=param_dtype, reduce_dtype=reduce_dtype)
    first_rank = FirstRank(model, own_device()) if from_first_rank else None
    base = loss.find_base_model(model) if first_rank is None else loss.base_model_of_first_rank(model)
    layer_classes = set(model._no_split_modules or [])
    layers = [module for module in model.modules() if type(module).__name__ in layer_classes]
    give_experts_gradients(layers)
    for layer in layers if shard_layers else []:
        if first_rank is not None:
            first_rank.fill(layer)
        fully_shard(layer, mesh=mesh, mp_policy=types, reshard_after_forward=reshard_after_forward)
    if first_rank is not None:
        first_rank.fill(model)
    fully_shard(model, mesh=mesh, mp_policy=types)
    device = next(model.parameters()).device
    clock.install(model, layers, device)
    policies.install(model, layers, FULL if activation_checkpointing else NONE, device)
    loss.install(model, base, clock.clock_of(model), loss_chunk_tokens)
    model.train()
    return model


def _check_real(model: PreTrainedModel, from_first_rank: bool) -> None:
    """
    Raises:
        ValueError: the model has no weights, and is to get none.
    """
    empty = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if empty is not None and not from_first_rank:
        raise ValueError(
            f"model={type(model).__name__}: {empty} is on the meta device and has no values; build the model on rank 0 "
            f"for real and set from_first_rank=True, or build it so on all ranks"
        )


def make_mesh(replicate: int = 1) -> DeviceMesh:
    """All ranks, for FSDP2: parameters are sharded over `world_size / replicate` ranks, and held `replicate` times.

    Ranks that share one set of parameters are consecutive: the first `world_size / replicate` hold the first one.

    Raises:
        ValueError: `replicate` does not divide the number of ranks.
    """
    device_type = own_device().type
    world_size = dist.get_world_size()
    if replicate < 1 or world_size % replicate:
        fitting = ", ".join(str(n) for n in range(1, world_size + 1) if world_size % n == 0)
        raise ValueError(f"replicate={replicate} must divide world_size={world_size}; choose one of {fitting}")
    if replicate == 1:
        return init_device_mesh(device_type, (world_size,), mesh_dim_names=("dp_shard",))
    shape = (replicate, world_size // replicate)
    return init_device_mesh(device_type, shape, mesh_dim_names=("dp_replicate", "dp_shard"))


def attention_of(model: PreTrainedModel) -> Attention:
    """What a prepared model's layers ask of attention kernels.

    Raises:
        ValueError: it has not been prepared, or its config has come to ask for other attention since.
    """
    attention = getattr(model, "_flexsp_attention", None)
    if not isinstance(attention, Attention):
        raise ValueError(f"model={type(model).__name__} has not been prepared; call prepare_model first")
    found = model.config.get_text_config()._attn_implementation
    if found != NAME:  # each rank would attend to its own share alone
        raise ValueError(
            f"model={type(model).__name__}: its config asks for attention {found!r}, not for flexsp's: another model "
            f"was built from the same config object, or it was set since; give each model a copy of the config"
        )
    return attention
