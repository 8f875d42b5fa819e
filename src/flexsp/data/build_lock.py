"""The lock of a build, which one process of all that see the cache holds.

Its file says who holds it, for those that wait, and what the holder found wrong, so that those that waited for the same
say it too and do not each try anew:

{"pid": 12, "host": "node3", "machine": "..."}
{"key": "...", "failure": "rows.jsonl row 3: ..."}
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

log = logging.getLogger(__name__)

POLL_S = 0.2
SAY_S = 5.0
"""After which one that waits says so first; then after twice as long each time, a minute at most."""
STOPPED_S = 60.0
"""How long a process may be stopped, by SIGSTOP or a debugger, before one that waits for it gives up."""


class BuilderStoppedError(RuntimeError):
    """Another process, which builds what this one waits for, is stopped or gone."""


class Stopped:
    """Which processes of this machine have been stopped for long, as far as it is asked."""

    def __init__(self) -> None:
        self._since_s: dict[int, float] = {}

    def for_long(self, pid: int) -> bool:
        """Whether it has been stopped, or gone, each time since `STOPPED_S` ago."""
        if not _stands_still(pid):
            self._since_s.pop(pid, None)
            return False
        return time.monotonic() > self._since_s.setdefault(pid, time.monotonic()) + STOPPED_S


def _stands_still(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0] in "TtZX"
    except OSError:
        return True


@contextmanager
def build_lock(path: Path, key: str) -> Iterator[None]:
    """Holds the lock at `path`, waited for as long as it takes. What is raised inside is left for those that wait.

    Args:
        path: a file for nothing else.
        key: a digest of all that decides what may be found wrong; failures of other keys are none of ours.

    Raises:
        ValueError: what another one with this key found wrong while this one waited.
        BuilderStoppedError: who holds it has been stopped for `STOPPED_S`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as file:
        if not _taken(file):
            _wait(file)
            failed = next((line for line in _lines(file) if "failure" in line), {})
            if failed.get("key") == key:
                raise ValueError(failed["failure"])
        file.truncate(0)
        _write(file, {"pid": os.getpid(), "host": socket.gethostname(), "machine": _machine()})
        try:
            yield
        except ValueError as error:
            _write(file, {"key": key, "failure": str(error)})
            raise
        except OSError as error:
            said = f"{path.parent.parent}: cannot be written ({error.strerror or error})"
            _write(file, {"key": key, "failure": said})
            raise


def _taken(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait(file: IO[str]) -> None:
    """Until the lock is taken; says now and then for whom it waits."""
    log.info("data: waiting for another process, which tokenizes the same source")
    began_s = time.monotonic()
    say_s, stopped = SAY_S, Stopped()
    while not _taken(file):
        time.sleep(POLL_S)
        holder = next((line for line in _lines(file) if "pid" in line), None)
        if holder is None:  # it has just been taken
            continue
        name = f"process {holder['pid']} on {holder['host']}"
        if holder["machine"] == _machine() != "" and stopped.for_long(holder["pid"]):
            raise BuilderStoppedError(
                f"data: {name}, which tokenizes the same source, has been stopped for {STOPPED_S:.0f} s; continue it "
                f"(kill -CONT {holder['pid']}) or end it, and start again: what it had done is kept"
            )
        if time.monotonic() > began_s + say_s:
            log.info("data: waiting for %s, which tokenizes the same source: %.0f s", name, time.monotonic() - began_s)
            say_s += min(say_s, 60.0)


def _lines(file: IO[str]) -> list[dict[str, Any]]:
    """Whole ones; the holder may be writing."""
    file.seek(0)
    found = []
    for line in file:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in found if isinstance(line, dict)]


def _write(file: IO[str], line: dict[str, Any]) -> None:
    file.write(json.dumps(line) + "\n")
    file.flush()


def _machine() -> str:
    """Names the processes that a process id here may mean: of this boot, in this container. Empty where unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
