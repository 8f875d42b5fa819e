"""Pictures of several cases: what planners gain by corpus and context limit, and from few devices to many."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flexsp.lengths import length_text
from flexsp.simulate.figures import BASELINE, CaseFigures, PlannerFigures
from flexsp.simulate.pictures import drawing
from flexsp.simulate.pictures.style import WIDTH_IN, Look, all_planners, label, looks, plain, set_title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_BARS = 24
"""Over the width of a picture, gaps between groups included, with room for their figures."""

Panels = Mapping[str, Sequence[CaseFigures]]
"""Cases that differ in one field alone, by what they share."""

FIELDS = ("corpus", "max_length", "num_devices")
"""What a case is known by."""
FINER = ("profile", "batch_size", "seed", "static_sp_degree")
"""What tells cases apart that agree in all `FIELDS`."""


def panels(cases: Sequence[CaseFigures], along: str) -> Panels:
    """`cases` in panels, those of one differing in the field `along`, by which they are sorted.

    A profile of another name or another batch size is a panel of its own only where `FIELDS` do not tell its cases
    apart: both may change with the number of devices.
    """
    fields = [name for name in FIELDS if name != along]
    for finer in FINER:
        if len({_key(case, [*fields, along]) for case in cases}) == len(cases):
            break
        fields.append(finer)
    found: dict[str, list[CaseFigures]] = {}
    told = [name for name in fields if name == "corpus" or len({getattr(case, name) for case in cases}) > 1]
    for case in cases:
        found.setdefault(_panel_text(case, told), []).append(case)
    return {text: sorted(mine, key=lambda case: int(getattr(case, along))) for text, mine in found.items()}


def _key(case: CaseFigures, fields: Sequence[str]) -> tuple[object, ...]:
    return tuple(getattr(case, name) for name in fields)


def _panel_text(case: CaseFigures, fields: Sequence[str]) -> str:
    texts = {
        "corpus": plain(case.corpus),
        "max_length": f"up to {length_text(case.max_length)} tokens",
        "num_devices": f"{case.num_devices:,} devices",
        "profile": plain(case.profile),
        "batch_size": f"{case.batch_size:,} sequences a step",
        "seed": f"seed {case.seed}",
        "static_sp_degree": f"{BASELINE} degree {case.static_sp_degree}",
    }
    return ", ".join(texts[name] for name in fields)


def speedup(cases: Sequence[CaseFigures], planners: Sequence[str] = ()) -> Figure:
    """How many times as fast as the baseline planners are: a panel for each corpus, bars by context limit.

    Args:
        cases: what to draw; other fields that vary make panels of their own.
        planners: names in the order that decides who looks how; by default that of the cases.

    Raises:
        ValueError: matplotlib is missing.

    Source: figure 4 of arXiv 2412.01523.
    """
    look = looks(planners or all_planners(cases))
    drawn = _compared(cases)
    by_corpus = panels(cases, "max_length")
    most = max(len(mine) for mine in by_corpus.values()) * (len(drawn) + 1)
    columns = max(1, min(3, len(by_corpus), MOST_BARS // most))
    rows = -(-len(by_corpus) // columns)
    figure = drawing.new_figure(WIDTH_IN, 1.7 + 2.4 * rows)
    grid = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axes in grid.flat[len(by_corpus) :]:
        axes.set_visible(False)
    for axes, (text, mine) in zip(grid.flat, by_corpus.items(), strict=False):
        for at, case in enumerate(mine):
            figures = [case.planners.get(name) for name in drawn]
            _bars(axes, at, figures, [look[name] for name in drawn], upright=most > MOST_BARS)
        axes.axhline(1, color="0.2", linewidth=1, linestyle=":")
        axes.set_xticks(range(len(mine)), [length_text(case.max_length) for case in mine])
        axes.set_xlim(-0.6, len(mine) - 0.4)
        axes.set_title("\n".join(textwrap.wrap(text, 84 // columns)), fontsize=10, parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0, 0].set_ylim(0, 1.2 * max(1.0, *(each.speedup for case in cases for each in case.planners.values())))
    for axes in grid[:, 0]:
        axes.set_ylabel(f"times as fast as {BASELINE}")
    for axes in grid.flat[max(0, len(by_corpus) - columns) : len(by_corpus)]:
        axes.set_xlabel("context limit, tokens (K = 1024)", fontsize=9)
    _legend(figure, grid[0, 0].containers, drawn)
    set_title(figure, gain_sentence(cases), _common_text(cases, "max_length"))
    return figure


def _compared(cases: Sequence[CaseFigures]) -> list[str]:
    """The planners with figures, beside the baseline; the baseline where there is no other."""
    found = [name for name in all_planners(cases) if any(name in case.planners for case in cases)]
    return [name for name in found if name != BASELINE] or [BASELINE]


def _bars(axes: Axes, at: int, figures: Sequence[PlannerFigures | None], look: Sequence[Look], upright: bool) -> None:
    """The bars of one case around x = `at`, with their figures, upright ones where there is little room."""
    width = 0.86 / len(figures)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.4}  # over the line of the baseline
    for index, (each, style) in enumerate(zip(figures, look, strict=True)):
        x = at + (index - (len(figures) - 1) / 2) * width
        height, text = (each.speedup, f"{each.speedup:.2f}") if each else (0.0, "no plan")
        axes.bar(x, height, 0.92 * width, color=style.colour, hatch=style.hatch, edgecolor="white")
        axes.annotate(
            text, (x, height), (0, 3), textcoords="offset points", ha="center", va="bottom", fontsize=8, bbox=box,
            rotation=90 if upright or not each else 0,
        )  # fmt: skip


def scaling(cases: Sequence[CaseFigures], planners: Sequence[str] = ()) -> Figure:
    """Tokens per second and device, and the speedup over the baseline, from few devices to many.

    Args:
        cases: what to draw, several numbers of devices; a row of panels for each corpus and context limit.
        planners: names in the order that decides who looks how; by default that of the cases.

    Raises:
        ValueError: matplotlib is missing.
    """
    look = looks(planners or all_planners(cases))
    drawn = [name for name in look if any(name in case.planners for case in cases)]
    rows = panels(cases, "num_devices")
    figure = drawing.new_figure(WIDTH_IN, 1.6 + 2.7 * len(rows))
    grid = figure.subplots(len(rows), 2, squeeze=False, sharex=True)
    for (left, right), (text, mine) in zip(grid, rows.items(), strict=True):
        for index, name in enumerate(drawn):
            points = [(case.num_devices, case.planners[name]) for case in mine if name in case.planners]
            _line(left, [(n, each.tokens_per_s / n) for n, each in points], look[name], index)
            _line(right, [(n, each.speedup) for n, each in points], look[name], index)
        left.set(ylabel="tokens per second and device")
        left.yaxis.set_major_formatter(lambda tokens, _: f"{tokens:.4g}" if tokens < 1000 else f"{tokens:,.0f}")
        right.set(ylabel=f"times as fast as {BASELINE}")
        left.set_title("\n".join(textwrap.wrap(text, 84)), fontsize=10, loc="left", parse_math=False)
    for axes in grid.flat:
        axes.set_ylim(0, 1.08 * max(y for line in axes.lines for y in line.get_ydata()))
        axes.grid(True, which="major", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="x", labelsize=9)
    _device_axis(grid[0, 0], sorted({case.num_devices for case in cases}))
    for axes in grid[-1]:
        axes.set_xlabel("devices")
    _legend(figure, grid[0, 0].lines, drawn)
    counts = [case.num_devices for case in cases]
    sentence = f"From {min(counts):,} to {max(counts):,} devices {gain_sentence(cases)}"
    set_title(figure, sentence, _common_text(cases, "num_devices"))
    return figure


def _line(axes: Axes, points: Sequence[tuple[int, float]], look: Look, index: int) -> None:
    """A planner's line. The later one is drawn the smaller its markers are, so that none hides those below."""
    axes.plot(
        [devices for devices, _ in points],
        [value for _, value in points],
        color=look.colour,
        linestyle=look.line,
        marker=look.marker,
        markersize=max(4, 10 - 1.5 * index),
        fillstyle="none",
        zorder=2 if look.line == "-" else 3,
    )


