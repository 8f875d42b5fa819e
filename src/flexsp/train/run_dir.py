"""The folder of a run: one run at a time writes to it, and it remembers with which configuration it began.

run.lock    locked by the first rank while the run lives; the system frees it, however the run ends
run.json    the configuration of what the logs tell, and the checkpoint of another run that it began from
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist

from flexsp import jsonfields as jf
from flexsp.parallel import GroupPool
from flexsp.parallel.control import from_first_rank
from flexsp.train.config import Config
from flexsp.train.roll_call import ranks_text

log = logging.getLogger(__name__)

LOCK, BEGAN = "run.lock", "run.json"
PATIENCE_S = 5.0
"""How long a start waits for the lock: a run that was killed or told to stop may still be ending."""
SEEN_WITHIN_S = 65.0
"""How long a new file may take to be seen on another node: NFS believes for a minute that there is none."""


@contextmanager
def held_folder(folder: Path, groups: GroupPool, timeout_s: float) -> Iterator[None]:
    """Makes a run's folder, and holds it against other starts while inside. A collective; the first rank holds it.

    Args:
        folder: of the run.
        groups: of all ranks.
        timeout_s: of collectives, in which ranks wait for those that do not see the folder.

    Raises:
        ValueError: it cannot be made or written to, another run holds it, or a rank does not see it.
    """
    with ExitStack() as stack:

        def hold() -> None:
            file = _open(folder)
            stack.callback(file.close)
            _lock(file, folder)

        from_first_rank(hold, groups)
        _check_shared(folder, groups, min(SEEN_WITHIN_S, timeout_s / 2))
        yield


def _check_shared(folder: Path, groups: GroupPool, within_s: float) -> None:
    """Whether all ranks come to see the folder that the first made: what others wrote elsewhere no start would find.

    Raises:
        ValueError: on all ranks alike, where one does not.
    """

    def place() -> str:
        name = f".shared.{secrets.token_hex(8)}"
        try:
            (folder / name).touch()
        except OSError:  # a full disk is found, and said, where something is to be written
            return ""
        return name

    name = from_first_rank(place, groups)
    if not name:
        return
    seen: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(seen, _comes(folder / name, within_s), group=groups.control)
    if dist.get_rank() == 0:
        with suppress(OSError):
            (folder / name).unlink()
    if blind := [rank for rank, sees in enumerate(seen) if not sees]:
        raise ValueError(
            f"run.dir={str(folder)!r} is another folder on {ranks_text(blind)}: checkpoints need one that all nodes "
            f"see; give a folder on a file system that they share"
        )


def _comes(path: Path, within_s: float) -> bool:
    """Whether a file is there within a while: a file system of several machines may be late."""
    until = time.monotonic() + within_s
    while not os.path.exists(path):  # no error for what cannot be looked at, as `Path.exists` has
        if time.monotonic() > until:
            return False
        time.sleep(0.1)
    return True


def _open(folder: Path) -> IO[str]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return open(folder / LOCK, "a+", encoding="utf-8")
    except OSError as error:
        raise ValueError(
            f"run.dir={str(folder)!r} cannot be made ({error.strerror}); give a folder that can be written to"
        ) from None


def _lock(file: IO[str], folder: Path) -> None:
    until = time.monotonic() + PATIENCE_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > until:
                file.seek(0)
                raise ValueError(
                    f"run.dir={str(folder)!r} is in use by another run{_holder(file.read())}; wait until it has ended, "
                    f"or give another run.dir"
                ) from None
            time.sleep(0.2)
        except OSError as error:  # not every file system of several machines has locks
            log.warning("run.dir: %s cannot be locked (%s): start no other run in it", folder, error.strerror)
            return
    with suppress(OSError):  # a full disk: who holds it is a courtesy
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()


def _holder(said: str) -> str:
    line = said.strip()[:100]
    return f" ({line})" if line.isprintable() and line else ""


def write_began(config: Config, origin: str) -> None:
    """Writes run.json. On one rank, just before the first row is written."""
    document = {"config": asdict(config), "origin": origin}
    jf.write_object(Path(config.run.dir) / BEGAN, document, synced=True)


def read_began(folder: Path) -> tuple[dict[str, Any], str] | None:
    """The configuration and the origin of a run that has written rows into the folder; None where none has.

    Raises:
        ValueError: the file is not one of ours.
    """
    path = folder / BEGAN
    if not path.exists():
        return None
    found, where = jf.read_object(path), str(path)
    origin = jf.as_string(jf.required(found, "origin", where), f"{where}: origin")
    return jf.as_object(jf.required(found, "config", where), f"{where}: config"), origin
