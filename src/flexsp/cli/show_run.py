"""`flexsp show RUN`: what a run has written so far, in a dozen lines, a table by mixes of degrees, and a picture."""

from __future__ import annotations

import os
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flexsp.watch.picture import save_run
from flexsp.watch.rows import read_run
from flexsp.watch.shapes import Shape, shapes
from flexsp.watch.summary import lines, summary

MOST_SHAPES = 12


def is_run(path: str) -> bool:
    """Whether this names a run and not a profile."""
    return os.path.isdir(path) or Path(path).name.endswith(".jsonl")


def show_run(path: str, picture: str | None) -> int:
    """Shows the run in a folder, or of its metrics.jsonl; returns the exit status.

    Raises:
        ValueError: it cannot be read, or the picture cannot be drawn or written.
    """
    rows = read_run(path)
    if picture is not None:
        save_run(rows, str(path), picture)
    console = Console(markup=False)
    for what, text in lines(summary(rows, len(rows))):
        console.print(Text(f"{what}: {text}"), soft_wrap=True)
    found = shapes(rows.values())
    if found:
        console.print(_table(found))
        if len(found) > MOST_SHAPES:
            console.print(f"and {len(found) - MOST_SHAPES} other mixes, of less time each")
        console.print("idle: of the rank-seconds, what ranks waited for a slower group or had none")
    return 0


def _table(found: list[Shape]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("degrees", overflow="fold")
    for column in ("ran", "of the time", "seconds\n(median)", "measured /\npredicted", "idle"):
        table.add_column(column, justify="right")
    whole_s = sum(shape.seconds for shape in found)
    for shape in found[:MOST_SHAPES]:
        table.add_row(
            Text(shape.degrees), f"{shape.count:,}", f"{shape.seconds / whole_s:.0%}" if whole_s else "-",
            f"{shape.median_s:.3g}", "-" if shape.ratio is None else f"{shape.ratio:.2f}", f"{shape.idle_share:.1%}",
        )  # fmt: skip
    return table
