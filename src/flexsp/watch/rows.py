"""Reading metrics.jsonl, and the other logs with a row a step.

A run that goes on appends. Steps after its checkpoint are then there twice, and the last row of a step is the one that
counts: it tells of the weights that live on.
"""

from __future__ import annotations

import json
from collections.abc import Container
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"


def last_rows(path: Path, keys: Container[str] | None = None) -> dict[int, dict[str, Any]]:
    """The row that counts of each step; rows that a kill tore are left out.

    Args:
        path: a file with a row a step.
        keys: what to keep of a row; None: all. A long run has many.
    """
    rows: dict[int, dict[str, Any]] = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            step = int(row["step"])
            rows[step] = row if keys is None else {key: value for key, value in row.items() if key in keys}
    return rows
