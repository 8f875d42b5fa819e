"""Printing lengths: quantiles, bands with a bar each, what a limit touches, and the known distributions."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

from flexsp.distributions import Band, Distribution, Excess, Summary
from flexsp.lengths import length_text

BAR_CELLS = 18
"""Of the longest bar, so that the table stays within the 80 columns of a pipe."""


def show_head(name: str, distribution: Distribution | None, seed: int, summary: Summary, console: Console) -> None:
    """What was read or drawn, and how much it is."""
    if distribution is not None:
        _say(console, f"{name}: drawn with seed {seed} ({distribution.kind}). {distribution.description}")
        _say(console, f"unit: {distribution.unit}")
    else:
        _say(console, " ".join(name.split()))
    sequences = f"{summary.num_sequences:,} {'sequence' if summary.num_sequences == 1 else 'sequences'}"
    _say(console, f"{sequences}, {summary.num_tokens:,} tokens, on average {summary.mean_tokens:,.0f}")


def show_summary(summary: Summary, console: Console) -> None:
    """The quantiles and the bands."""
    named = {0.0: "shortest", 1.0: "longest"}
    table = _table([named.get(level, f"{level * 100:g} %") for level in summary.quantiles])
    table.add_row(*(f"{tokens:,}" for tokens in summary.quantiles.values()))
    _say(console, "\nlength in tokens that this share of the sequences does not exceed")
    console.print(table)

    _say(
        console,
        "\nby length: the shares of the sequences, of their tokens, and of the squares of their lengths, "
        "with which attention's work grows (K = 1024)",
    )
    table = _table(["tokens", "up to", "sequences", "share", "tokens", "squares"])
    table.add_column("sequences (log)", justify="left", no_wrap=True)
    most = max(band.num_sequences for band in summary.bands)
    mark = "█" if console.encoding.startswith("utf") else "#"
    for band in summary.bands:
        table.add_row(
            f"{length_text(band.above_tokens)} -" if band.above_tokens else "",
            length_text(band.upto_tokens),
            f"{band.num_sequences:,}",
            _share(band.num_sequences, summary.num_sequences),
            _share(band.num_tokens, summary.num_tokens),
            _share(band.squared_tokens, summary.squared_tokens),
            mark * _cells(band, most),
        )
    console.print(table)


def show_excess(over: Excess, summary: Summary, console: Console) -> None:
    """What of the lengths is beyond a context limit."""
    limit = length_text(over.max_length)
    if not over.num_sequences:
        _say(console, f"\nnone is longer than {limit}")
        return
    many = over.num_sequences != 1
    _say(
        console,
        f"\nlonger than {limit}: {over.num_sequences:,} {'sequences' if many else 'sequence'} "
        f"({_share(over.num_sequences, summary.num_sequences)}) with {over.num_tokens:,} tokens "
        f"({_share(over.num_tokens, summary.num_tokens)}); cut there, {'they lose' if many else 'it loses'} "
        f"{over.tokens_beyond:,}",
    )


def show_distributions(known: Sequence[Distribution], console: Console) -> None:
    """All of them as a table, then where each comes from."""
    table = _table(["distribution", "kind"], justify="left")
    for column in ("50 %", "99 %", "longest"):
        table.add_column(column, justify="right")
    for each in known:
        middle, high, longest = (int(tokens) for tokens in each.quantile([0.5, 0.99, 1.0]))
        table.add_row(each.name, each.kind, f"{middle:,}", f"{high:,}", f"{longest:,}")
    _say(
        console,
        "Lengths in tokens. Measured: quantiles of lengths that were counted. Published: fitted to figures that others "
        "published.",
    )
    console.print(table)
    for each in known:
        _say(console, f"{each.name}: {each.description}\nUnit: {each.unit}.\n{each.source}\n")


def _cells(band: Band, most: int) -> int:
    """How long the band's bar is: one cell for one sequence, and growing with the logarithm."""
    if not band.num_sequences:
        return 0
    return 1 if most == 1 else 1 + round((BAR_CELLS - 1) * math.log(band.num_sequences) / math.log(most))


def _share(part: float, whole: float) -> str:
    """A percentage of two digits at the least, so that a thin tail does not vanish."""
    if not part:
        return "-"
    percent = 100 * part / whole
    if percent < 0.001:
        return "<0.001 %"
    decimals = 1 if percent >= 9.95 else max(2, 1 - math.floor(math.log10(percent)))
    return f"{percent:.{decimals}f} %"


def _table(columns: Sequence[str], justify: JustifyMethod = "right") -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify=justify, overflow="fold")
    return table


def _say(console: Console, text: str) -> None:
    console.print(Text(text))
