"""Norms under selective recompute: neither their inner tensors nor their outputs are kept, both come from the input.

`torch.utils.checkpoint` drops what is inside of a norm, but its output would be kept all the same, by the matrices that
take it in. So while a layer's forward is at work, what autograd wants to keep of a norm's output becomes a recipe: the
norm and its input, which the norm's own backward needs anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Norm = Callable[[Tensor], Any]


class Recipe:
    """How to make a norm's output again. It is made once for all that keep it, and goes with the last of them."""

    def __init__(self, norm: Norm, x: Tensor) -> None:
        self._norm, self._x = norm, x.detach()
        self._kept_by = 0
        self._made: Tensor | None = None

    def keep(self) -> None:
        """One more tensor of the graph is made from it."""
        self._kept_by += 1

    def make(self) -> Tensor:
        """The norm's output, contiguous."""
        made = self._made
        if made is None:
            with torch.no_grad():
                made = self._norm(self._x).contiguous()
        self._kept_by -= 1
        self._made = made if self._kept_by > 0 else None
        return made


@dataclass(frozen=True, slots=True, kw_only=True)
class _View:
    """A saved tensor that lies in a norm's output."""

    recipe: Recipe
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Output:
    """A norm's output while its layer's forward is at work; held, so that nothing else comes to lie at its address."""

    tensor: Tensor
    version: int
    recipe: Recipe


class Recipes:
    """The norms' outputs of the layer at work."""

    def __init__(self) -> None:
        self._outputs: dict[int, _Output] | None = None

    def run(self, norm: Norm, x: Tensor) -> Any:
        """A norm's output, of which a layer at work keeps the recipe."""
        out = checkpoint(norm, x, use_reentrant=False, preserve_rng_state=False)
        if self._outputs is not None and isinstance(out, Tensor) and _alone_in_memory(out):
            address = out.untyped_storage().data_ptr()
            self._outputs[address] = _Output(tensor=out, version=out._version, recipe=Recipe(norm, x))
        return out

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """A layer's forward, inside of which norms' outputs are kept as recipes."""
        self._outputs = {}
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
                yield
        finally:
            self._outputs = None

    def _pack(self, tensor: Tensor) -> Tensor | _View:
        found = (self._outputs or {}).get(tensor.untyped_storage().data_ptr()) if _is_plain(tensor) else None
        if found is None or found.tensor.dtype != tensor.dtype or found.version != tensor._version:
            return tensor
        found.recipe.keep()
        return _View(
            recipe=found.recipe,
            size=tuple(tensor.size()),
            stride=tensor.stride(),
            offset=int(tensor.storage_offset()),
        )


def _unpack(kept: Tensor | _View) -> Tensor:
    if isinstance(kept, Tensor):
        return kept
    return kept.recipe.make().as_strided(kept.size, kept.stride, kept.offset)


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter)


def _alone_in_memory(out: Tensor) -> bool:
    """Whether a tensor made again has the same strides, and nothing beside it in its storage."""
    return _is_plain(out) and out.is_contiguous() and out.untyped_storage().nbytes() == out.numel() * out.element_size()
