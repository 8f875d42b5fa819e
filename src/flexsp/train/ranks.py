"""Joining the other ranks: torchrun's environment, or a run of one rank without it."""

from __future__ import annotations

import datetime
import hashlib
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist


@contextmanager
def joined_ranks(timeout_s: float) -> Iterator[torch.device]:
    """The process group of all ranks (NCCL where there is CUDA, else gloo) and this rank's device, while inside.

    Without torchrun's environment the run has one rank.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
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
    except ValueError:  # bad input, which all ranks find alike
        dist.destroy_process_group()
        raise
    # After another error nothing is torn down: other ranks may be in a collective, the word on the error would wait for
    # them, and the process ends anyway.
    dist.destroy_process_group()


class StopSignal:
    """SIGTERM as a request, while inside: the step is finished first, however often it comes.

    A scheduler may signal every process, and torchrun its workers once more; what is stuck SIGKILL ends.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    def __enter__(self) -> StopSignal:
        self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._before)

    def _note(self, *_: object) -> None:
        self._asked = True

    def asked(self, control: dist.ProcessGroup) -> bool:
        """Whether any rank was asked to stop. A collective: the signal reaches ranks at different steps."""
        asked = torch.tensor([int(self._asked)])
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=control)
        return bool(asked.item())


def first_to_say(text: str) -> bool:
    """Whether no other rank has said this yet, so that what all ranks find wrong is printed once."""
    key = "flexsp/said/" + hashlib.sha256(text.encode()).hexdigest()
    return _added(key, 1) in (None, 1)  # better twice than not at all


FAILED, EXPLAINED = "flexsp/failed", "flexsp/explained"
PATIENCE_S = 5.0
"""How long a rank waits for another to say why it ends: torchrun ends all ranks once one of them has."""


def announce_failure() -> bool:
    """Tells the other ranks that this one ends and will say why; False where another was first."""
    return _added(FAILED, 1) in (None, 1)


def failure_explained() -> None:
    """The rank that announced its end has said why."""
    _added(EXPLAINED, 1)


def failure_of_another() -> bool:
    """Whether a rank has announced its end; waits until that one has said why."""
    if not _added(FAILED, 0):
        return False
    until = time.monotonic() + PATIENCE_S
    while not _added(EXPLAINED, 0) and time.monotonic() < until:
        time.sleep(0.1)
    return True


def _added(key: str, amount: int) -> int | None:
    """A counter that all ranks share, after adding to it; None where there is none.

    It is in the store of torchrun's agent, which is there before any process group and outlives a failing rank.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=datetime.timedelta(seconds=10),
        )
        return int(store.add(key, amount))
    except (KeyError, RuntimeError):
        return None
