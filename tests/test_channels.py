"""Channels deliver, exactly, what slicing gives, alike by both transports, whatever other ranks do meanwhile.

All run on real gloo ranks. A failure of one transport alone lies in `channels.py`; of both, in the pool or in gloo.
"""

from __future__ import annotations

import datetime
import itertools
import random

import pytest
import torch
import torch.distributed as dist

from channel_pools import TRANSPORTS, Ranks, open_channel, plan_of, pool
from flexsp.parallel import GroupPool
from flexsp.parallel.channels import Channel
from flexsp.parallel.exchange import exchange_rows
from flexsp.parallel.groups import channel_ranks
from flexsp.profile import Layout

pytestmark = pytest.mark.alone

RINGS = {size: Layout(ulysses=1, ring=size) for size in (2, 3, 4)}
HYBRID = {4: Layout(ulysses=2, ring=2)}
DTYPES = (torch.float64, torch.bfloat16, torch.int64)

each_transport = pytest.mark.parametrize("transport", TRANSPORTS)


def block(source: int, destination: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """What one rank has for another: numbers that no other pair of ranks has (bfloat16 holds integers up to 256)."""
    return (
        torch.arange(torch.Size(shape).numel()).remainder(15).add(16 * (4 * source + destination)).view(shape).to(dtype)
    )


# ---- all-to-all


def all_to_all_equals_slicing(transport: str, *groups: Ranks) -> None:
    channel = open_channel(transport, *groups)
    if channel is None:
        return
    size, me = len(channel.ranks), channel.rank
    draw = random.Random(str(channel.ranks))
    for trial, dtype, columns in itertools.product(range(4), DTYPES, ((), (3,), (2, 2))):
        most = (0, 1, 3, 40)[trial]  # nothing at all; mostly empty parts; uneven ones
        rows = [[draw.randint(0, most) for _ in range(size)] for _ in range(size)]
        sent = torch.cat([block(me, other, (rows[me][other], *columns), dtype) for other in range(size)])
        received = torch.cat([block(other, me, (rows[other][me], *columns), dtype) for other in range(size)])
        before = channel.bytes_sent
        ours = channel.all_to_all(sent, rows[me], [row[me] for row in rows])
        torch.testing.assert_close(ours, received, rtol=0, atol=0)
        others = sum(rows[me]) - rows[me][me]
        assert channel.bytes_sent - before == others * torch.Size(columns).numel() * dtype.itemsize


@each_transport
def test_all_to_all_equals_slicing(ranks, transport):
    ranks(2).run(all_to_all_equals_slicing, transport, (0, 1))
    for groups in [((0, 1, 2, 3),), ((0, 1), (2, 3)), ((1, 2, 3),), ((1, 2),)]:
        ranks(4).run(all_to_all_equals_slicing, transport, *groups)


def gradients_travel_back(transport: str) -> None:
    """Of sum(weight * received) the gradient is the weights at the ranks that received; rank 2 receives nothing."""
    channel = open_channel(transport, (0, 1, 2, 3))
    assert channel is not None
    rows = [[(i + 2 * j) % 3 if j != 2 else 0 for j in range(4)] for i in range(4)]
    send, recv = rows[channel.rank], [row[channel.rank] for row in rows]
    x = torch.zeros(sum(send), 2, dtype=torch.float64, requires_grad=True)
    weight = [block(i, channel.rank, (n, 2), torch.float64) for i, n in enumerate(recv)]
    (exchange_rows(x * 3, send, recv, channel) * torch.cat(weight)).sum().backward()
    assert x.grad is not None
    expected = torch.cat([block(channel.rank, j, (n, 2), torch.float64) for j, n in enumerate(send)])
    torch.testing.assert_close(x.grad, 3 * expected, rtol=0, atol=0)


@each_transport
def test_gradients_travel_back(ranks, transport):
    ranks(4).run(gradients_travel_back, transport)


# ---- shift


def check_shift(channel: Channel, sizes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> None:
    """Tensors of as many elements as `sizes` say, plus the sender's place; a size of 0 stays 0."""

    def tensors(rank: int) -> list[torch.Tensor]:
        return [block(rank, i, (n + rank if n else 0, 2), dtype) for i, n in enumerate(sizes)]

    expected = tensors((channel.rank - 1) % len(channel.ranks))
    received = [torch.full_like(x, 99) for x in expected]
    sent, before = tensors(channel.rank), channel.bytes_sent
    channel.shift(sent, received).wait()
    for ours, theirs in zip(received, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert channel.bytes_sent - before == sum(x.nbytes for x in sent)


def shift_goes_to_the_next_rank(transport: str, *rings: Ranks) -> None:
    channel = open_channel(transport, *rings, layouts=RINGS)
    if channel is not None:
        for dtype in DTYPES:
            check_shift(channel, (5, 5), dtype)  # two alike: in a ring of two both travel both ways
            check_shift(channel, (1, 0, 300), dtype)  # the middle one is empty
            check_shift(channel, (0,), dtype)
            check_shift(channel, (), dtype)


@each_transport
def test_shift_goes_to_the_next_rank(ranks, transport):
    ranks(2).run(shift_goes_to_the_next_rank, transport, (0, 1))
    for rings in [((0, 1, 2, 3),), ((0, 1), (2, 3)), ((1, 2, 3),)]:
        ranks(4).run(shift_goes_to_the_next_rank, transport, *rings)


def pending_shifts_keep_apart(transport: str, ring: Ranks) -> None:
    """Five at once, waited for in any order, while the same ranks trade rows and all ranks reduce."""
    channel = open_channel(transport, ring, layouts=RINGS)
    assert channel is not None
    size, previous = len(ring), (channel.rank - 1) % len(ring)
    for order in ((0, 1, 2, 3, 4), (4, 2, 0, 3, 1)):
        received = [torch.zeros(1000, dtype=torch.float64) for _ in order]
        pending = [
            channel.shift([torch.full((1000,), 10.0 * i + channel.rank, dtype=torch.float64)], [received[i]])
            for i in range(len(order))
        ]
        rows = torch.arange(size) + 100 * channel.rank
        traded = channel.all_to_all(rows, [1] * size, [1] * size)
        assert traded.tolist() == [100 * other + channel.rank for other in range(size)]
        total = torch.ones(1)
        dist.all_reduce(total)
        assert total.item() == dist.get_world_size()
        for i in order:
            pending[i].wait()
            assert received[i].eq(10 * i + previous).all(), f"shift {i} brought {received[i][:3]}"


@each_transport
def test_pending_shifts_keep_apart(ranks, transport):
    ranks(2).run(pending_shifts_keep_apart, transport, (0, 1))
    ranks(4).run(pending_shifts_keep_apart, transport, (0, 1, 2, 3))


# ---- the pool


def hybrid_channels(transport: str) -> list[Ranks]:
    """In a group of 2 x 2, heads and rings in use at once: strided rings cross the pairs that trade heads."""
    group = (0, 1, 2, 3)
    pool(transport).prepare([plan_of(group)], HYBRID)
    heads, ring = pool(transport).channels(group, HYBRID[4])
    assert heads is not None and ring is not None
    for turn in range(10):
        received = torch.zeros(50, dtype=torch.int64)
        pending = ring.shift([torch.full((50,), 10 * turn + dist.get_rank())], [received])
        traded = heads.all_to_all(torch.tensor([turn, dist.get_rank()]), [1, 1], [1, 1])
        assert traded.tolist() == ([turn, turn] if heads.rank == 0 else list(heads.ranks))
        pending.wait()
        assert received.eq(10 * turn + ring.ranks[1 - ring.rank]).all()
    check_shift(ring, (5, 5))
    return [heads.ranks, ring.ranks]


@each_transport
def test_a_hybrid_has_channels_for_heads_and_for_rings(ranks, transport):
    expected = [[(0, 1), (0, 2)], [(0, 1), (1, 3)], [(2, 3), (0, 2)], [(2, 3), (1, 3)]]
    assert ranks(4).run(hybrid_channels, transport) == expected


def communicators_made(transport: str) -> list[int]:
    ours = GroupPool(transport=transport)
    counts = [ours.num_groups]
    pair, both = plan_of((0, 1)), plan_of((0, 1, 2, 3))
    for plan, layouts in [
        (plan_of((0,), (1,)), None),  # ranks alone exchange nothing
        (pair, None),
        (pair, RINGS),  # the same ranks as a ring
        (both, HYBRID),  # (0, 1) once more, (2, 3), (0, 2) and (1, 3), but not all four
        (both, HYBRID),
        (both, RINGS),
        (both, None),
    ]:
        made = ours.prepare([plan], layouts)
        assert made == ours.num_groups - counts[-1]
        counts.append(ours.num_groups)
    assert ours.held_bytes is None or ours.held_bytes >= 0
    assert ours.describe().startswith(f"transport {transport}: {ours.num_groups} communicator")
    if dist.get_rank() < 2:
        heads, ring = ours.channels((0, 1), RINGS[2])
        assert heads is None and ring is ours.channel((0, 1))
        assert ours.channels((0, 1), Layout(ulysses=2, ring=1)) == (ring, None)
    alone = (dist.get_rank(),)
    assert ours.channel(alone) is None and ours.channels(alone, Layout(ulysses=1, ring=1)) == (None, None)
    assert ours.bytes_sent == 0  # nothing but what opening needs has travelled
    return counts


@each_transport
def test_communicators_are_made_at_first_need_and_shared(ranks, transport):
    expected = [0, 0, 1, 1, 4, 4, 5, 5] if transport == "groups" else [0, 0, 1, 1, 1, 1, 1, 1]
    assert ranks(4).run(communicators_made, transport) == [expected] * 4


def pool_refuses(transport: str) -> None:
    ours = GroupPool(transport=transport)
    with pytest.raises(ValueError, match=r"ranks=\(0, 1\) have no channel.*prepare"):
        ours.channel((0, 1))
    with pytest.raises(ValueError, match=r"ulysses=2 x ring=2 is not sp_degree=2"):
        ours.prepare([plan_of((0, 1))], {2: HYBRID[4]})
    ours.prepare([plan_of((0, 1))])
    with pytest.raises(ValueError, match=r"ranks=\(0, 1, 2, 3\) have no channel"):
        ours.channel((0, 1, 2, 3))
    if dist.get_rank() > 1:
        for ask in (lambda: ours.channel((0, 1)), lambda: ours.channels((0, 1), RINGS[2])):
            with pytest.raises(ValueError, match=r"ranks=\(0, 1\) do not hold this rank [23]"):
                ask()
    with pytest.raises(ValueError, match=r"transport='.*x' is none of \['groups', 'peers'\]"):
        GroupPool(transport=transport + "x")


@each_transport
def test_the_pool_refuses_what_it_cannot_give(ranks, transport):
    ranks(4).run(pool_refuses, transport)


def an_absent_rank() -> str:
    """By one transport rank 0 waits for rank 1, by the other rank 2 for rank 3."""
    timeout = datetime.timedelta(seconds=10)
    pools = [GroupPool(timeout=timeout, transport=transport) for transport in TRANSPORTS]
    groups = [(0, 1), (2, 3)]
    for ours, ranks in zip(pools, groups, strict=True):
        ours.prepare([plan_of(ranks)])
    which, absent = divmod(dist.get_rank(), 2)
    if absent:
        return ""
    channel = pools[which].channel(groups[which])
    assert channel is not None
    with pytest.raises(RuntimeError) as raised:
        channel.all_to_all(torch.zeros(2, 1), [1, 1], [1, 1])
    return str(raised.value)


def test_an_absent_rank_is_an_error_within_the_timeout(ranks):
    """Communicators of their own break, so the ranks can go on to the next test."""
    said = ranks(4).run(an_absent_rank, timeout_s=60.0)
    assert all("10000ms" in text for text in said[::2]), said


def test_channels_of_a_layout_cover_every_pair_of_ranks_once():
    """Each rank is in one channel for heads and one for the ring, and those two share no other rank."""
    ranks = (3, 4, 5, 6, 7, 8)
    assert list(channel_ranks(ranks, None)) == [ranks]
    assert list(channel_ranks(ranks, Layout(ulysses=1, ring=6))) == [ranks]
    assert list(channel_ranks(ranks, Layout(ulysses=2, ring=3))) == [(3, 4), (5, 6), (7, 8), (3, 5, 7), (4, 6, 8)]
