"""What runs on each rank in the tests of families of models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from channel_pools import pool
from equality_ranks import make_batch
from flexsp.parallel import forward_backward, prepare_model
from flexsp.parallel.experts import give_experts_gradients
from flexsp.plans import Plan
from flexsp.profile import Layout
from reference import build, reference_step


def check_family(
    config: Any,
    lengths: list[int],
    plan: Plan,
    tolerance: float = 1e-9,
    layouts: Mapping[int, Layout] | None = None,
    dtype: torch.dtype = torch.float64,
    experts: str = "eager",
) -> None:
    """Loss and gradients of a batch, a fifth of its labels masked, are those of one device.

    A parameter that got none on one device may have zeros here.
    """
    batch = make_batch(lengths, plan, 0, 0.2, layouts=layouts)
    model = build(config, dtype)
    model.set_experts_implementation(experts)
    prepared = prepare_model(model)
    result = forward_backward(prepared, batch, pool())
    expected_loss, expected = reference_step(build(config, dtype), batch.source.sequences, batch.source.labels)
    assert abs(result.loss - expected_loss) <= tolerance * expected_loss
    for name, parameter in prepared.named_parameters():
        if not parameter.requires_grad:  # AFMoE's bias of experts is not trained by gradients
            continue
        ours = parameter.grad.full_tensor()
        theirs = expected.get(name, torch.zeros_like(ours))
        assert (ours - theirs).norm() <= tolerance * theirs.norm(), f"gradient of {name}"


class ChoosyLayer(torch.nn.Module):
    """Each rank's tokens choose the expert of its own; the last expert is nobody's."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(experts))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + self.experts[dist.get_rank()](hidden_states)


class Choosy(torch.nn.Module):
    def __init__(self, experts: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(4, 8)
        self.layers = torch.nn.ModuleList(ChoosyLayer(8, experts) for _ in range(2))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.embedding(ids)
        for layer in self.layers:
            hidden = layer(hidden_states=hidden)
        return hidden


def check_experts_that_nobody_chose(frozen: bool) -> None:
    """Every rank's backward reduces the same parameters: its own expert's gradient and zeros for the others."""
    world_size = dist.get_world_size()
    torch.manual_seed(0)
    model = Choosy(world_size + 1)
    model.embedding.requires_grad_(not frozen)
    give_experts_gradients(model.layers)
    for layer in model.layers:
        fully_shard(layer)
    fully_shard(model)
    for _ in range(2):  # gradients add up over micro-batches
        model(torch.tensor([dist.get_rank() % 4])).sum().backward()
    for layer in model.layers:
        for place, expert in enumerate(layer.experts):
            bias = expert.bias.grad.full_tensor()
            assert (bias != 0).all() if place < world_size else (bias == 0).all()
