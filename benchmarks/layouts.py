"""What do all-to-all, ring and hybrid cost, by degree and length, and do they send what theory says?

    torchrun --nproc-per-node 4 benchmarks/layouts.py [--heads 8 --kv-heads 4 --head-dim 64] [--output FILE.json]

Forward and backward of the attention of one layer, its exchanges included, through the functions that a model's layers
call, on one packed row of one sequence or of sixteen. All groups of a degree run at once, and all ways of splitting it
in turns, so that what else the machine does falls on all of them alike. Bytes are counted where they are handed to the
backend, summed over the ranks, and compared with a count from shapes alone.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from flexsp import jsonfields
from flexsp.data.packing import group_shares
from flexsp.parallel import GroupPool, SPContext, flexsp_attention
from flexsp.parallel.row import Row
from flexsp.plans import Group, MicroBatch, Plan
from flexsp.profile import Layout

LENGTHS = {"cpu": (512, 2048, 4096), "cuda": (8192, 32768, 131072)}
"""Tokens of a group's row."""
SEQUENCES = (1, 16)
ROUNDS = 3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("--heads", 8), ("--kv-heads", 4), ("--head-dim", 64)):
        parser.add_argument(name, type=int, default=value)
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "layouts_cpu.json"))
    arguments = parser.parse_args()
    cuda = torch.cuda.is_available()
    dist.init_process_group("cuda:nccl,cpu:gloo" if cuda else "gloo")
    device = torch.device("cuda", dist.get_node_local_rank()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    shape = (arguments.heads, arguments.kv_heads, arguments.head_dim)
    dtype = torch.bfloat16 if cuda else torch.float32
    world_size = dist.get_world_size()
    pools = {name: GroupPool(transport=name) for name in ("groups", "peers")}
    rows = []
    for degree in [d for d in (1, 2, 3, 4, 6, 8) if d <= world_size]:
        for tokens in LENGTHS[device.type]:
            for count in SEQUENCES:
                rows += measured(degree, [tokens // count] * count, shape, dtype, device, pools)
    if dist.get_rank() == 0:
        report(rows, shape, dtype, device, Path(arguments.output))
    dist.destroy_process_group()


def measured(
    degree: int,
    lengths: list[int],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    pools: dict[str, GroupPool],
) -> list[dict[str, Any]]:
    """Seconds and bytes of every split of a degree, over both transports."""
    splits = [
        Layout(ulysses=u, ring=degree // u) for u in range(degree, 0, -1) if degree % u == 0 and shape[0] % u == 0
    ]
    cases = [(layout, name) for layout in splits for name in (pools if degree > 1 else ("groups",))]
    taken: dict[tuple[Layout, str], list[float]] = {case: [] for case in cases}
    sent: dict[tuple[Layout, str], int] = {}
    for _ in range(ROUNDS + 1):
        for layout, name in cases:
            before = pools[name].bytes_sent
            taken[layout, name].append(once(layout, lengths, shape, dtype, device, pools[name]))
            sent[layout, name] = total(pools[name].bytes_sent - before, pools[name])
    groups = dist.get_world_size() // degree
    rows = []
    for layout, name in cases:
        theory = groups * theoretical_bytes(layout, sum(lengths), shape, dtype.itemsize)
        assert sent[layout, name] == theory, (layout, name, lengths, sent[layout, name], theory)
        rows.append(
            {
                "sp_degree": degree, "ulysses": layout.ulysses, "ring": layout.ring, "transport": name,
                "tokens": sum(lengths), "sequences": len(lengths),
                "seconds": statistics.median(taken[layout, name][1:]),  # the first makes communicators
                "bytes_sent": sent[layout, name], "theoretical_bytes": theory,
            }
        )  # fmt: skip
    return rows


def once(
    layout: Layout,
    lengths: list[int],
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    device: torch.device,
    pool: GroupPool,
) -> float:
    """Seconds of forward and backward, of the slowest rank."""
    heads, kv_heads, head_dim = shape
    degree, rank, world_size = layout.ulysses * layout.ring, dist.get_rank(), dist.get_world_size()
    groups = [tuple(range(start, start + degree)) for start in range(0, world_size - degree + 1, degree)]
    made = tuple(Group(ranks=ranks, sequences=(i,)) for i, ranks in enumerate(groups))
    pool.prepare([Plan(num_devices=world_size, micro_batches=(MicroBatch(groups=made),))], {degree: layout})
    own = next((ranks for ranks in groups if rank in ranks), None)
    backward = None
    if own is not None:
        ring_rank = own.index(rank) // layout.ulysses
        shares = group_shares(lengths, layout)[ring_rank * layout.ulysses : (ring_rank + 1) * layout.ulysses]
        to_heads, ring = pool.channels(own, layout)
        context = SPContext(row=Row(lengths, layout.ring, ring_rank, device), heads=to_heads, ring=ring, shares=shares)
        t = shares[own.index(rank) % layout.ulysses]
        qkv = [
            torch.randn(1, n, t, head_dim, dtype=dtype, device=device, requires_grad=True)
            for n in (heads, kv_heads, kv_heads)
        ]

        def backward() -> None:
            out, _ = flexsp_attention(torch.nn.Identity(), *qkv, None, sp_context=context)
            out.sum().backward()

    dist.barrier(group=pool.control)
    began = time.perf_counter()
    if backward is not None:
        backward()
    if device.type == "cuda":
        torch.cuda.synchronize()
    slowest = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=pool.control)
    return slowest.item()


def total(own: int, pool: GroupPool) -> int:
    """Over all ranks."""
    held = torch.tensor(own)
    dist.all_reduce(held, group=pool.control)
    return int(held.item())


def theoretical_bytes(layout: Layout, tokens: int, shape: tuple[int, int, int], itemsize: int) -> int:
    """What a group sends in forward and backward, all ranks together.

    Ulysses: queries, keys, values and output of each token, but for the part that stays, once each way. The ring: keys
    and values go R - 1 steps in the forward and again in the backward, their gradients R steps in fp32.
    """
    heads, kv_heads, head_dim = shape
    U, R = layout.ulysses, layout.ring
    kv = math.lcm(kv_heads, U)
    traded = 2 * tokens * (2 * heads + 2 * kv) * head_dim * itemsize * (U - 1) // U
    around = tokens * 2 * kv * head_dim * (2 * (R - 1) * itemsize + R * max(4, itemsize)) if R > 1 else 0
    return traded + around


def report(
    rows: list[dict[str, Any]], shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device, path: Path
) -> None:
    alone = {
        (r["sp_degree"], r["tokens"], r["sequences"]): r["seconds"]
        for r in reversed(rows)
        if r["transport"] == "groups"
    }
    table = Table(title="attention of one layer, forward and backward; ratio: to the split with the most Ulysses")
    for column in ("sp_degree", "tokens", "sequences", "ulysses x ring", "transport", "seconds", "ratio", "MiB sent"):
        table.add_column(column, justify="right")
    for r in rows:
        r["ratio"] = round(r["seconds"] / alone[r["sp_degree"], r["tokens"], r["sequences"]], 3)
        table.add_row(
            str(r["sp_degree"]), f"{r['tokens']:,}", str(r["sequences"]), f"{r['ulysses']} x {r['ring']}",
            r["transport"], f"{r['seconds']:.4f}", f"{r['ratio']:.2f}", f"{r['bytes_sent'] / 2**20:.1f}",
        )  # fmt: skip
    Console(width=120).print(table)
    what = torch.cuda.get_device_name() if device.type == "cuda" else "gloo ranks, not run on a GPU"
    jsonfields.write_object(
        path,
        {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {dist.get_world_size()} x {what}",
            "date": datetime.date.today().isoformat(),
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "heads": shape[0], "kv_heads": shape[1], "head_dim": shape[2], "dtype": str(dtype),
            "bytes_sent": "equal to the theoretical count in every row",
            "rows": rows,
        },
    )  # fmt: skip
    print(f"saved as {path}")


if __name__ == "__main__":
    main()
