"""Experts that no token chose: they get a gradient of zeros, since FSDP2 reduces the same parameters on every rank.

Most experts of transformers are stacked into one parameter, which has a gradient as soon as any expert is chosen. But
some models hold each expert's parameters apart, and others have experts that do nothing, which a rank's few tokens (or
the one filler token of an idle rank) may all choose.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

_EXPERT = re.compile(r"(^|\.)\w*experts\.")


def is_expert(name: str) -> bool:
    """Whether a parameter of this name may go without a token."""
    return _EXPERT.search(name) is not None


def give_experts_gradients(layers: Iterable[torch.nn.Module]) -> None:
    """Makes every backward of these layers leave a gradient in each trainable parameter of their experts.

    Args:
        layers: decoder layers, sharded or about to be; those without experts are left as they are.
    """
    for layer in layers:
        if any(is_expert(name) for name, _ in layer.named_parameters()):
            layer.register_forward_pre_hook(_through, with_kwargs=True)


def _through(layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Leads a layer's input through `_LastInBackward`."""
    if not torch.is_grad_enabled():
        return None
    if args and isinstance(args[0], Tensor):
        return (_lead(args[0], layer), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": _lead(kwargs["hidden_states"], layer)}


def _lead(hidden: Tensor, layer: torch.nn.Module) -> Tensor:
    if not hidden.requires_grad:  # the embedding is frozen: without this no backward would come by here
        hidden = hidden.detach().requires_grad_()
    led: Tensor = _LastInBackward.apply(hidden, layer)  # type: ignore[no-untyped-call]
    return led


class _LastInBackward(torch.autograd.Function):
    """Changes nothing. Its backward comes when all of the layer's is done, and before FSDP2 reduces its gradients.

    FSDP2 finds that moment by a function of its own on the layer's inputs, put there by a hook that runs before ours.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, layer: torch.nn.Module) -> Tensor:
        ctx.layer = layer
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        for name, parameter in ctx.layer.named_parameters():
            if parameter.requires_grad and parameter.grad is None and is_expert(name):
                parameter.grad = torch.zeros_like(parameter)
        return grads[0], None
