"""A step in a terminal: ranks down, time across, a character for what a rank does.

Characters are few and a step may have many micro-batches. What is too short for a character of its own is saved up over
the micro-batches until it makes one, so that over a whole row each kind has about the characters its time is worth.
"""

from __future__ import annotations

import string
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from rich.console import Console
from rich.text import Text

from flexsp.simulate.pictures.gantt import rank_steps
from flexsp.simulate.timeline import MicroBatchSpan, Span, Timeline

MOST_ROWS = 32
LEAST_COLUMNS = 10
TICK_COLUMNS = 10
"""Ticks of the time axis are at least that far apart, so that their labels have room."""

# Grounds of the characters of low to high degrees, dark to bright as in the pictures.
DEGREE_COLOURS = ("#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30")


@dataclass(frozen=True, slots=True, kw_only=True)
class Symbols:
    """The characters of one picture."""

    degrees: Mapping[int, str]
    """A digit is the degree itself; above 9 come letters."""
    exchange: str = "~"
    fixed: str
    idle: str
    axis: str
    tick: str

    def style(self, symbol: str) -> str:
        """How rich shows a character."""
        if symbol in (self.fixed, self.idle):
            return "bright_black"
        if symbol == self.exchange:
            return "magenta"
        place = list(self.degrees.values()).index(symbol)
        colour = place * (len(DEGREE_COLOURS) - 1) // max(1, len(self.degrees) - 1)
        return f"{'black' if colour > 3 else 'white'} on {DEGREE_COLOURS[colour]}"


def render(timeline: Timeline, width: int = 80, ascii_only: bool = False) -> Text:
    """The picture as text of at most `width` columns and some 36 lines.

    Adjacent ranks that look the same are one row. Where that leaves more than 32 rows, a row stands for several ranks
    and shows the mean of what they do.

    Args:
        width: columns; at least what the labels and a few columns of time need is taken.
        ascii_only: for an output whose encoding knows nothing else.
    """
    symbols = _symbols(timeline, ascii_only)
    margin = max(len("rank"), 2 * len(str(timeline.num_devices - 1)) + 1) + 1
    columns = max(LEAST_COLUMNS, width - margin)
    rows, ranks_a_row = _rows(timeline, columns, symbols)
    text = Text(f"{'rank':>{margin - 1}} ", no_wrap=True)
    text.append(_heading(timeline, ranks_a_row)[:columns] + "\n")
    for ranks, cells in rows:
        label = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]}-{ranks[-1]}"
        text.append(f"{label:>{margin - 1}} ")
        for symbol, run in groupby(cells):
            text.append("".join(run), style=symbols.style(symbol))
        text.append("\n")
    for line in _axis(timeline.step_s, columns, symbols):
        text.append(" " * margin + line + "\n")
    text.append("\n".join(textwrap.wrap(_legend(timeline, symbols), max(width, LEAST_COLUMNS))))
    return text


def show(timeline: Timeline, console: Console) -> None:
    """Prints the picture as wide as `console` is, with what its encoding has."""
    console.print(render(timeline, console.width, console.options.ascii_only), soft_wrap=True)


def _symbols(timeline: Timeline, ascii_only: bool) -> Symbols:
    degrees = sorted({span.sp_degree for span in timeline.spans})
    letters = iter(string.ascii_letters)
    named = {degree: str(degree) if degree < 10 else next(letters, "?") for degree in degrees}
    if ascii_only:
        return Symbols(degrees=named, fixed="#", idle=".", axis="-", tick="+")
    return Symbols(degrees=named, fixed="░", idle="·", axis="─", tick="┴")


def _heading(timeline: Timeline, ranks_a_row: int) -> str:
    count = len(timeline.micro_batches)
    text = f"step {timeline.step_s:.3g} s, {count} micro-batch{'' if count == 1 else 'es'}"
    return text if ranks_a_row == 1 else f"{text}; a row: the mean of {ranks_a_row} ranks or more"


def _legend(timeline: Timeline, symbols: Symbols) -> str:
    """One line, where there are not very many degrees."""
    shares = timeline.shares()
    degrees = " ".join(s if s == str(degree) else f"{s}={degree}" for degree, s in symbols.degrees.items())
    return (
        f"sp_degree {degrees}, {symbols.exchange} exchange {shares.exchange:.0%}, "
        f"{symbols.fixed} fixed {shares.fixed:.0%}, {symbols.idle} idle {shares.idle:.0%}"
    )


