"""A run as a picture: loss, speed, where the time went, and what was predicted, step by step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexsp.simulate.pictures import drawing
from flexsp.simulate.pictures.style import plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_MARKED = 60
"""Steps up to which each has a marker: one alone draws no line."""
SHARES = {
    "idle": ("idle_share", "-", "#d95f02"),
    "exchange / busy": ("exchange_share", "--", "#7570b3"),
    "gathers": ("gather_share", ":", "#1b9e77"),
}


def save_run(rows: Mapping[int, Mapping[str, Any]], name: str, path: str | Path) -> None:
    """Draws a run into a PNG, SVG or PDF file, as the suffix of `path` says.

    Raises:
        ValueError: another suffix, no matplotlib, or `path` cannot be written.
    """
    drawing.check_suffix(path)
    drawing.save(draw(rows, name), path)


def draw(rows: Mapping[int, Mapping[str, Any]], name: str) -> Figure:
    """Four panels over the steps.

    Args:
        rows: of each step, ascending.
        name: of the run.

    Raises:
        ValueError: matplotlib is missing.
    """
    figure = drawing.new_figure(12, 7)
    (loss, speed), (shares, seconds) = figure.subplots(2, 2, sharex=True)
    figure.suptitle(plain(name), parse_math=False)
    _line(loss, rows, "loss", label="training", color="#1f77b4")
    if any(row.get("eval_loss") is not None for row in rows.values()):
        _line(loss, rows, "eval_loss", label="held out", color="#d62728", marker="o")
        _legend(loss)
    loss.set(ylabel="loss (nats)")
    _line(speed, rows, "tokens_per_s", color="#1f77b4")
    speed.set(ylabel="tokens a second, all ranks")
    speed.set_ylim(bottom=0)
    for label, (key, line, colour) in SHARES.items():
        _line(shares, rows, key, label=label, linestyle=line, color=colour)
    shares.set(ylabel="share", xlabel="step")
    shares.set_ylim(0, 1)
    _legend(shares)
    measured = {step: {"s": math.fsum(row["micro_batch_s"])} for step, row in rows.items() if "micro_batch_s" in row}
    _line(seconds, measured, "s", label="measured", color="#1f77b4")
    _line(seconds, rows, "predicted_s", label="predicted", linestyle="--", color="0.3")
    seconds.set(ylabel="seconds of a step's micro-batches", xlabel="step")
    seconds.set_ylim(bottom=0)
    _legend(seconds)
    titles = {"Loss": loss, "Speed": speed, "Where time went": shares, "Measured and predicted": seconds}
    for title, axes in titles.items():
        axes.set_title(title, loc="left")
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _legend(axes: Axes) -> None:
    """Beside the title, where it covers no line."""
    axes.legend(
        loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, borderaxespad=0.2, fontsize=9,
        handlelength=2.2, columnspacing=1.2,
    )  # fmt: skip


def _line(axes: Axes, rows: Mapping[int, Mapping[str, Any]], key: str, **style: Any) -> None:
    """The values of one key; where a step has none, the line goes past it."""
    pairs = [(step, row[key]) for step, row in rows.items() if row.get(key) is not None]
    marker = {"marker": "."} if len(pairs) <= MOST_MARKED else {}
    axes.plot([step for step, _ in pairs], [value for _, value in pairs], **{**marker, **style})
