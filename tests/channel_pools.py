"""One pool of channels per transport and process, as a run has, for tests that run on ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch.distributed as dist

from flexsp.parallel import GroupPool
from flexsp.parallel.channels import Channel
from flexsp.plans import Group, MicroBatch, Plan
from flexsp.profile import Layout

TRANSPORTS = ("groups", "peers")
Ranks = tuple[int, ...]
_POOLS: dict[str, GroupPool] = {}


def pool(transport: str = "groups") -> GroupPool:
    if transport not in _POOLS:
        _POOLS[transport] = GroupPool(transport=transport)
    return _POOLS[transport]


def groups_of_pools() -> Iterator[dist.ProcessGroup | None]:
    for each in _POOLS.values():
        yield each.control
        yield getattr(each._opener, "_parent", None)
        yield from (channel._communicator for channel in each._channels.values() if channel is not None)


def plan_of(*groups: Ranks) -> Plan:
    """A plan with a micro-batch for each group."""
    return Plan(
        num_devices=dist.get_world_size(),
        micro_batches=tuple(MicroBatch(groups=(Group(ranks=ranks, sequences=(i,)),)) for i, ranks in enumerate(groups)),
    )


def open_channel(transport: str, *groups: Ranks, layouts: Mapping[int, Layout] | None = None) -> Channel | None:
    """The channel of this process among those of all these groups; None where it is in none of them."""
    pool(transport).prepare([plan_of(*groups)], layouts)
    own = [ranks for ranks in groups if dist.get_rank() in ranks]
    return pool(transport).channel(own[0]) if own else None


def channel_of_all(transport: str) -> Channel:
    channel = open_channel(transport, tuple(range(dist.get_world_size())))
    assert channel is not None
    return channel
