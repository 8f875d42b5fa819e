"""Joining the other ranks: torchrun's environment, or a run of one rank without it."""

from __future__ import annotations

import datetime
import os
import signal
from collections.abc import Iterator
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


LAUNCHER_ENDED = "the end of torchrun"
CAUSES = ("", signal.SIGTERM.name, signal.SIGHUP.name, LAUNCHER_ENDED)
"""Why a run is asked to stop; empty: it is not."""


class StopSignal:
    """SIGTERM and SIGHUP as a request, while inside: a step is finished first, however often they come.

    A scheduler may signal every process, and torchrun its workers once more; what is stuck SIGKILL ends. SIGHUP comes
    where a terminal is lost, an ssh session say, and torchrun hands it on. The end of torchrun is such a request too:
    nobody watches over its ranks then, and the same command may be started again in the same folder.
    """

    def __init__(self) -> None:
        self.cause = ""
        """Why this rank was asked to stop; empty: it was not."""
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        noted = [signal.SIGTERM, signal.SIGHUP]
        if self._launcher is None and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            noted.remove(signal.SIGHUP)  # by nohup; torchrun hands it on in spite of that, and then ends its ranks
        self._before = {each: signal.signal(each, self.note) for each in noted}
        return self

    def __exit__(self, *_: object) -> None:
        for each, before in self._before.items():
            signal.signal(each, before)

    def note(self, signum: int, *_: object) -> None:
        """A signal has come."""
        if signum in self._before and not self.cause:
            self.cause = signal.Signals(signum).name

    def look_for_launcher(self) -> None:
        """Notes its end: a process whose parent has ended gets another one."""
        if self._launcher is not None and os.getppid() != self._launcher:
            self.cause = LAUNCHER_ENDED

    def asked(self, control: dist.ProcessGroup) -> str:
        """Why a rank was asked to stop; empty: none was. A collective: the signal reaches ranks at different steps."""
        asked = torch.tensor([CAUSES.index(self.cause)])
        dist.all_reduce(asked, op=dist.ReduceOp.MAX, group=control)
        return CAUSES[int(asked.item())]
