"""Communicators for every set of ranks, or one for all of them? Both transports of `GroupPool`, in turns, in one run.

    torchrun --nproc-per-node 4 benchmarks/transports.py [--output FILE.json]

Prints, for a power of two of ranks, the median time of an all-to-all and of a ring's shift (by degree and size, all
groups of the degree busy at once), of making all the channels that aligned groups need, and the memory that these hold.
A time is that of the slowest rank; the transports take turns within a round, and a ratio is the median over rounds.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

import flexsp
from flexsp import jsonfields
from flexsp.parallel import GroupPool
from flexsp.parallel.channels import Channel
from flexsp.parallel.control import largest_of_all
from flexsp.parallel.groups import DEFAULT_TRANSPORT, TRANSPORTS
from flexsp.plans import Group, MicroBatch, Plan
from flexsp.profile import Layout
from flexsp.train.ranks import joined_ranks

ROUNDS = 31
POOLS = 11
"""Made of each kind; the first, which loads code, does not count."""
COLUMNS = 256
"""Elements of a row, float32."""
ROWS = {16: 20, 256: 10, 4096: 3}
"""Rows that a rank exchanges, and how often in one timing."""

Pools = dict[str, GroupPool]


def plan_of(world_size: int, degree: int) -> Plan:
    """All groups of a degree at once."""
    starts = range(0, world_size, degree)
    groups = tuple(Group(ranks=tuple(range(s, s + degree)), sequences=(i,)) for i, s in enumerate(starts))
    return Plan(num_devices=world_size, micro_batches=(MicroBatch(groups=groups),))


def degrees_of(world_size: int) -> list[int]:
    return [d for d in (2**i for i in range(1, world_size.bit_length())) if d <= world_size]


def hybrids(world_size: int) -> list[dict[int, Layout]]:
    """Every split of every degree into heads x context, as layouts to prepare one after the other."""
    splits = [{d: Layout(ulysses=u, ring=d // u)} for d in degrees_of(world_size) for u in degrees_of(d) if u < d]
    return [{}, *splits]


def trade(channel: Channel, x: Tensor, times: int) -> None:
    """Equal parts for all."""
    part = [len(x) // len(channel.ranks)] * len(channel.ranks)
    for _ in range(times):
        channel.all_to_all(x, part, part)


def shift(channel: Channel, x: Tensor, times: int) -> None:
    """Two halves, as keys and values."""
    received = torch.empty_like(x).chunk(2)
    for _ in range(times):
        channel.shift(x.chunk(2), received).wait()


def seconds(work: Callable[[], None], pool: GroupPool, device: torch.device) -> float:
    """Of the slowest rank, all having begun together."""
    dist.barrier(group=pool.control)
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return largest_of_all(time.perf_counter() - began, pool)


def exchanges(pools: Pools, world_size: int, device: torch.device) -> list[dict[str, Any]]:
    """Each operation by both transports, which take turns."""
    rows = []
    works = {"all-to-all": trade, "shift": shift}.items()
    for degree, (operation, work), (count, times) in itertools.product(degrees_of(world_size), works, ROWS.items()):
        start = dist.get_rank() // degree * degree
        x = torch.zeros(count, COLUMNS, device=device)
        taken: dict[str, list[float]] = {name: [] for name in pools}
        for turn in range(ROUNDS + 1):  # the first does not count
            for name in list(pools)[:: 1 if turn % 2 else -1]:
                channel = pools[name].channel(tuple(range(start, start + degree)))
                assert channel is not None
                taken[name].append(seconds(partial(work, channel, x, times), pools[name], device) / times)
        ratios = [peers / groups for groups, peers in zip(taken["groups"][1:], taken["peers"][1:], strict=True)]
        rows.append({
            "operation": operation, "degree": degree, "bytes": x.nbytes,
            **{f"{name}_s": statistics.median(spent[1:]) for name, spent in taken.items()},
            "peers_to_groups": statistics.median(ratios),
        })  # fmt: skip
    return rows


def make_channels(pool: GroupPool, world_size: int, layouts: list[dict[int, Layout]]) -> None:
    for each in layouts:
        pool.prepare([plan_of(world_size, degree) for degree in degrees_of(world_size)], each)


def openings(world_size: int, device: torch.device) -> list[dict[str, Any]]:
    """Making all channels of aligned groups, of heads alone and of every hybrid: time and memory, a fresh pool each."""
    kinds: dict[str, list[dict[int, Layout]]] = {"heads": [{}], "heads and every hybrid": hybrids(world_size)}
    rows = []
    for (kind, layouts), transport in itertools.product(kinds.items(), TRANSPORTS):
        taken, held = [], []
        for _ in range(POOLS):
            pool = GroupPool(transport=transport)
            taken.append(seconds(partial(make_channels, pool, world_size, layouts), pool, device))
            held.append(largest_of_all(float(pool.held_bytes or 0), pool))
        rows.append({
            "channels": kind, "transport": transport, "communicators": pool.num_groups,
            "seconds": statistics.median(taken[1:]), "held_bytes": int(statistics.median(held[1:])),
        })  # fmt: skip
    return rows


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--output", help="default: benchmarks/results/transports_BACKEND.json")
    given = arguments.parse_args().output
    load_before = os.getloadavg()[0]  # above the number of cores others were at work too
    with joined_ranks(600.0) as device:
        world_size, backend = dist.get_world_size(), dist.get_backend()
        if world_size < 2 or world_size & (world_size - 1):
            raise SystemExit(f"world_size={world_size} must be a power of two above 1; use torchrun --nproc-per-node 4")
        opened = openings(world_size, device)
        pools = {transport: GroupPool(transport=transport) for transport in TRANSPORTS}
        for pool in pools.values():
            make_channels(pool, world_size, [{}])
        exchanged = exchanges(pools, world_size, device)
        if dist.get_rank() == 0:
            show(exchanged, opened)
            path = Path(given) if given else Path(__file__).parent / "results" / f"transports_{backend}.json"
            jsonfields.write_object(path, {
                "exchanges": exchanged, "openings": opened, "rounds": ROUNDS, "ranks": world_size, "backend": backend,
                "default": DEFAULT_TRANSPORT[device.type],
                **provenance(device), "load_average": [load_before, os.getloadavg()[0]],
            })  # fmt: skip


def provenance(device: torch.device) -> dict[str, Any]:
    cpu = f"{os.cpu_count()} cores {platform.machine()}"
    return {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        "date": datetime.date.today().isoformat(),
        "versions": {"flexsp": flexsp.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }


def show(exchanged: list[dict[str, Any]], opened: list[dict[str, Any]]) -> None:
    table = Table("operation", "degree", "KiB a rank", "groups, ms", "peers, ms", "peers / groups")
    for row in exchanged:
        table.add_row(
            row["operation"], str(row["degree"]), f"{row['bytes'] // 1024:,}", f"{row['groups_s'] * 1e3:.3f}",
            f"{row['peers_s'] * 1e3:.3f}", f"{row['peers_to_groups']:.2f}",
        )  # fmt: skip
    opening = Table("channels", "transport", "communicators", "made in, ms", "held on a rank, MiB")
    for row in opened:
        opening.add_row(
            row["channels"], row["transport"], str(row["communicators"]), f"{row['seconds'] * 1e3:.1f}",
            f"{row['held_bytes'] / 2**20:.2f}",
        )  # fmt: skip
    for each in (table, opening):
        Console().print(each)


if __name__ == "__main__":
    main()
