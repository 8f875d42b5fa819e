"""Joining the other ranks: torchrun's environment, or a run of one rank without it."""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


@contextmanager
def joined_ranks(timeout_s: float) -> Iterator[torch.device]:
    """The process group of all ranks (NCCL where there is CUDA, else gloo) and this rank's device, while inside.

    Without torchrun's environment the run has one rank.

    Raises:
        ValueError: more ranks on this node than GPUs.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        _check_devices(int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count())
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        backend = "nccl"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        alone = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=alone, rank=0, world_size=1, timeout=timeout)
    try:
        yield device
    except (ValueError, SystemExit):  # bad input, which all ranks find alike; the end of a rank alone
        dist.destroy_process_group()
        raise
    # After another error nothing is torn down: other ranks may be in a collective, the word on the error would wait for
    # them, and the process ends anyway.
    dist.destroy_process_group()


def _check_devices(local_ranks: int, num_devices: int) -> None:
    if local_ranks > num_devices:
        raise ValueError(
            f"nproc-per-node={local_ranks} is more than the {num_devices} GPUs of this node; start one rank for each, "
            f"or set CUDA_VISIBLE_DEVICES to nothing to run on the CPU"
        )


SIGTERM, LAUNCHER_ENDED = "SIGTERM", "the end of torchrun"
"""Why a run is asked to stop."""
CAUSES = ("", SIGTERM, LAUNCHER_ENDED)


class StopSignal:
    """SIGTERM as a request, while inside: a step is finished first, however often it comes.

    A scheduler may signal every process, and torchrun its workers once more; what is stuck SIGKILL ends. So is the end
    of torchrun: nobody watches over its ranks then, and the same command may be started again in the same folder.
    """

    def __init__(self) -> None:
        self.cause = ""
        """Why this rank was asked to stop; empty: it was not."""
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._before: Any = None

    def __enter__(self) -> StopSignal:
        self._before = signal.signal(signal.SIGTERM, self.note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def note(self, *_: object) -> None:
        """The signal has come."""
        self.cause = self.cause or SIGTERM

    def look_for_launcher(self) -> None:
        """Notes its end: a process whose parent has ended gets another one."""
        if self._launcher is not None and os.getppid() != self._launcher:
            self.cause = LAUNCHER_ENDED

    def asked(self, control: dist.ProcessGroup) -> str:
        """Why a rank was asked to stop; empty: none was. A collective: the signal reaches ranks at different steps."""
        asked = torch.tensor([CAUSES.index(self.cause)])
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=control)
        return CAUSES[int(asked.item())]


class Board:
    """A board that all ranks read and write: the store of torchrun's agent.

    It is there before any process group and outlives a failing rank. Where there is none (`env://` by other launchers),
    or it has ended, nothing is found on it. Its methods may be called by any thread.
    """

    def __init__(self) -> None:
        self._store = _agent_store()
        self._prefix = f"flexsp/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/"

    @property
    def is_there(self) -> bool:
        """Whether other ranks can read what is posted."""
        return self._store is not None

    def add(self, key: str, amount: int) -> int | None:
        """A counter after adding to it; None where there is no board."""
        total: int | None = self._ask(lambda store: int(store.add(self._prefix + key, amount)))
        return total

    def post(self, key: str, document: Any) -> None:
        """Puts a JSON document up, in the place of an earlier one."""
        self._ask(lambda store: store.set(self._prefix + key, json.dumps(document)))

    def read(self, key: str) -> Any:
        """What was posted; None where nothing was."""
        if not self._ask(lambda store: store.check([self._prefix + key])):
            return None
        return self._ask(lambda store: json.loads(store.get(self._prefix + key)))

    def wait(self, key: str, patience_s: float) -> Any:
        """What was posted, once it is; None where nothing was for so long."""
        until = time.monotonic() + patience_s
        while (said := self.read(key)) is None and time.monotonic() < until:
            time.sleep(0.1)
        return said

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        if self._store is None:
            return None
        try:
            return question(self._store)
        except dist.DistNetworkError:  # the agent has ended
            self._store = None
        except RuntimeError:  # it does not answer
            pass
        return None


def first_to_say(text: str) -> bool:
    """Whether no other rank has said this yet, so that what all ranks find wrong is printed once.

    Ranks that find nothing wrong, with a TOML of their own say, learn that the word has been said; see `Guard`.
    """
    board = Board()
    board.add("first", 1)
    first = board.add("said/" + hashlib.sha256(text.encode()).hexdigest(), 1) in (None, 1)  # better twice than never
    board.post("said", 2)
    board.post("alarm", True)
    return first


def _agent_store() -> Any:
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    try:
        return dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=datetime.timedelta(seconds=10),
        )
    except (KeyError, ValueError, RuntimeError):
        return None