def _device_axis(axes: Axes, devices: Sequence[int]) -> None:
    """A logarithmic axis with a tick at each number of devices that stands clear of the one before it."""
    axes.set_xscale("log", base=2)
    ticks: list[int] = []
    for count in devices:
        if not ticks or count >= 1.5 * ticks[-1]:
            ticks.append(count)
    axes.set_xticks(ticks, [f"{count:,}" for count in ticks])
    axes.set_xticks([], minor=True)


def _legend(figure: Figure, handles: Sequence[Any], planners: Sequence[str]) -> None:
    """Below the panels; `handles` may go on with those of other cases."""
    figure.legend(
        handles[: len(planners)], [label(name) for name in planners], loc="outside lower center",
        ncols=min(len(planners), 3), fontsize=9, frameon=False, handlelength=3.6, handleheight=1.1,
    )  # fmt: skip


def gain_sentence(cases: Sequence[CaseFigures]) -> str:
    """How much faster the planner is that gains most over all cases, and has plans in all."""
    everywhere = [name for name in _compared(cases) if all(name in case.planners for case in cases)]
    if everywhere in ([], [BASELINE]):
        return f"no planner beside {BASELINE} has plans"
    gains = {name: [case.planners[name].speedup for case in cases] for name in everywhere}
    best = max(gains, key=lambda name: sum(gains[name]))
    low, high = (f"{gain:.2f}" for gain in (min(gains[best]), max(gains[best])))
    return f"{plain(best)} is {low if low == high else f'{low} to {high}'} times as fast as {BASELINE}"


def _common_text(cases: Sequence[CaseFigures], along: str) -> str:
    """What all cases share that no panel's title says. A profile's name may say for how many devices it was made."""
    fields = ("max_length",) if along == "num_devices" else ("profile", "num_devices")
    return _panel_text(cases[0], [name for name in fields if len({getattr(case, name) for case in cases}) == 1])
