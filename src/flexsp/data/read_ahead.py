"""Reading a rank's own tokens in a thread, while the step before trains: a step does not wait for storage.

What is read, and in which order a step trains it, follows from the plan alone; this only says when.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from flexsp.data.batch import PlannedBatch, RankMicroBatch


class DataTimeoutError(RuntimeError):
    """Storage gave nothing in time."""


class ReadAhead:
    """What is being read of one batch for one rank; an `Ahead`."""

    def __init__(self, batch: PlannedBatch, rank: int, timeout_s: float) -> None:
        self._batch, self._rank, self._timeout_s = batch, rank, timeout_s
        self._future: Future[list[RankMicroBatch]] = Future()
        self.waited_s = 0.0
        """Seconds that `result` waited; nil where all had been read."""

    def serves(self, batch: PlannedBatch, rank: int) -> bool:
        """Whether it is this rank's part of this very batch: sequences, groups and layouts."""
        own = self._batch
        return (
            rank == self._rank
            and batch.source is own.source
            and np.array_equal(batch.sequence_ids, own.sequence_ids)
            and batch.layouts == own.layouts
            and _groups(batch) == _groups(own)
        )

    def run(self, prepare: Callable[[RankMicroBatch], RankMicroBatch]) -> None:
        """In the reader's thread. Whatever is raised is `result`'s to raise."""
        if not self._future.set_running_or_notify_cancel():
            return
        try:
            self._future.set_result([prepare(part) for part in self._batch.read(self._rank)])
        except BaseException as error:
            self._future.set_exception(error)

    def cancel(self) -> None:
        """Nobody wants it; what has begun is read to its end."""
        self._future.cancel()

    def result(self) -> list[RankMicroBatch]:
        """What was read.

        Raises:
            DataTimeoutError: nothing came in time.
            RuntimeError: reading ended the thread.
            Exception: what reading raised.
        """
        began = time.perf_counter()
        if not self._future.done():
            wait([self._future], self._timeout_s)
            self.waited_s += time.perf_counter() - began
        if not self._future.done():
            raise DataTimeoutError(
                f"its tokens were not read within {self._timeout_s:g} s; see whether the storage answers, or raise "
                f"run.timeout_s"
            )
        error = self._future.exception()
        if error is not None and not isinstance(error, Exception):
            raise RuntimeError(f"reading its tokens ended with {type(error).__name__}: {error}") from error
        return self._future.result()


def _groups(batch: PlannedBatch) -> list[Any]:
    """What of a plan decides who reads what."""
    return [(m.policy, [(g.ranks, g.sequences) for g in m.groups]) for m in batch.plan.micro_batches]


class Reader:
    """The thread that reads for one rank, batch by batch, in the order in which they are begun."""

    def __init__(self, rank: int, timeout_s: float) -> None:
        """
        Args:
            rank: whose tokens are read.
            timeout_s: after which a batch that is waited for is an error.
        """
        self._rank, self._timeout_s = rank, timeout_s
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._jobs: queue.SimpleQueue[ReadAhead | None] = queue.SimpleQueue()
        # a daemon: what a dead file system holds for ever must not hold the process
        self._thread = threading.Thread(target=self._run, name="flexsp-reader", daemon=True)
        self._thread.start()

    def begin(self, batch: PlannedBatch) -> ReadAhead:
        """This rank's part of `batch` is read once those begun before have been."""
        ahead = ReadAhead(batch, self._rank, self._timeout_s)
        self._jobs.put(ahead)
        return ahead

    def close(self) -> None:
        """Ends the thread, unless storage holds it."""
        self._jobs.put(None)
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)
        while (job := self._jobs.get()) is not None:
            job.run(self._pinned)

    def _pinned(self, part: RankMicroBatch) -> RankMicroBatch:
        """On CUDA, in memory that is copied from while the device computes."""
        if self._device is None:
            return part
        return replace(
            part,
            input_ids=part.input_ids.pin_memory(),
            position_ids=part.position_ids.pin_memory(),
            shift_labels=part.shift_labels.pin_memory(),
            cu_seqlens=part.cu_seqlens.pin_memory(),
        )
