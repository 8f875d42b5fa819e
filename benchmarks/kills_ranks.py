"""Starting ranks, by a nursery that forks them or by torchrun, killing some, and waiting for the rest to end."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from processes import alive, descendants, environment, marked

MARK = "FLEXSP_KILLS"
"""In the environment of every process of this script's runs, so that none is overlooked."""


class Started(Protocol):
    """One start of a run."""

    def ranks(self) -> dict[int, int]:
        """Process ids by rank, of those that have begun; those that have ended included."""

    def processes(self) -> list[int]:
        """All whose end is the end of the start: ranks, and torchrun."""

    def statuses(self) -> dict[int, int]:
        """By process id, exit statuses of those that have ended and whose status is known."""


class Forked:
    """Ranks of a nursery."""

    def __init__(self, nursery: Nursery, pids: Sequence[int]) -> None:
        self._nursery, self._pids = nursery, list(pids)

    def ranks(self) -> dict[int, int]:
        return dict(enumerate(self._pids))

    def processes(self) -> list[int]:
        return self._pids

    def statuses(self) -> dict[int, int]:
        return self._nursery.statuses(self._pids)


class Nursery:
    """The process that forks ranks: `benchmarks/nursery.py`."""

    def __init__(self, mark: str) -> None:
        self._child = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("nursery.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=rank_environment(mark),
        )  # fmt: skip
        self.versions: dict[str, str] = self._answer()
        self._ended: dict[int, int] = {}

    @property
    def pid(self) -> int:
        return self._child.pid

    def start(self, folder: Path, world_size: int, arguments: Sequence[str], log: Path) -> Forked:
        request = {
            "world_size": world_size, "folder": str(folder), "arguments": list(arguments), "log": str(log),
            "port": free_port(),
        }  # fmt: skip
        return Forked(self, self._ask(request)["pids"])

    def statuses(self, pids: Sequence[int]) -> dict[int, int]:
        self._ended |= {int(pid): status for pid, status in self._ask({"reap": True})["ended"].items()}
        return {pid: self._ended[pid] for pid in pids if pid in self._ended}

    def close(self) -> None:
        self._child.kill()
        self._child.communicate()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(request) + "\n")
        self._child.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        line = self._child.stdout.readline()
        if not line:
            raise RuntimeError("the nursery has ended; what it said is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


class ByTorchrun:
    """Ranks that torchrun started."""

    def __init__(self, folder: Path, world_size: int, arguments: Sequence[str], log: Path, mark: str) -> None:
        command = ["-m", "torch.distributed.run", "--nproc-per-node", str(world_size), "--master-port"]
        with open(log, "ab") as out:
            self._child = subprocess.Popen(
                [sys.executable, *command, str(free_port()), "-m", "flexsp", *arguments],
                cwd=folder, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=rank_environment(mark),
            )  # fmt: skip
        self._ranks: dict[int, int] = {}

    def ranks(self) -> dict[int, int]:
        for pid in descendants(self._child.pid):
            told = environment(pid)
            if "RANK" in told and pid not in self._ranks.values():
                self._ranks.setdefault(int(told["RANK"]), pid)  # the first: a rank's children inherit its environment
        return self._ranks

    def processes(self) -> list[int]:
        return [self._child.pid, *self._ranks.values()]

    def statuses(self) -> dict[int, int]:
        status = self._child.poll()
        return {} if status is None else {self._child.pid: status}


@contextlib.contextmanager
def nothing_left(mark: str, nursery: Nursery) -> Iterator[None]:
    """Whatever happens inside, SIGTERM too: no process of this script outlives it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        nursery.close()
        for pid in marked(MARK, mark):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def rank_environment(mark: str) -> dict[str, str]:
    source = str(Path(__file__).parents[1] / "src")
    path = os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, MARK: mark}


def free_port() -> int:
    """A port below those that the system hands out, so that no connection takes it meanwhile."""
    draw = random.SystemRandom()
    while True:
        port = draw.randrange(15000, 32000)
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def kill(pids: Sequence[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def seconds_until_ended(started: Started, at_most_s: float) -> float | None:
    """How long all its processes take to end by themselves; None where some still live after `at_most_s`."""
    began = time.monotonic()
    while any(map(alive, started.processes())):
        if time.monotonic() - began > at_most_s:
            return None
        time.sleep(0.01)
        started.statuses()  # torchrun is our child, which has to be asked
    return time.monotonic() - began


def seconds_until_no_orphans(mark: str, nursery: Nursery, at_most_s: float) -> tuple[float, list[int]]:
    """How long until nothing of a start lives any more, its planner's process included; and what does after that."""
    began = time.monotonic()
    while left := [pid for pid in marked(MARK, mark) if pid != nursery.pid]:
        if time.monotonic() - began > at_most_s:
            break
        time.sleep(0.02)
    return time.monotonic() - began, left
