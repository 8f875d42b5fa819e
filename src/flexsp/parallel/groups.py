"""The pool of channels: made at first need, in one order on all ranks, then reused (hot switching)."""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist

from flexsp.parallel.channels import Channel, GroupChannel, Groups, Peers, Ranks
from flexsp.parallel.clock import ExchangeClock
from flexsp.plans import Plan
from flexsp.profile import Layout

TRANSPORTS: dict[str, type[Groups] | type[Peers]] = {"groups": Groups, "peers": Peers}
DEFAULT_TRANSPORT = {"cpu": "groups", "cuda": "groups"}
"""By device type. "cpu" is measured (benchmarks/results/transports_gloo.json): by "peers" gloo takes longer for small
all-to-alls, as long for large ones and for shifts, and a communicator holds little. "cuda" is not: no run on GPUs."""


class GroupPool:
    """Channels of sequence-parallel groups by their ranks. Switching costs nothing once a channel is in the pool.

    Placement is aligned, so with powers of two a run on N ranks needs at most 2N-1 different groups.
    """

    device: torch.device
    """What this rank's tensors are exchanged on."""
    transport: str
    """"groups" or "peers"."""
    control: dist.ProcessGroup
    """All ranks, on the CPU: plans, digests and counts travel here, apart from the tensors."""

    def __init__(self, timeout: datetime.timedelta | None = None, transport: str | None = None) -> None:
        """A collective: on all ranks, with the same arguments; on CUDA after `torch.cuda.set_device`.

        Args:
            timeout: after which an exchange fails that a rank takes no part in; None is the backend's own.
            transport: "groups" makes a communicator for every set of ranks that exchanges, "peers" one for all of them;
                None chooses by device type (`DEFAULT_TRANSPORT`).

        Raises:
            ValueError: no such transport.
        """
        self.device = own_device()
        self.transport = transport or DEFAULT_TRANSPORT[self.device.type]
        if self.transport not in TRANSPORTS:
            raise ValueError(f"transport={transport!r} is none of {sorted(TRANSPORTS)}; name one of them")
        self._opener = TRANSPORTS[self.transport](timeout, self.device)
        self._channels: dict[Ranks, GroupChannel | None] = {}
        self._grown_bytes: int | None = 0
        self.control = dist.new_group(backend="gloo", timeout=timeout)

    @property
    def num_groups(self) -> int:
        """Communicators made so far for exchanges, those of other ranks included."""
        return self._opener.num_communicators

    @property
    def clock(self) -> ExchangeClock:
        """What this rank spends in exchanges through its channels."""
        return self._opener.clock

    @property
    def held_bytes(self) -> int | None:
        """Memory of the device (on the CPU: resident memory of the process) that was taken while they were made.

        None where the system does not say. Noise of other allocations is in it.
        """
        return None if self._grown_bytes is None else max(0, self._grown_bytes)

    @property
    def bytes_sent(self) -> int:
        """Bytes that this rank has sent to others through its channels."""
        return sum(channel.bytes_sent for channel in self._channels.values() if channel is not None)

    def describe(self) -> str:
        """For the log: transport, communicators and the memory that they hold on this rank."""
        held = "unknown memory" if self.held_bytes is None else f"{self.held_bytes / 2**20:.1f} MiB"
        plural = "" if self.num_groups == 1 else "s"
        return f"transport {self.transport}: {self.num_groups} communicator{plural}, holding {held} on this rank"

    def prepare(self, plans: Iterable[Plan], layouts: Mapping[int, Layout] | None = None) -> int:
        """Makes the channels that these plans need and the pool lacks. A collective: all ranks, the same plans.

        Args:
            plans: of this run's ranks.
            layouts: how a degree splits into heads x context; one that is not here trades heads alone.

        Returns:
            How many communicators were made.

        Raises:
            ValueError: a layout does not give its degree.
        """
        needed = dict.fromkeys(
            ranks
            for plan in plans
            for micro_batch in plan.micro_batches
            for group in micro_batch.groups
            if group.sp_degree > 1
            for ranks in channel_ranks(group.ranks, (layouts or {}).get(group.sp_degree))
            if ranks not in self._channels
        )
        if not needed:
            return 0
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # NCCL allocates by itself, and torch would not give it what it merely reserves
        before, before_bytes = self.num_groups, occupied_bytes(self.device)
        for ranks in needed:
            self._channels[ranks] = self._opener.open(ranks)
        after_bytes = occupied_bytes(self.device)
        if before_bytes is None or after_bytes is None or self._grown_bytes is None:
            self._grown_bytes = None
        else:
            self._grown_bytes += after_bytes - before_bytes
        return self.num_groups - before

    def channel(self, ranks: Ranks) -> Channel | None:
        """The channel of these ranks, one of them this process; None for one rank alone, which exchanges nothing.

        Raises:
            ValueError: it was not prepared, or belongs to other ranks.
        """
        if len(ranks) == 1:
            return None
        if ranks not in self._channels:
            raise ValueError(f"ranks={ranks} have no channel in the pool; call prepare with their plan and its layouts")
        channel = self._channels[ranks]
        if channel is None:
            raise ValueError(f"ranks={ranks} do not hold this rank {dist.get_rank()}; ask for a channel of its own")
        return channel

    def channels(self, ranks: Ranks, layout: Layout) -> tuple[Channel | None, Channel | None]:
        """This process's channels in the group of `ranks`: for heads and for the ring; None where that dimension is 1.

        Raises:
            ValueError: they were not prepared, this process is not in the group, or the layout is not of its degree.
        """
        _check(layout, ranks)
        if dist.get_rank() not in ranks:
            raise ValueError(f"ranks={ranks} do not hold this rank {dist.get_rank()}; ask for a channel of its own")
        ring_rank, ulysses_rank = divmod(ranks.index(dist.get_rank()), layout.ulysses)
        return self.channel(_heads(ranks, layout, ring_rank)), self.channel(_ring(ranks, layout, ulysses_rank))


