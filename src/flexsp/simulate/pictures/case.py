"""Pictures of one case: where the time goes, who waits, and which lengths run at which degree."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flexsp.lengths import length_text
from flexsp.simulate.figures import BASELINE, CaseFigures, PlannerFigures
from flexsp.simulate.pictures import drawing
from flexsp.simulate.pictures.style import (
    WIDTH_IN,
    case_text,
    count_text,
    fastest,
    label,
    looks,
    plain,
    set_title,
    share_text,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What a device-second is spent on: the field of the figures, its name, fill and hatch. Fills differ in lightness.
PARTS: tuple[tuple[str, str, str, str], ...] = (
    ("compute_share", "compute", "#28527a", ""),
    ("exchange_share", "exchange between the devices of a group", "#e0893f", "//"),
    ("fixed_share", "fixed cost of a micro-batch", "#bccbd9", ""),
    ("idle_share", "idle: waiting for the slowest group", "#ffffff", "...."),
)
WEIGHTS = ((-0.19, "#bccbd9", "", "share of all sequences"), (0.19, "#e0893f", "//", "share of all tokens"))
"""Of the two bars of a degree: where it is in the row, fill, hatch and name."""
LEAST_LABELLED = 0.035
"""Of the width of the picture: a narrower part has no room for its figure."""


def shares(case: CaseFigures) -> Figure:
    """A bar for each planner, as long as its time relative to the baseline's, in parts by what the time is spent on.

    Raises:
        ValueError: matplotlib is missing.
    """
    figure = drawing.new_figure(WIDTH_IN, 1.9 + 0.42 * len(case.planners))
    axes = figure.subplots()
    longest = max(1 / each.speedup for each in case.planners.values())
    for row, each in enumerate(case.planners.values()):
        _stacked(axes, row, each, longest)
    names = [label(name) for name in case.planners]
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, longest * 1.17)
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_xlabel(f"device-seconds of all steps, as a share of those under {BASELINE}")
    axes.axvline(1, color="0.3", linewidth=1, linestyle=":", zorder=0)
    _bare(axes)
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False, handleheight=1.1, handlelength=2.4)
    set_title(figure, _shares_sentence(case), case_text(case))
    return figure


def _stacked(axes: Axes, row: int, planner: PlannerFigures, longest: float) -> None:
    """The parts of one planner's bar, and its length at its end."""
    whole = 1 / planner.speedup
    left = 0.0
    for field, name, fill, hatch in PARTS:
        part = getattr(planner, field) * whole
        axes.barh(
            row, part, 0.66, left, color=fill, hatch=hatch, edgecolor="0.25", linewidth=0.6,
            label=name if row == 0 else None,
        )  # fmt: skip
        if part > LEAST_LABELLED * longest:
            box = {"facecolor": fill, "edgecolor": "none", "pad": 1.2}
            ink = "white" if field == "compute_share" else "black"
            axes.text(left + part / 2, row, f"{part:.0%}", color=ink, fontsize=9, ha="center", va="center", bbox=box)
        left += part
    text = f"{whole:.0%}" if planner.planner == BASELINE else f"{whole:.0%} ({planner.speedup:.2f} x)"
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.2}  # over the line at the baseline's end
    axes.text(whole + 0.01 * longest, row, text, fontsize=9, va="center", weight="bold", bbox=box)


def _shares_sentence(case: CaseFigures) -> str:
    best, static = fastest(case), case.planners.get(BASELINE)
    whole = 1 / best.speedup
    if static is None or best is static:
        return f"{plain(best.planner)} spends {best.exchange_share:.0%} of its time in exchange"
    exchange = f"exchange goes from {static.exchange_share:.0%} to {best.exchange_share * whole:.0%} of it"
    idle = f"idle time from {static.idle_share:.0%} to {best.idle_share * whole:.0%}"
    return f"{plain(best.planner)} takes {whole:.0%} of {BASELINE}'s time: {exchange}, {idle}"


def idle(case: CaseFigures, planners: Sequence[str] = ()) -> Figure:
    """Time of a step against its idle share: a point for each step and planner, and a large one for their medians.

    Args:
        case: what to draw.
        planners: names in the order that decides who looks how; by default those of the case.

    Raises:
        ValueError: matplotlib is missing.
    """
    figure = drawing.new_figure(WIDTH_IN, 5.0)
    axes = figure.subplots()
    look = looks(planners or case.planners)
    for name, each in case.planners.items():
        style: dict[str, Any] = {"marker": look[name].marker, "linestyle": "", "color": look[name].colour}
        waits = [step.idle_share for step in each.steps]
        text = f"{label(name)}: {each.median_step_s:.3g} s, {statistics.median(waits):.1%} idle"
        axes.plot([step.step_s for step in each.steps], waits, **style, markersize=5, fillstyle="none", zorder=4)
        style |= {"markeredgecolor": "black", "markeredgewidth": 1.3, "alpha": 0.6}
        axes.plot(each.median_step_s, statistics.median(waits), **style, markersize=13, zorder=3, label=text)
    steps = [step for each in case.planners.values() for step in each.steps]
    most = max(0.01, *(step.idle_share for step in steps))
    axes.set_xlim(0, 1.05 * max(step.step_s for step in steps))
    axes.set_ylim(-0.05 * most, 1.08 * most)
    axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
    axes.set(xlabel="time of a step, seconds", ylabel="idle share of its device-seconds")
    axes.grid(True, alpha=0.3)
    title = "large: medians over the steps; small: steps"
    figure.legend(title=title, loc="outside lower center", ncols=2, fontsize=9, title_fontsize=9, markerscale=0.7)
    set_title(figure, _idle_sentence(case), case_text(case))
    return figure


