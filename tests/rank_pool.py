"""Real gloo ranks for tests: started once per world size, fed functions by name, killed when they hang."""

from __future__ import annotations

import importlib
import multiprocessing as mp
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

START_S = 120.0
"""Importing torch and transformers in four processes on two busy cores."""


class RanksFailed(AssertionError):
    """A rank raised, died or did not answer in time."""


class RankPool:
    """`world_size` processes with a process group; `run` calls one function on all of them."""

    def __init__(self, world_size: int, folder: Path) -> None:
        self.world_size = world_size
        self._folder = folder
        self._starts = 0
        self._ranks: list[tuple[Any, Connection]] = []

    def run(self, function: Callable[..., Any], *arguments: Any, timeout_s: float = 60.0) -> list[Any]:
        """`function(*arguments)` on every rank; returns what each returned, by rank.

        Raises:
            RanksFailed: with the traceback of every rank that raised.
        """
        self._start()
        for _, connection in self._ranks:
            connection.send((function.__module__, function.__qualname__, arguments))
        deadline = time.monotonic() + timeout_s
        results, failures = [], []
        for rank, (_, connection) in enumerate(self._ranks):
            try:
                if not connection.poll(max(0.0, deadline - time.monotonic())):
                    failures.append(f"rank {rank} did not answer within {timeout_s} s")
                    continue
                result, failure = connection.recv()
            except (EOFError, ConnectionError):
                result, failure = None, f"rank {rank} died"
            results.append(result)
            if failure:
                failures.append(f"rank {rank}: {failure}")
        if failures:
            self.close()  # a group in which one rank failed is of no more use
            raise RanksFailed("\n".join(failures))
        return results

    def _start(self) -> None:
        if self._ranks:
            return
        self._starts += 1
        store = self._folder / f"store-{self.world_size}-{self._starts}"
        context = mp.get_context("spawn")
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world_size, str(store), theirs), daemon=True)
            process.start()
            theirs.close()
            self._ranks.append((process, ours))
        deadline = time.monotonic() + START_S
        for rank, (_, connection) in enumerate(self._ranks):
            if not connection.poll(max(0.0, deadline - time.monotonic())):
                self.close()
                raise RanksFailed(f"rank {rank} did not start within {START_S} s")
            connection.recv()

    def close(self) -> None:
        for process, connection in self._ranks:
            process.kill()
            process.join()
            connection.close()
        self._ranks = []


def _serve(rank: int, world_size: int, store: str, connection: Connection) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch
    import torch.distributed as dist

    import flexsp.parallel  # noqa: F401  the slow import, done before the first test's clock runs

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size, timeout=timedelta(seconds=60)
    )
    connection.send("ready")
    while True:
        try:
            module, name, arguments = connection.recv()
        except EOFError:
            return
        _destroy_left_groups()  # of the function before, which has ended on all ranks
        try:
            connection.send((getattr(importlib.import_module(module), name)(*arguments), None))
        except BaseException:
            connection.send((None, traceback.format_exc()))


def _destroy_left_groups() -> None:
    """All but those of the pools that functions share: threads of each wake a hundred times a second."""
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import _world

    from channel_pools import groups_of_pools

    kept = [dist.group.WORLD, *groups_of_pools()]
    for group in list(_world.pg_map):
        if not any(group is each for each in kept):
            dist.destroy_process_group(group)