def own_device() -> torch.device:
    """What this rank's tensors are exchanged on: its current GPU where NCCL is among the backends, else the CPU."""
    if "nccl" in dist.get_backend_config():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def channel_ranks(ranks: Ranks, layout: Layout | None) -> Iterator[Ranks]:
    """The sets of ranks that exchange in the group of `ranks`, in one order; None is heads alone.

    With ulysses=2 and ring=3, by group rank (group_rank = ring_rank * 2 + ulysses_rank):

        heads  (0, 1)  (2, 3)  (4, 5)        ring  (0, 2, 4)  (1, 3, 5)
    """
    layout = layout or Layout(ulysses=len(ranks), ring=1)
    _check(layout, ranks)
    if layout.ulysses > 1:
        yield from (_heads(ranks, layout, ring_rank) for ring_rank in range(layout.ring))
    if layout.ring > 1:
        yield from (_ring(ranks, layout, ulysses_rank) for ulysses_rank in range(layout.ulysses))


def _heads(ranks: Ranks, layout: Layout, ring_rank: int) -> Ranks:
    return ranks[ring_rank * layout.ulysses : (ring_rank + 1) * layout.ulysses]


def _ring(ranks: Ranks, layout: Layout, ulysses_rank: int) -> Ranks:
    return ranks[ulysses_rank :: layout.ulysses]


def _check(layout: Layout, ranks: Ranks) -> None:
    if layout.ulysses * layout.ring != len(ranks):
        raise ValueError(
            f"layout ulysses={layout.ulysses} x ring={layout.ring} is not sp_degree={len(ranks)}; "
            f"give one whose product is {len(ranks)}"
        )


def occupied_bytes(device: torch.device) -> int | None:
    """On CUDA what is taken of the device, less what torch's allocator reserves; else what of the process is resident.

    None where the system does not say.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        free, total = torch.cuda.mem_get_info(device)
        return total - free - torch.cuda.memory_reserved(device)
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