def _axis(step_s: float, columns: int, symbols: Symbols) -> Iterator[str]:
    """A line with ticks, and the seconds beneath them."""
    line, labels = [symbols.axis] * columns, [" "] * columns
    every_s = _tick_s(step_s, columns)
    for index in range(columns):
        column = round(index * every_s / step_s * columns) if step_s else columns * index
        label = f"{index * every_s:g} s"
        if column + len(label) > columns:
            break
        line[column] = symbols.tick
        labels[column : column + len(label)] = label
    yield "".join(line)
    yield "".join(labels).rstrip()


def _tick_s(step_s: float, columns: int) -> float:
    """1, 2 or 5 times a power of ten seconds: the least that leaves room for labels."""
    least_s = step_s * TICK_COLUMNS / columns
    nice = (float(f"{digit}e{exponent}") for exponent in range(-9, 9) for digit in (1, 2, 5))
    return next((seconds for seconds in nice if seconds >= least_s), 1e9)


def _rows(timeline: Timeline, columns: int, symbols: Symbols) -> tuple[list[tuple[range, str]], int]:
    """The ranks and characters of each row, and how many ranks a row stands for at least."""
    held = [_by_rank(micro_batch, timeline.num_devices) for micro_batch in timeline.micro_batches]
    for ranks_a_row in rank_steps(timeline):
        rows: list[tuple[range, str]] = []
        for first in range(0, timeline.num_devices, ranks_a_row):
            ranks = range(first, min(first + ranks_a_row, timeline.num_devices))
            cells = _cells(timeline, held, ranks, columns, symbols)
            if rows and rows[-1][1] == cells:
                ranks = range(rows.pop()[0][0], ranks[-1] + 1)
            rows.append((ranks, cells))
        if len(rows) <= MOST_ROWS:
            return rows, ranks_a_row
    raise AssertionError("whole nodes are doubled until one row holds all ranks")


def _by_rank(micro_batch: MicroBatchSpan, num_devices: int) -> list[Span | None]:
    """Each rank's group, None where it has none."""
    spans: list[Span | None] = [None] * num_devices
    for span in micro_batch.groups:
        for rank in span.ranks:
            spans[rank] = span
    return spans


def _cells(
    timeline: Timeline, held: Sequence[Sequence[Span | None]], ranks: range, columns: int, symbols: Symbols
) -> str:
    """One row: `columns` characters.

    Micro-batches and their fixed costs have the same columns in every row, since they begin on all ranks at once.
    """
    columns_per_s = columns / (timeline.step_s or 1.0)
    saved: dict[str, float] = {}
    fixed_saved, begin, cells = 0.0, 0, ""
    for micro_batch, spans in zip(timeline.micro_batches, held, strict=True):
        end = round(micro_batch.end_s * columns_per_s)
        fixed_saved += micro_batch.fixed_s * columns_per_s
        seconds = _seconds(micro_batch, [spans[rank] for rank in ranks], symbols)
        fixed = min(round(fixed_saved), end - begin) if seconds else end - begin
        fixed_saved -= fixed
        for symbol in seconds:
            saved[symbol] = saved.get(symbol, 0.0) + seconds[symbol] * columns_per_s
        cells += symbols.fixed * fixed + _spend(saved, list(seconds), end - begin - fixed)
        begin = end
    return cells


def _seconds(micro_batch: MicroBatchSpan, spans: Sequence[Span | None], symbols: Symbols) -> dict[str, float]:
    """Seconds of each kind after the fixed cost, the mean of ranks in these groups; in the order of a group's life."""
    found: dict[str, float] = {}
    for span in spans:
        if span is None:
            parts = [(symbols.idle, micro_batch.slowest_s)]
        else:
            parts = [
                (symbols.degrees[span.sp_degree], span.compute_s),
                (symbols.exchange, span.exchange_s),
                (symbols.idle, span.idle_s),
            ]
        for symbol, seconds in parts:
            found[symbol] = found.get(symbol, 0.0) + seconds / len(spans)
    order = [*symbols.degrees.values(), symbols.exchange, symbols.idle]
    return {symbol: found[symbol] for symbol in order if found.get(symbol)}


def _spend(saved: dict[str, float], kinds: Sequence[str], count: int) -> str:
    """Takes `count` characters from what is saved of `kinds`, the most saved first; they come in the kinds' order."""
    spent = dict.fromkeys(kinds, 0)
    for _ in range(count):
        symbol = max(kinds, key=lambda kind: saved[kind])
        saved[symbol] -= 1
        spent[symbol] += 1
    return "".join(symbol * spent[symbol] for symbol in kinds)
