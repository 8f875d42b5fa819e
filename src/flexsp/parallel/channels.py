"""Channels: how some ranks exchange tensors, in one order. There are two transports, alike in what they deliver:

    groups   a communicator for every set of ranks; all-to-all is its collective
    peers    one communicator of all ranks; all-to-all is a batch of sends and receives between the set's ranks on it

A shift, around a ring, is a batch of sends and receives with both.

Tensors between two ranks never need a tag. On one communicator what one rank sends another is received in the order in
which both issued it: gloo keeps a queue for each pair of ranks, NCCL matches the sends and receives between a pair in
order, within a batch and, by its stream, between batches. Two ranks share one group at a time and run the same layers
in it, so both issue in the same order whatever other ranks do. What is empty is skipped on both sides alike.

The NCCL paths follow torch's sources and have not been run: sends and receives are always batched, even one alone,
since torch would make a communicator for the pair otherwise; and the communicator of all ranks is first used by all.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from flexsp.parallel.clock import ExchangeClock

Ranks = tuple[int, ...]


class Pending:
    """An exchange that has begun; it holds its tensors until it has ended."""

    def __init__(self, works: Sequence[dist.Work], tensors: Sequence[Tensor], clock: ExchangeClock) -> None:
        self._works, self._tensors, self._clock = works, tensors, clock

    def wait(self) -> None:
        """What is received is there (on CUDA: for the current stream), and what was sent may be written again.

        Raises:
            RuntimeError: a rank did not take part within the timeout (gloo; NCCL ends the process).
        """
        with self._clock:
            for work in self._works:
                work.wait()
        self._works, self._tensors = (), ()


class Channel(Protocol):
    """Exchange among some ranks, in one order; this process is one of them. All of them call the same, in order."""

    @property
    def ranks(self) -> Ranks:
        """Global ranks, ascending."""

    @property
    def rank(self) -> int:
        """The place of this process among them."""

    @property
    def bytes_sent(self) -> int:
        """Bytes that this process sent to others through the channel; its own part of an all-to-all is not sent."""

    def all_to_all(self, x: Tensor, send_rows: Sequence[int], recv_rows: Sequence[int]) -> Tensor:
        """Rows by destination become rows by source. Not differentiable.

        Args:
            x: (sum(send_rows), ...), rows ordered by destination, any dtype.
            send_rows: how many rows go to each rank; may be 0.
            recv_rows: how many come from each; what that rank has in `send_rows` for this one.

        Returns:
            (sum(recv_rows), ...), rows ordered by source.
        """

    def shift(self, send: Sequence[Tensor], recv: Sequence[Tensor]) -> Pending:
        """Starts to send to the next rank and to receive from the previous one, around the ring. Not differentiable.

        Several shifts may be pending at once; they fill what they were given, in order.

        Args:
            send: tensors for the next rank, not to be written before the wait.
            recv: contiguous tensors to fill, of the sizes and dtypes that the previous rank sends, in that order.
        """


class GroupChannel:
    """A channel on a communicator of just its ranks."""

    def __init__(self, ranks: Ranks, communicator: dist.ProcessGroup, clock: ExchangeClock) -> None:
        """
        Args:
            ranks: ascending.
            communicator: holds at least `ranks`, this process among them.
            clock: counts what exchanges take.
        """
        self.ranks = ranks
        self.rank = ranks.index(dist.get_rank())
        self.bytes_sent = 0
        self._communicator, self._clock = communicator, clock

    def connect(self, device: torch.device) -> None:
        """A first exchange, so that whatever the backend makes at first use is made now. Not counted."""
        one_each = [1] * len(self.ranks)
        self._exchange(torch.zeros(len(self.ranks), 1, device=device), one_each, one_each)

    def all_to_all(self, x: Tensor, send_rows: Sequence[int], recv_rows: Sequence[int]) -> Tensor:
        assert len(send_rows) == len(recv_rows) == len(self.ranks) and sum(send_rows) == x.shape[0]
        row_bytes = x.shape[1:].numel() * x.element_size()
        self.bytes_sent += row_bytes * (sum(send_rows) - send_rows[self.rank])
        with self._clock:
            return self._exchange(x.detach().contiguous(), list(send_rows), list(recv_rows))

    def shift(self, send: Sequence[Tensor], recv: Sequence[Tensor]) -> Pending:
        assert len(send) == len(recv) and all(x.is_contiguous() for x in recv)
        place, size = self.rank, len(self.ranks)
        sent = [x.detach().contiguous() for x in send]
        self.bytes_sent += sum(x.nbytes for x in sent)
        # In a ring of two, next and previous are one rank: sends match receives by their direction, and in order.
        return self._start([(self.ranks[(place - 1) % size], x) for x in recv],
                           [(self.ranks[(place + 1) % size], x) for x in sent])  # fmt: skip

    def _exchange(self, x: Tensor, send_rows: list[int], recv_rows: list[int]) -> Tensor:
        out = x.new_empty((sum(recv_rows), *x.shape[1:]))
        dist.all_to_all_single(out, x, recv_rows, send_rows, group=self._communicator)
        return out

    def _start(self, receive: Sequence[tuple[int, Tensor]], send: Sequence[tuple[int, Tensor]]) -> Pending:
        """One batch of receives and sends, each with a global rank; the order counts for each pair of ranks alone."""
        ops = [
            dist.P2POp(way, x, peer, self._communicator)
            for way, parts in ((dist.irecv, receive), (dist.isend, send))
            for peer, x in parts
            if x.numel()
        ]
        return Pending(dist.batch_isend_irecv(ops) if ops else (), [op.tensor for op in ops], self._clock)


class PeerChannel(GroupChannel):
    """A channel of some ranks on a communicator of all."""

    def _exchange(self, x: Tensor, send_rows: list[int], recv_rows: list[int]) -> Tensor:
        out = x.new_empty((sum(recv_rows), *x.shape[1:]))
        to, source = x.split(send_rows), out.split(recv_rows)
        size = len(self.ranks)
        # Each begins with its neighbour, so that not all of them send to the first rank first.
        pending = self._start(
            [(self.ranks[p], source[p]) for p in _others(self.rank, size, -1)],
            [(self.ranks[p], to[p]) for p in _others(self.rank, size, 1)],
        )
        source[self.rank].copy_(to[self.rank])
        pending.wait()
        return out


def _others(rank: int, size: int, step: int) -> Iterator[int]:
    """All places but `rank`, going around by `step`."""
    return ((rank + step * away) % size for away in range(1, size))


class Groups:
    """The transport with a communicator for every set of ranks."""

    def __init__(self, timeout: datetime.timedelta | None, device: torch.device) -> None:
        """`timeout`: after which an exchange fails that a rank takes no part in; None is the backend's own."""
        self._timeout, self._device = timeout, device
        self.clock = ExchangeClock(device)
        self.num_communicators = 0

    def open(self, ranks: Ranks) -> GroupChannel | None:
        """The channel of these ranks, None on others. A collective: all ranks, whether in it or not."""
        communicator = dist.new_group(list(ranks), timeout=self._timeout)
        self.num_communicators += 1
        if dist.get_rank() not in ranks:
            return None
        channel = GroupChannel(ranks, communicator, self.clock)
        channel.connect(self._device)
        return channel


class Peers:
    """The transport on one communicator of all ranks, made at first need and apart from the one that FSDP uses."""

    def __init__(self, timeout: datetime.timedelta | None, device: torch.device) -> None:
        """`timeout`: after which an exchange fails that a rank takes no part in; None is the backend's own."""
        self._timeout, self._device = timeout, device
        self.clock = ExchangeClock(device)
        self._parent: dist.ProcessGroup | None = None

    @property
    def num_communicators(self) -> int:
        return 0 if self._parent is None else 1

    def open(self, ranks: Ranks) -> GroupChannel | None:
        """The channel of these ranks, None on others. A collective: all ranks, whether in it or not."""
        if self._parent is None:
            self._parent = dist.new_group(timeout=self._timeout)
            # NCCL makes the communicator at its first use, which must be by all ranks
            dist.all_reduce(torch.zeros(1, device=self._device), group=self._parent)
        if dist.get_rank() not in ranks:
            return None
        channel = PeerChannel(ranks, self._parent, self.clock)
        channel.connect(self._device)
        return channel
