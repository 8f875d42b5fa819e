"""Ways to hold the activations of a layer, chosen per micro-batch; the names are those of `flexsp.estimate`:

    none        everything is kept
    selective   norms and the MLP are computed again in the backward; attention and what it takes in are kept
    full        the layer is computed again from its input, the exchanges of its group included
    offload     what the layer keeps is on the host between its forward and its backward

A layer's own `forward` is what is wrapped. FSDP2's hooks are around the call of the module, so parameters are gathered
once a direction, and what is computed again in the backward finds them gathered. All ranks of a group compute the same
layers again in the same order, and so meet in the exchanges of the second forward as in those of the first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from flexsp.estimate.shape import POLICIES
from flexsp.parallel.offload import Offloader
from flexsp.parallel.recompute import Recipes

NONE, SELECTIVE, FULL, OFFLOAD = POLICIES

Forward = Callable[..., Any]


class Policies:
    """The activation policies of one model. `forward_backward` says at each micro-batch which one holds."""

    def __init__(self, kind: str, layers: Sequence[torch.nn.Module], default: str, device: torch.device) -> None:
        """Wraps the layers, and inside of them norms and MLPs.

        Args:
            kind: the model's class, for errors.
            layers: its decoder layers.
            default: the policy of micro-batches whose plan names none.
            device: of the model.
        """
        self.default = self.current = default
        self._kind = kind
        self._recipes, self._offloader = Recipes(), Offloader(device)
        self._without_layers = not layers
        self._without_mlp = any(not mlps_of(layer) for layer in layers)
        for layer in layers:
            mlps = mlps_of(layer)
            for norm in norms_of(layer, mlps):
                self._wrap_norm(norm)
            for mlp in mlps:
                self._wrap_mlp(mlp)
            self._wrap_layer(layer)

    @property
    def served(self) -> tuple[str, ...]:
        """The policies that the model runs."""
        return tuple(name for name in POLICIES if self.refusal(name) is None)

    def refusal(self, policy: str) -> str | None:
        """Why the model does not run a policy; None where it does."""
        if policy not in POLICIES:
            return f"policy={policy!r} is unknown; choose one of {', '.join(POLICIES)}"
        if policy != NONE and self._without_layers:
            return f"policy={policy!r}: {self._kind} does not say what its layers are (_no_split_modules); use none"
        if policy == SELECTIVE and self._without_mlp:
            return f"policy={policy!r}: the layers of {self._kind} have no MLP of their own to compute again; use full"
        return None

    def check(self, policies: Iterable[str | None]) -> None:
        """Refuses what the model does not run.

        Raises:
            ValueError: names the policy.
        """
        for policy in policies:
            refusal = None if policy is None else self.refusal(policy)
            if refusal is not None:
                raise ValueError(refusal)

    def begin(self, policy: str | None) -> None:
        """A micro-batch begins; None: the default."""
        self.current = policy or self.default

    def _wrap_layer(self, layer: torch.nn.Module) -> None:
        plain = layer.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.current == NONE or not torch.is_grad_enabled():
                return plain(*args, **kwargs)
            if self.current == FULL:
                return checkpoint(functools.partial(plain, **kwargs), *args, use_reentrant=False)
            if self.current == SELECTIVE:
                with self._recipes.at_work():
                    return plain(*args, **kwargs)
            with self._offloader.at_work(layer, args, kwargs):
                return plain(*args, **kwargs)

        _replace(layer, forward)

    def _wrap_mlp(self, mlp: torch.nn.Module) -> None:
        plain = mlp.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.current == SELECTIVE and torch.is_grad_enabled():
                return checkpoint(functools.partial(plain, **kwargs), *args, use_reentrant=False)
            return plain(*args, **kwargs)

        _replace(mlp, forward)

    def _wrap_norm(self, norm: torch.nn.Module) -> None:
        plain = norm.forward

        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            if self.current == SELECTIVE and torch.is_grad_enabled() and not args and not kwargs:
                return self._recipes.run(plain, x)
            return plain(x, *args, **kwargs)

        _replace(norm, forward)


def _replace(module: torch.nn.Module, forward: Forward) -> None:
    """Makes `forward` what the module's hooks surround."""
    module.__dict__["forward"] = functools.wraps(module.forward)(forward)


def mlps_of(layer: torch.nn.Module) -> list[torch.nn.Module]:
    """A layer's MLP, or mixture of experts: what it has beside attention, norms and single matrices."""
    found = []
    for name, child in layer.named_children():
        kind = type(child).__name__
        attends = "attn" in name or "attention" in name or "Attention" in kind
        composite = any(True for _ in child.children()) or any(p.dim() > 2 for p in child.parameters(recurse=False))
        if composite and not attends and not _is_norm(child):
            found.append(child)
    return found


def norms_of(layer: torch.nn.Module, outside: Sequence[torch.nn.Module]) -> list[torch.nn.Module]:
    """A layer's norms, those inside of its attention too, but none inside of the modules `outside`."""
    inner = {id(module) for each in outside for module in each.modules()}
    return [module for module in layer.modules() if _is_norm(module) and id(module) not in inner]


def _is_norm(module: torch.nn.Module) -> bool:
    return "norm" in type(module).__name__.lower() and not any(True for _ in module.children())


def install(model: PreTrainedModel, layers: Sequence[torch.nn.Module], default: str, device: torch.device) -> None:
    """Gives `model` its policies.

    Raises:
        ValueError: the model does not run the default.
    """
    policies = Policies(type(model).__name__, layers, default, device)
    policies.check([default])
    object.__setattr__(model, "_flexsp_policies", policies)


def policies_of(model: torch.nn.Module) -> Policies:
    """The policies of a prepared model."""
    policies = getattr(model, "_flexsp_policies", None)
    if not isinstance(policies, Policies):
        raise ValueError(f"model={type(model).__name__} has not been prepared; call prepare_model first")
    return policies
