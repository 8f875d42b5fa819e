"""Lengths as a picture: a histogram of sequences and of tokens, and their cumulative shares."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from flexsp.lengths import LengthArray, length_text
from flexsp.simulate.pictures import drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float64]

BINS_PER_OCTAVE = 4
MOST_TICKS = 16

# Told apart by darkness and by the kind of line, so that a grey print can be read.
SEQUENCES: dict[str, Any] = {"color": "0.72", "label": "sequences"}
TOKENS: dict[str, Any] = {"color": "0.1", "label": "tokens"}


def draw(lengths: LengthArray, title: str, max_length: int | None = None) -> Figure:
    """Shares of sequences and of tokens by length above, how much lies in sequences up to a length below.

    Args:
        lengths: (K,) tokens, each at least 1.
        max_length: a context limit to mark, in tokens.

    Raises:
        ValueError: matplotlib is missing.
    """
    figure = drawing.new_figure(11, 7.5)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    ascending = np.sort(lengths).astype(np.float64)
    edges = _edges(ascending)
    _histogram(upper, ascending, edges)
    _cumulative(lower, ascending, edges)
    if max_length is not None and edges[0] <= max_length <= edges[-1]:
        for axes in (upper, lower):
            axes.axvline(max_length, color="0.3", linestyle=(0, (1, 2)), linewidth=1.5)
        left = max_length > np.sqrt(edges[0] * edges[-1])
        upper.annotate(
            f"limit {length_text(max_length)}", (max_length, 1), (-6 if left else 6, -6), va="top",
            ha="right" if left else "left", xycoords=("data", "axes fraction"), textcoords="offset points",
        )  # fmt: skip
    _length_axis(lower, edges)
    sequences = f"{len(lengths):,} {'sequence' if len(lengths) == 1 else 'sequences'}"
    title = f"{' '.join(title.split())}: {sequences}, {int(lengths.sum()):,} tokens"
    figure.suptitle(title, parse_math=False, fontsize=13)
    return figure


def _edges(ascending: Floats) -> Floats:
    """Of the bins, from the power of two that no length is below to the one that none exceeds, at least one octave."""
    first = int(np.floor(np.log2(ascending[0])))
    last = max(first + 1, int(np.ceil(np.log2(ascending[-1]))))
    edges: Floats = 2.0 ** np.linspace(first, last, (last - first) * BINS_PER_OCTAVE + 1)
    return edges


def _histogram(axes: Axes, ascending: Floats, edges: Floats) -> None:
    # a bin holds what is above its lower edge: lengths of a power of two belong to the band that ends with it
    bins = np.searchsorted(edges, ascending, side="left").clip(1, len(edges) - 1) - 1
    for weights, style in ((np.ones_like(ascending), SEQUENCES), (ascending, TOKENS)):
        shares = 100 * np.bincount(bins, weights, len(edges) - 1) / weights.sum()
        if style is SEQUENCES:
            axes.stairs(shares, edges, fill=True, **style)
        else:
            axes.stairs(shares, edges, linewidth=1.8, **style)
    axes.set_ylabel(f"share, % per 1/{BINS_PER_OCTAVE} of a doubling of the length")
    axes.set_ylim(bottom=0)
    axes.set_ylim(top=1.12 * axes.get_ylim()[1])  # room for the name of the limit
    _legend(axes, title="share of")
    axes.grid(True, axis="y", alpha=0.3)


def _cumulative(axes: Axes, ascending: Floats, edges: Floats) -> None:
    at = 2.0 ** np.linspace(np.log2(edges[0]), np.log2(edges[-1]), 500)
    count = np.searchsorted(ascending, at, side="right")
    lines: tuple[tuple[Floats, dict[str, Any]], ...] = (
        (np.ones_like(ascending), {**SEQUENCES, "color": "0.6", "linewidth": 2.4}),
        (ascending, TOKENS),
        (ascending**2, {"color": "0.1", "label": "tokens squared\n(attention)", "linestyle": "--"}),
    )
    for weights, style in lines:
        sums = np.concatenate([[0.0], np.cumsum(weights)])
        axes.plot(at, 100 * sums[count] / sums[-1], **{"linewidth": 1.8, **style})
    axes.set_ylabel("in sequences up to\nthat length, %")
    axes.set_ylim(-2, 102)
    _legend(axes)
    axes.grid(True, alpha=0.3)


def _legend(axes: Axes, **style: Any) -> None:
    """Beside the axes, where it covers nothing."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.0, frameon=False, **style)


def _length_axis(axes: Axes, edges: Floats) -> None:
    """A logarithmic axis with ticks at powers of two, at each if they are few."""
    axes.set_xscale("log", base=2)
    axes.set_xlim(edges[0], edges[-1])
    octaves = round(float(np.log2(edges[-1] / edges[0])))
    step = -(-octaves // MOST_TICKS)
    ticks = [int(edges[0]) << shift for shift in range(0, octaves + 1, step)]
    axes.set_xticks(ticks, [length_text(tokens) for tokens in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel("length of the sequence, tokens (K = 1024)")
