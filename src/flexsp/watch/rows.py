"""Reading metrics.jsonl, and the other logs with a row a step.

A run that goes on appends. Steps after its checkpoint are then there twice, and the last row of a step is the one that
counts: it tells of the weights that live on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

from flexsp import jsonfields as jf

METRICS = "metrics.jsonl"


def last_rows(path: Path, keys: Container[str] | None = None) -> dict[int, dict[str, Any]]:
    """The row that counts of each step; rows that a kill tore are left out.

    Args:
        path: a file with a row a step.
        keys: what to keep of a row; None: all. A long run has many.

    Raises:
        ValueError: it cannot be read, or a row is of no step.
    """
    rows: dict[int, dict[str, Any]] = {}
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for number, line in enumerate(file, start=1):
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                where = f"{path}:{number}"
                row = jf.as_object(row, where)
                step = jf.as_integer(jf.required(row, "step", where), f"{where}: step", 0)
                rows[step] = row if keys is None else {key: value for key, value in row.items() if key in keys}
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give a file that a run wrote") from None
    return rows


NUMBERS = (
    "loss", "eval_loss", "tokens", "tokens_per_s", "tflops_per_s", "mfu", "step_s", "predicted_s", "plan_wait_s",
    "data_wait_s", "idle_share", "unused_share", "gather_share", "exchange_share", "peak_bytes", "predicted_peak_bytes",
    "communicators",
)  # fmt: skip
LISTS = ("micro_batches", "micro_batch_s", "predicted_micro_batch_s", "micro_batch_idle_share")
"""With an entry for each micro-batch."""


def read_run(path: str | Path) -> dict[int, dict[str, Any]]:
    """The rows that count of a run's folder or of its metrics.jsonl, in order, checked as far as they are shown.

    Raises:
        ValueError: it cannot be read, has no row, or a row is not of a run.
    """
    file = Path(path) / METRICS if os.path.isdir(path) else Path(path)
    rows = last_rows(file)
    if not rows:
        raise ValueError(f"{file}: there is no row in it yet; wait for the first step")
    for step, row in rows.items():
        _check_row(row, f"{file}: step {step}")
    return dict(sorted(rows.items()))


def _check_row(row: Mapping[str, Any], where: str) -> None:
    for key in NUMBERS:
        if row.get(key) is not None:
            _number(row[key], f"{where}: {key}")
    sizes = set()
    for key in LISTS:
        if key in row:
            values = jf.as_list(row[key], f"{where}: {key}")
            sizes.add(len(values))
            for value in values:
                for each in jf.as_list(value, f"{where}: {key}") if key == "micro_batches" else [value]:
                    _number(each, f"{where}: {key}")
    if len(sizes) > 1:
        raise ValueError(f"{where}: {', '.join(LISTS)} must have an entry for each micro-batch alike; restore the row")


def _number(value: Any, where: str) -> None:
    """A number; a loss may be NaN, which is worth seeing."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where}={value!r} must be a number; restore the row")
