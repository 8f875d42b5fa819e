"""Weights of rank 0 for all ranks, so that no other rank ever holds the whole model.

The other ranks build theirs on torch's meta device. Each unit of FSDP2 is filled from rank 0 just before it is sharded:

    rank 0   layer, real   | broadcast | sharded  (and its other shards freed)
    rank 1   layer, meta   | received  | sharded

so a rank holds one unit whole at a time, on its device, as a step does where it gathers. What is sharded is what it
would be with the model whole on every rank: ties, uneven shards and copies (HSDP) are left to FSDP2.
torch's `set_model_state_dict(broadcast_from_rank0=True)` fills what is sharded already; but it makes a parameter for
every name, which breaks ties, and leaves on meta what no state dict has: rotary frequencies, say.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

PIECE_BYTES = 2**28
"""At most so much in one collective, each of which has the timeout of its group."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    """One name of a tensor in a model.

    Kind and shape are the same on all ranks. The rest is rank 0's: transformers loads some tensors in another type than
    it builds them in, makes some trainable, and ties no ends of which the files hold two.
    """

    kind: str
    """What the module holds it as: parameter, buffer, or attribute (neither; some models keep constants so)."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    trainable: bool
    same_as: str
    """The first name of the same tensor."""
    empty: bool
    """Whether it is on the meta device."""

    def __str__(self) -> str:
        return f"a {self.kind} of shape {self.shape}"


class FirstRank:
    """Fills a model's modules with what rank 0 holds. Making it and `fill` are collectives of all ranks."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        """
        Args:
            model: real on rank 0; elsewhere its values are not looked at, and it may be on the meta device.
            device: where this rank's tensors go.

        Raises:
            ValueError: on all ranks alike: their models are not of one architecture, or rank 0's is not real.
        """
        self._device = device
        self._entries = _agreed(model)
        self._names = {module: name for name, module in model.named_modules()}
        self._filled: set[nn.Module] = set()

    @torch.no_grad()
    def fill(self, unit: nn.Module) -> None:
        """Gives `unit`, but for modules in it that have been filled before, rank 0's tensors, on the device."""
        made: dict[str, Tensor] = {}
        for module in unit.modules():
            if module in self._filled:
                continue
            self._filled.add(module)
            for leaf, _, own in _tensors(module):
                entry = self._entries[_join(self._names[module], leaf)]
                if entry.same_as not in made:
                    made[entry.same_as] = self._broadcast(own, entry)
                if dist.get_rank() != 0:
                    setattr(module, leaf, made[entry.same_as])

    def _broadcast(self, own: Tensor, entry: _Entry) -> Tensor:
        """`own` on the device, on rank 0; elsewhere a new tensor with its values."""
        if dist.get_rank() == 0:
            own.data = own.data.to(self._device)
            value = own
        else:
            value = torch.empty(entry.shape, dtype=entry.dtype, device=self._device)
            if entry.kind == "parameter":
                value = nn.Parameter(value, requires_grad=entry.trainable)
        # as bytes: not every backend has every type
        for piece in value.detach().contiguous().reshape(-1).view(torch.uint8).split(PIECE_BYTES):
            if piece.numel():
                dist.broadcast(piece, src=0)
        return value


def _agreed(model: nn.Module) -> dict[str, _Entry]:
    """What rank 0's model consists of, by name, once all ranks have found that theirs does too."""
    own = dict(_describe(model))
    held: list[Any] = [own]
    dist.broadcast_object_list(held, src=0)
    entries: dict[str, _Entry] = held[0]
    every = [""] * dist.get_world_size()
    dist.all_gather_object(every, _fault(own, entries))
    for rank, said in enumerate(every):
        if said:
            raise ValueError(f"model={type(model).__name__}: rank {rank} {said}")
    return entries


def _fault(own: dict[str, _Entry], entries: dict[str, _Entry]) -> str:
    """What is wrong with this rank's model beside rank 0's; empty: nothing."""
    if dist.get_rank() == 0:
        empty = next((name for name, entry in own.items() if entry.empty), "")
        return empty and f"has {empty} on the meta device, where all take it from; build or load the model on rank 0"
    for name in {**entries, **own}:
        ours, theirs = str(own.get(name, "nothing")), str(entries.get(name, "nothing"))
        if ours != theirs:
            return f"has {ours} as {name}, rank 0 {theirs}; build the same model on all ranks"
    if list(own) != list(entries):  # tensors are sent in this order
        return "has the modules of rank 0 in another order; build the same model on all ranks"
    return ""


def _describe(model: nn.Module) -> Iterator[tuple[str, _Entry]]:
    first: dict[int, str] = {}
    for path, module in model.named_modules():
        for leaf, kind, tensor in _tensors(module):
            name = _join(path, leaf)
            yield (
                name,
                _Entry(
                    kind=kind,
                    shape=tuple(tensor.shape),
                    trainable=tensor.requires_grad,
                    dtype=tensor.dtype,
                    same_as=first.setdefault(id(tensor), name),
                    empty=tensor.is_meta,
                ),
            )


def _tensors(module: nn.Module) -> list[tuple[str, str, Tensor]]:
    """Name, kind and value of the tensors that a module holds itself."""
    return [
        *((leaf, "parameter", p) for leaf, p in module.named_parameters(recurse=False, remove_duplicate=False)),
        *((leaf, "buffer", b) for leaf, b in module.named_buffers(recurse=False, remove_duplicate=False)),
        *((leaf, "attribute", value) for leaf, value in vars(module).items() if isinstance(value, Tensor)),
    ]


def _join(path: str, leaf: str) -> str:
    return f"{path}.{leaf}" if path else leaf