def _idle_sentence(case: CaseFigures) -> str:
    best, static = fastest(case), case.planners.get(BASELINE)
    said = f"In the median a step takes {_median(best)}"
    return said if static is None or static is best else f"{said} and {_median(static)}"


def _median(planner: PlannerFigures) -> str:
    idle_share = statistics.median(step.idle_share for step in planner.steps)
    return f"{planner.median_step_s:.3g} s under {plain(planner.planner)} ({idle_share:.1%} idle)"


def assigned(planner: PlannerFigures, about: str = "") -> Figure:
    """Which lengths each degree was assigned: a row for each degree, bars by length, with their number of sequences.

    Bars are shares of the degree's sequences, all rows to one scale. On the right, what shares of all sequences and of
    all tokens the degree has.

    Args:
        planner: what to draw, all steps together.
        about: what it is about, for the second line of the title.

    Raises:
        ValueError: matplotlib is missing.

    Source: figure 5b of arXiv 2412.01523.
    """
    counts = band_counts(planner)
    figure = drawing.new_figure(WIDTH_IN, 1.9 + 0.62 * len(counts))
    left, right = figure.subplots(1, 2, width_ratios=(3.2, 1), sharey=True)
    colours = drawing.degree_colours(counts)
    most = max(max(bands.values()) / sum(bands.values()) for bands in counts.values())
    for row, (degree, bands) in enumerate(counts.items()):
        _lengths_of(left, row, bands, 0.72 / most, colours[degree])
    _length_axis(left, {band for bands in counts.values() for band in bands})
    _weights(right, planner, counts)
    left.set_yticks(range(len(counts)), [f"degree {degree}" for degree in counts])
    left.set_ylim(len(counts) - 0.6, -0.6)
    left.set_title("height: share of the degree's sequences that have the length; number: how many", fontsize=9.5)
    set_title(figure, _assigned_sentence(planner, counts), *([about] if about else []))
    return figure


def band_counts(planner: PlannerFigures) -> dict[int, dict[int, int]]:
    """Sequences of all steps by degree and length: band b has those of [2^b, 2^(b+1)) tokens."""
    counts: dict[int, dict[int, int]] = {}
    for step in planner.steps:
        for degree, bands in step.sequences_by_degree.items():
            mine = counts.setdefault(degree, {})
            for band, count in bands.items():
                mine[band] = mine.get(band, 0) + count
    return {degree: counts[degree] for degree in sorted(counts)}


def _lengths_of(axes: Axes, row: int, bands: Mapping[int, int], scale: float, colour: drawing.Colour) -> None:
    """The bars of one degree, which stand on the lower edge of its row."""
    foot, whole = row + 0.4, sum(bands.values())
    axes.axhline(foot, color="0.75", linewidth=0.8, zorder=0)
    for band, count in bands.items():
        height = scale * count / whole
        axes.bar(band + 0.5, -height, 0.92, foot, color=colour, edgecolor="0.2", linewidth=0.5)
        axes.text(band + 0.5, foot - height - 0.03, count_text(count), fontsize=7.5, ha="center", va="bottom")


def _length_axis(axes: Axes, bands: Collection[int]) -> None:
    """An axis of powers of two with a tick at each, and a name at every other where there are many."""
    first, last = min(bands), max(bands) + 1
    named = range(first, last + 1, 1 if last - first <= 12 else 2)
    axes.set_xticks(named, [length_text(2**band) for band in named])
    axes.set_xticks(range(first, last + 1), minor=True)
    axes.set(xlim=(first - 0.1, last + 0.1), xlabel="length of a sequence, tokens (K = 1024)")
    _bare(axes)


def _weights(axes: Axes, planner: PlannerFigures, counts: Mapping[int, Mapping[int, int]]) -> None:
    """Shares of all sequences and of all tokens, by degree."""
    whole = sum(sum(bands.values()) for bands in counts.values())
    for row, (degree, bands) in enumerate(counts.items()):
        weights = (sum(bands.values()) / whole, planner.tokens_by_degree[degree])
        for weight, (y, fill, hatch, name) in zip(weights, WEIGHTS, strict=True):
            axes.barh(
                row + y, weight, 0.34, color=fill, hatch=hatch, edgecolor="0.25", linewidth=0.6,
                label=name if row == 0 else None,
            )  # fmt: skip
            axes.text(weight + 0.02, row + y, share_text(weight), fontsize=8, va="center")
    axes.set(xlim=(0, 1.3), xticks=[])
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 0), ncols=1, fontsize=9, frameon=False)
    axes.tick_params(left=False)
    _bare(axes)
    axes.spines["bottom"].set_visible(False)


def _assigned_sentence(planner: PlannerFigures, counts: Mapping[int, Mapping[int, int]]) -> str:
    whole = sum(sum(bands.values()) for bands in counts.values())
    lowest, highest = min(counts), max(counts)
    ends = [(sum(counts[d].values()) / whole, planner.tokens_by_degree[d]) for d in (lowest, highest)]
    name = plain(planner.planner)
    if lowest == highest:
        return f"{name} ran all sequences at degree {lowest}"
    (short, short_tokens), (long, long_tokens) = [tuple(map(share_text, end)) for end in ends]
    return (
        f"{name} ran {short} of the sequences ({short_tokens} of the tokens) at degree {lowest}, "
        f"{long} ({long_tokens}) at degree {highest}"
    )


def _bare(axes: Axes) -> None:
    """No frame above and on the right."""
    axes.spines[["top", "right"]].set_visible(False)
