"""What a run writes down at each step: metrics.jsonl, which sequences were trained, and by which plan.

A run that goes on appends. Steps after its checkpoint are then there twice, and the last row of a step is the one that
counts: it tells of the weights that live on.

Rows are handed to the system at each step. The disk is waited for by what writes a checkpoint, before it has its name:
after a loss of power the rows of all steps below the checkpoint's are there.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import torch.distributed as dist

from flexsp import jsonfields as jf
from flexsp.data import PlannedBatch
from flexsp.planner.replay import FILE as PLANS
from flexsp.train.sinks import Sinks
from flexsp.watch.rows import METRICS, last_rows

SEQUENCES = "sequences.jsonl"
NAMES = (METRICS, SEQUENCES, PLANS)


class Records:
    """The run folder's logs, on rank 0; the others write nothing."""

    def __init__(self, folder: Path, append: bool, sinks: Sinks) -> None:
        """
        Args:
            folder: of the run; it exists.
            append: whether the run goes on; else it begins, and what is there is overwritten.
            sinks: what gets the metrics too.
        """
        self._folder, self._append, self._sinks = folder, append, sinks
        self._files: dict[str, IO[str]] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Records:
        if dist.get_rank() == 0:
            for name in NAMES:
                path = self._folder / name
                torn = self._append and path.exists() and path.read_bytes()[-1:] not in (b"", b"\n")
                if not self._append:
                    open(path, "w").close()
                # always at the end: where a file system has no locks, rows of two runs then show as those of two
                file = self._files[name] = self._stack.enter_context(open(path, "a", encoding="utf-8"))
                if torn:  # a kill in the middle of a row
                    file.write("\n")
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def write(self, metrics: Mapping[str, Any], batch: PlannedBatch) -> None:
        """A step has been trained: its metrics, the ids of its sequences, and its plan, in indices into these ids."""
        if not self._files:
            return
        rows = {
            METRICS: jf.finite(metrics),
            SEQUENCES: {"step": batch.step, "ids": batch.sequence_ids.tolist()},
            PLANS: {"step": batch.step, "plan": batch.plan.to_json()},
        }
        for name, row in rows.items():
            self._files[name].write(json.dumps(row) + "\n")
            self._files[name].flush()
        self._sinks.write(metrics)

    def amend(self, step: int, more: Mapping[str, Any]) -> None:
        """What is known of an earlier step only now: its row once more with that, if this folder has it."""
        row = last_rows(self._folder / METRICS).get(step) if self._files else None
        if row is not None and not more.items() <= row.items():
            self._files[METRICS].write(json.dumps(jf.finite({**row, **more})) + "\n")
            self._files[METRICS].flush()
            self._sinks.write({"step": step, **more})
