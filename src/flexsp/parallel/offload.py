"""Activations that wait on the host: what a layer keeps leaves the device after its forward, and comes back for its
backward while the layer above is still at work.

    forward    layer 1   layer 2             layer 3
    to host              what 1 keeps        what 2 keeps
    backward                                 layer 3              layer 2              layer 1
    to device                                what 2 keeps         what 1 keeps

So at most two layers' activations are on the device. What leaves are whole storages, each once however many tensors lie
in it. Parameters stay, which FSDP2 gathers and frees by itself, and so do tensors that all layers share.

On CUDA the copies run on a stream of their own, to and from pinned memory; the current stream waits for events, never
the host. That part has not been run yet. On a CPU the copies are made all the same, and save nothing.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SMALL_BYTES = 64 * 1024
"""Storages below stay: a copy costs more to start than they would give."""


@dataclass(slots=True, weakref_slot=True)
class _Parcel:
    """One storage: its bytes on the host, and on the device while they are there."""

    host: Tensor
    device: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _View:
    """A saved tensor that lies in a parcel."""

    parcel: _Parcel
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class _Traffic:
    """Copies between device and host: at once on a CPU, on a stream of their own on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: Any = None

    def _begin(self) -> Any:
        """The stream of the copies, after all that the current stream has been given so far."""
        self._stream = self._stream or torch.cuda.Stream(self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        return self._stream

    def to_host(self, source: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return source.clone()
        host = torch.empty(source.shape, dtype=source.dtype, pin_memory=True)
        with torch.cuda.stream(self._begin()):
            host.copy_(source, non_blocking=True)
        return host

    def to_device(self, hosts: list[Tensor]) -> list[Tensor]:
        if self._device.type != "cuda":
            return [host.clone() for host in hosts]
        targets = [torch.empty(host.shape, dtype=host.dtype, device=self._device) for host in hosts]
        with torch.cuda.stream(self._begin()):  # after what still works in the memory that the targets were given
            for target, host in zip(targets, hosts, strict=True):
                target.copy_(host, non_blocking=True)
        return targets

    def mark(self) -> Any:
        """The end of the copies so far."""
        return self._stream.record_event() if self._stream is not None else None

    def wait(self, mark: Any) -> None:
        """What the current stream is given from now on comes after a mark."""
        if mark is not None:
            torch.cuda.current_stream(self._device).wait_event(mark)


class _Stash:
    """What one layer keeps in one micro-batch. The graph holds it, and so the parcels of the layers below."""

    def __init__(self, traffic: _Traffic, stays: set[int], below: _Stash | None) -> None:
        """
        Args:
            traffic: copies.
            stays: addresses of storages that stay on the device.
            below: the stash of the layer before.
        """
        self._traffic, self._stays, self._below = traffic, stays, below
        self._packing: dict[tuple[int, int], _Parcel] = {}
        self._parcels: list[weakref.ref[_Parcel]] = []
        self._left: Any = None
        self._came: Any = None
        self._waited = False

    def pack(self, tensor: Tensor) -> Tensor | _View:
        """What autograd keeps instead of a tensor."""
        if type(tensor) not in (Tensor, torch.nn.Parameter):
            return tensor
        storage = tensor.untyped_storage()
        if storage.nbytes() < SMALL_BYTES or storage.data_ptr() in self._stays:
            return tensor
        key = storage.data_ptr(), tensor._version
        if key not in self._packing:
            source = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
            self._packing[key] = _Parcel(self._traffic.to_host(source), source)
            self._parcels.append(weakref.ref(self._packing[key]))
        return _View(
            parcel=self._packing[key],
            dtype=tensor.dtype,
            size=tuple(tensor.size()),
            stride=tensor.stride(),
            offset=int(tensor.storage_offset()),
        )

    def close(self) -> None:
        """The layer's forward has ended: the layer below leaves the device. Until now its memory was not reused."""
        self._packing, self._stays = {}, set()
        self._left = self._traffic.mark()
        if self._below is not None:
            self._below.leave()

    def leave(self) -> None:
        """The device's memory is free once the copies are through."""
        self._traffic.wait(self._left)
        for parcel in self._alive():
            parcel.device = None

    def come(self) -> None:
        """Begins to bring back what has left."""
        away = [parcel for parcel in self._alive() if parcel.device is None]
        for parcel, device in zip(away, self._traffic.to_device([p.host for p in away]), strict=True):
            parcel.device = device
        self._came = self._traffic.mark()

    def unpack(self, kept: Tensor | _View) -> Tensor:
        """The tensor again, on the device. With the first one of a layer the layer below begins to come."""
        if isinstance(kept, Tensor):
            return kept
        if not self._waited or kept.parcel.device is None:
            self.come()
            self._traffic.wait(self._came)
            if self._below is not None and not self._waited:
                self._below.come()
            self._waited = True
        device = kept.parcel.device
        assert device is not None
        view = torch.empty(0, dtype=kept.dtype, device=device.device)
        return view.set_(device.untyped_storage(), kept.offset, kept.size, kept.stride)

    def _alive(self) -> list[_Parcel]:
        """The parcels that the graph still needs."""
        return [parcel for ref in self._parcels if (parcel := ref()) is not None]


class Offloader:
    """Sends what layers keep to the host, in the order in which they run."""

    def __init__(self, device: torch.device) -> None:
        self._traffic = _Traffic(device)
        self._last: weakref.ref[_Stash] | None = None

    @contextmanager
    def at_work(self, layer: torch.nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
        """A layer's forward. Its first argument leaves too; other arguments are taken to be shared by all layers."""
        others = [*args[1:], *(value for name, value in kwargs.items() if name != "hidden_states")]
        stays = {p.untyped_storage().data_ptr() for p in layer.parameters() if type(p) is torch.nn.Parameter}
        stays |= {tensor.untyped_storage().data_ptr() for tensor in _tensors(others)}
        stash = _Stash(self._traffic, stays, self._last() if self._last is not None else None)
        with torch.autograd.graph.saved_tensors_hooks(stash.pack, stash.unpack):
            yield
        stash.close()
        self._last = weakref.ref(stash)


def _tensors(values: Any) -> Iterator[Tensor]:
    """The plain tensors in nested tuples, lists and dicts."""
    if type(values) in (Tensor, torch.nn.Parameter):
        yield values
    elif isinstance(values, Mapping):
        yield from _tensors(list(values.values()))
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _tensors(value)
