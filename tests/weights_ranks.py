"""What ranks do in the tests of rank 0's weights on all of them."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import AutoModelForCausalLM

from flexsp.parallel import check_model, prepare_model
from flexsp.parallel.model import make_mesh
from flexsp.profiler.memory import LiveTensors, shard_bytes
from flexsp.train import run_model
from flexsp.train.config import ModelConfig


def ties(model: nn.Module) -> list[list[str]]:
    """Names of the same parameter."""
    by_tensor: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_tensor.setdefault(id(parameter), []).append(name)
    return [names for names in by_tensor.values() if len(names) > 1]


def persistent(model: nn.Module) -> set[str]:
    return set(model.state_dict())


def difference(config: ModelConfig) -> str:
    """How a model with rank 0's weights differs from one that is built whole on each rank; empty: in nothing."""
    rank = dist.get_rank()
    ours = run_model.build_on_first_rank(config, seed=3 + rank)  # the others' seed is of no account
    random = torch.get_rng_state()
    if {p.is_meta for p in ours.parameters()} != {rank != 0}:
        return "real weights elsewhere than on rank 0, or none there"
    run_model.prepare(ours, config)
    # as before: whole on each rank
    whole = run_model.build_model(config, seed=3)
    if not torch.equal(random, torch.get_rng_state()):
        return "random numbers go on otherwise"
    whole = prepare_model(
        whole, mesh=make_mesh(config.replicate), shard_layers=config.shard_layers,
        param_dtype=run_model.param_dtype(config), reduce_dtype=torch.float32,
    )  # fmt: skip
    return unlike(ours, whole)


def unlike(ours: Any, whole: Any) -> str:
    """The first thing in which two prepared models differ."""
    if ties(ours) != ties(whole) or persistent(ours) != persistent(whole):
        return f"ties {ties(ours)} instead of {ties(whole)}"
    if ours.config.to_dict() != whole.config.to_dict():
        return "another config"
    for kind in ("named_parameters", "named_buffers"):
        found, expected = (dict(getattr(model, kind)()) for model in (ours, whole))
        if list(found) != list(expected):
            return f"{kind}: {list(found)} instead of {list(expected)}"
        for name, tensor in found.items():
            other = expected[name]
            if kind == "named_parameters":
                if (tensor.placements, tensor.requires_grad) != (other.placements, other.requires_grad):
                    return f"{name}: {tensor.placements}"
                tensor, other = tensor.to_local(), other.to_local()
            if (tensor.dtype, tensor.device, tensor.shape) != (other.dtype, other.device, other.shape):
                return f"{name}: {tensor.dtype} of {tensor.shape} on {tensor.device}"
            if not torch.equal(*(each.reshape(-1).view(torch.uint8) for each in (tensor, other))):
                return f"{name} has other values"
    return ""


def difference_from_path(config: ModelConfig, path: ModelConfig) -> str:
    """The same where rank 0 has saved a model of `config` at the path."""
    if dist.get_rank() == 0:
        run_model.build_model(config, seed=7).save_pretrained(path.path)
    dist.barrier()
    return difference(path)


def held_bytes(config: ModelConfig) -> tuple[int, int, int, int]:
    """The most that tensors of this rank held while its shards were filled; its shards, all weights, a layer's."""
    model = run_model.build_on_first_rank(config, seed=0)
    whole = sum(p.numel() * p.element_size() for p in model.parameters())
    layer = sum(p.numel() * p.element_size() for p in model.model.layers[0].parameters())
    check_model(model)  # the small model that it tries is made once
    with LiveTensors() as tensors:
        run_model.prepare(model, config)
    return tensors.most_bytes, shard_bytes(model), whole, layer


class Keeper(nn.Module):
    """Constants of every sort, one of them kept as no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = torch.arange(3.0) * 2
        self.register_buffer("mask", torch.tensor([True, False, True]), persistent=False)
        self.register_buffer("scalar", torch.tensor(2.5, dtype=torch.bfloat16))
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("again", self.mask)
        self.register_buffer("rows", torch.arange(6).view(2, 3).T)


def constants(config: Any) -> list[Any]:
    """What a model holds by `prepare_model` alone, as in a loop of one's own: constants, and frozen parameters."""
    with torch.device("meta" if dist.get_rank() else "cpu"):
        model = AutoModelForCausalLM.from_config(config)
        model.model.layers[0].keeper = Keeper()
    model.model.embed_tokens.requires_grad_(False)
    prepare_model(model, from_first_rank=True)
    keeper = model.model.layers[0].keeper
    assert keeper.again is keeper.mask and not model.model.embed_tokens.weight.requires_grad
    return [[x.dtype, x.tolist()] for x in (keeper.plain, keeper.mask, keeper.scalar, keeper.empty, keeper.rows)]


def refusal(config: Any, other: Any, real: bool = True) -> str:
    """What is said where rank 1 builds another model, or nobody a real one."""
    first = dist.get_rank() == 0
    with torch.device("cpu" if first and real else "meta"):
        model = AutoModelForCausalLM.from_config(config if first else other)
    try:
        prepare_model(model, from_first_rank=True)
    except ValueError as error:
        return str(error)
    return ""
