"""What a rank holds and what it may hold: from the allocator on CUDA, from the resident set of the process on a CPU."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flexsp.parallel.groups import occupied_bytes

OPTIMIZER_COPIES = 2
"""States per parameter of Adam and AdamW; plain SGD has none, and then this much room is left unused."""
LEAST_MARGIN = {"cpu": 0.1, "cuda": 0.02}
"""Share of the limit that is left free however well the fit explains the peaks. The C library keeps freed memory in
pieces, and how much depends on what ran before; CUDA's allocator counts what tensors hold."""


class PeakMeter:
    """The most bytes that this rank has held since `reset`."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.exact = device.type == "cuda"
        """Whether it is what tensors held. A resident set has what the C library keeps of freed memory too."""

    def reset(self, trim: bool = False) -> None:
        """From now on. `trim`: on a CPU, first hand back what the C library keeps of freed memory; that takes time."""
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            return
        if trim:
            hand_back_freed()
        with suppress(OSError):  # where it does not work the peak is that of the whole run
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew (Linux)

    def peak_bytes(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device)
        return _status_bytes("VmHWM") or _own_peak_bytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class PeakFit:
    """Peak bytes of a rank as a line over its tokens."""

    bytes_per_token: float
    at_rest_bytes: float
    """Held whatever the tokens: process, parameters, gradients, what is gathered."""
    residual_bytes: float
    """The most that a measured peak was above the line."""
    peaks: tuple[tuple[int, int], ...] = ()
    """(tokens, bytes) of each row."""


def peak_fit(
    run: Callable[[int], object],
    sizes: Sequence[int],
    device: torch.device,
    room_bytes: float,
    largest: Callable[[float], float],
) -> PeakFit:
    """Measures the peaks of rows of these sizes, ascending.

    On a CPU no less is taken a token than what live tensors say, since a small row's peak can drown in what the process
    had allocated before.

    Args:
        run: forward and backward of a row of so many tokens on every rank.
        sizes: tokens, ascending, at least two. From the third on, those whose peak would exceed `room_bytes` are left
            out.
        device: of the model.
        room_bytes: what the ranks may hold.
        largest: the largest of what all ranks say, so that all leave out the same sizes.
    """
    meter = PeakMeter(device)
    run(sizes[0])  # kernels and libraries allocate workspaces at their first call
    peaks: list[int] = []
    line = np.zeros(2)
    meter.reset(trim=True)
    for at, size in enumerate(sizes):
        if at >= 2 and largest(float(np.polyval(line, size))) > room_bytes:
            break
        meter.reset()
        run(size)
        peaks.append(meter.peak_bytes())
        if at:
            line = np.polyfit(sizes[: at + 1], peaks, 1)
    measured = sizes[: len(peaks)]
    slope, at_rest = (float(c) for c in line)
    if device.type == "cpu":
        small, large = (most_live_bytes(partial(run, size)) for size in measured[:2])
        slope = max(slope, (large - small) / (measured[1] - measured[0]))
    slope = max(slope, 1.0)
    at_rest = max(0.0, min(at_rest, peaks[-1] - slope * measured[-1]))
    return PeakFit(
        bytes_per_token=slope,
        at_rest_bytes=at_rest,
        residual_bytes=max(0.0, *(peak - at_rest - slope * size for peak, size in zip(peaks, measured, strict=True))),
        peaks=tuple(zip(measured, peaks, strict=True)),
    )


def held_now_bytes(device: torch.device) -> int:
    """What this rank holds now, as `PeakMeter` counts: on a CPU the process with all that it has loaded."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _status_bytes("VmRSS")


def shard_bytes(model: torch.nn.Module) -> int:
    """Bytes of this rank's shards of the parameters."""
    own = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return sum(p.numel() * p.element_size() for p in own)


def memory_limit(device: torch.device, fraction: float, local_world_size: int) -> tuple[int, str]:
    """Bytes that a rank may hold as `PeakMeter` counts, and where the limit comes from.

    On CUDA `fraction` of what CUDA's context, NCCL's communicators and other processes leave of the device's memory
    now: of communicators, those that have been opened. On a CPU `fraction` of the process's own limit (RLIMIT_DATA, as
    `ulimit -d` sets it) or of its share of the machine's (of its control group's, where that is less), whichever is
    less.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        taken = occupied_bytes(device) or 0
        said = f"{fraction} of the device's {total} bytes, less {taken} that are no tensors"
        return int((total - taken) * fraction), said
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    group = Path("/sys/fs/cgroup/memory.max")
    if group.exists() and (text := group.read_text().strip()).isdigit():
        machine = min(machine, int(text))
    limit, said = machine // local_world_size, f"{fraction} of the machine's {machine} bytes over its ranks"
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if soft != resource.RLIM_INFINITY:
        held = _status_bytes("VmRSS") + soft - _status_bytes("VmData")  # the limit counts what is not resident too
        if held < limit:
            limit, said = held, f"{fraction} of the process's limit of {soft} bytes of data"
    return int(limit * fraction), said


class LiveTensors(TorchDispatchMode):
    """Counts the storages that operations make, inside of it, for as long as they live.

    Recomputed activations and the backward's gradients are in it; workspaces inside of an operation are not. Forward
    and backward must run in the thread that entered it, as they do on a CPU.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = 0
        self.most_bytes = 0
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and not isinstance(tensor, DTensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            del self._known[key]
            self.live_bytes -= size

        self._known[key] = weakref.ref(storage, gone)
        self.live_bytes += size
        self.most_bytes = max(self.most_bytes, self.live_bytes)


def held_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes that `run` held beyond what was there before: from the allocator, or on a CPU of live tensors."""
    if device.type == "cpu":
        return most_live_bytes(run)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def most_live_bytes(run: Callable[[], object]) -> int:
    """The most bytes that the tensors made by `run`, on a CPU, held at a time."""
    tensors = LiveTensors()
    with tensors:
        run()
    return tensors.most_bytes


def _status_bytes(field: str) -> int:
    """A line of Linux's account of this process; 0 on other systems."""
    try:
        found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return 0
    return int(found.group(1)) * 1024 if found else 0


def _own_peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def hand_back_freed() -> None:
    """Hands what glibc keeps of freed memory back to the system; nothing where the C library is another.

    It keeps what is freed below a page that is still in use, and tensors up to 32 MiB come from its heaps.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
