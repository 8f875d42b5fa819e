"""A profile as a picture: what a token costs by length and degree, how much of it is exchange, what degrees hold."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flexsp.lengths import length_text
from flexsp.profile import Profile
from flexsp.simulate.crossovers import Cost, Crossover, cost, crossovers, longest_tokens, policies, powers_of_four
from flexsp.simulate.pictures import drawing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# A degree has one colour, line and marker in both panels. Lines and markers differ too, so that a grey print can be
# read; their cycles have no common divisor, so no two of 36 degrees share both.
LINES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")

POINTS = 160
"""Lengths on a line, evenly spaced on a logarithmic axis."""


def save_figure(profile: Profile, path: str | Path) -> None:
    """Draws `profile` into a PNG, SVG or PDF file, as the suffix of `path` says.

    Raises:
        ValueError: another suffix, no matplotlib, nothing to draw, or `path` cannot be written.
    """
    drawing.check_suffix(path)
    drawing.save(draw(profile), path)


def draw(profile: Profile) -> Figure:
    """Time a token and the share of the exchange over the length of one sequence alone; on the right, tokens held.

    A line ends where memory ends. Where a policy holds more, it goes on as a thin line under the one that holds most.
    Lines are the formula's; where a degree has a measured table, crosses are what that says.

    Raises:
        ValueError: matplotlib is missing, or no degree holds a sequence of 2 tokens.
    """
    figure = drawing.new_figure(16.5, 6)
    from matplotlib.lines import Line2D

    if longest_tokens(profile) < 2:
        raise ValueError(f"{profile.name}: memory holds no sequence of 2 tokens; there is no line to draw")
    *panels, capacity = figure.subplots(1, 3, width_ratios=[5, 5, 4])
    plain = crossovers(profile)
    lengths = _lengths(profile, plain)
    widest = policies(profile)[-1]
    grey: dict[str, Any] = {"color": "0.3", "markeredgewidth": 2, "fillstyle": "none"}
    keys = {"ends": Line2D([], [], ls="", marker="|", markersize=14, label="the longest that the degree holds", **grey)}
    degrees = []
    colours = drawing.degree_colours(profile.sp_degrees)
    for index, found in enumerate(plain):
        style = _style(index, colours[found.sp_degree])
        degrees.append(Line2D([], [], label=profile.degree_text(found.sp_degree), **style))
        held = _costs(profile, found.sp_degree, lengths, None)
        beyond = [c for c in _costs(profile, found.sp_degree, lengths, widest) if c.tokens > found.capacity_tokens]
        for axes, value in zip(panels, ("token_s", "exchange_share"), strict=True):
            # Markers of neighbours stand apart, so that lines that lie on each other show all of theirs.
            _line(axes, held, value, {**style, "markevery": (3 * index % 20, 20)})
            _line(axes, beyond, value, {**style, "linewidth": 0.8, "marker": None})
        first = found.pays_from_tokens
        if first is not None and first > 1 and (pays := cost(profile, found.sp_degree, first)) is not None:
            panels[0].plot(first, pays.token_s, "o", **{**grey, "color": style["color"]}, markersize=14, zorder=5)
            label = "from here on sooner than every lower degree"
            keys["pays"] = Line2D([], [], ls="", marker="o", markersize=13, label=label, **grey)
        if (table := profile.tables.get(found.sp_degree)) is not None:
            measured: dict[str, Any] = {"ls": "", "marker": "x", "markersize": 9, "markeredgewidth": 2}
            panels[0].plot(table.lengths, table.seconds_per_token, color=style["color"], zorder=6, **measured)
            keys["table"] = Line2D([], [], color="0.3", label="measured table, of rows full of such", **measured)
        if beyond:
            label = f"thin: under {_plain(widest or '')}"
            keys["thin"] = Line2D([], [], color="0.3", linewidth=0.8, label=label)
    panels[0].set(ylabel="time a token", title="Time of one sequence alone in its group")
    _time_axis(panels[0])
    panels[1].set(ylabel="share of the group's time", title="Share of the exchange", ylim=(-0.02, 1.02))
    panels[1].yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    for axes in panels:
        _length_axis(axes, lengths)
    _draw_capacity(capacity, profile)
    columns = min(len(degrees), 7)
    figure.legend(handles=degrees, title="sp_degree", loc="outside lower left", ncols=columns, handlelength=3.2)
    figure.legend(handles=list(keys.values()), loc="outside lower right")
    source = profile.provenance.get("source", "source not stated")
    title = f"{' '.join(profile.name.split())} ({source})"
    figure.suptitle("\n".join(textwrap.wrap(title, 110)), parse_math=False)
    return figure


def _draw_capacity(axes: Axes, profile: Profile) -> None:
    """Tokens that each degree holds, a line for each policy."""
    names = [profile.degree_text(degree) for degree in profile.sp_degrees]
    drawn: set[int] = set()
    for index, policy in enumerate(reversed(policies(profile))):  # the one that holds most first, as it is the highest
        held = [(at, profile.capacity_tokens(degree, policy)) for at, degree in enumerate(profile.sp_degrees)]
        some = [(at, tokens) for at, tokens in held if tokens]  # a logarithmic axis has no 0
        style = _style(index, str(0.7 * index / max(1, len(profile.memory.policies))))
        axes.plot([at for at, _ in some], [tokens for _, tokens in some], **style, label=_plain(policy or "no policy"))
        drawn |= {tokens for _, tokens in some}
    axes.set_yscale("log", base=4)
    ticks = [4**exponent for exponent in range(32) if min(drawn) <= 4**exponent <= max(drawn)] or sorted(drawn)
    axes.set_yticks(ticks, [length_text(tokens) for tokens in ticks])
    axes.set_yticks([], minor=True)
    step = -(-len(names) // 8)  # so many have room side by side
    axes.set_xticks(range(0, len(names), step), [name.replace(" ", "\n") for name in names[::step]])
    axes.set(xlabel="sp_degree", ylabel="tokens (K = 1024)", title="Tokens that a degree holds")
    axes.grid(True, which="major", alpha=0.3)
    axes.legend(title="policy")


def _lengths(profile: Profile, plain: Sequence[Crossover]) -> list[int]:
    """The lengths of all lines, ascending: evenly spaced, and the last of each degree and policy."""
    longest = longest_tokens(profile)
    crossing = [first for found in plain if (first := found.pays_from_tokens) is not None and first > 1]
    shortest = min(powers_of_four(profile)[0], *crossing, longest // 16) if longest >= 16 else 1
    begin = max(4**exponent for exponent in range(20) if 4**exponent <= max(1, shortest))
    lasts = {profile.capacity_tokens(degree, policy) for degree in profile.sp_degrees for policy in policies(profile)}
    spaced = {int(tokens) for tokens in np.geomspace(begin, longest, POINTS)}
    return sorted(tokens for tokens in spaced | lasts if begin <= tokens <= longest)


def _costs(profile: Profile, degree: int, lengths: Sequence[int], policy: str | None) -> list[Cost]:
    return [each for tokens in lengths if (each := cost(profile, degree, tokens, policy)) is not None]


def _line(axes: Axes, costs: Sequence[Cost], value: str, style: dict[str, Any]) -> None:
    """The line through `costs`, and a bar across its end."""
    tokens, values = [each.tokens for each in costs], [attrgetter(value)(each) for each in costs]
    axes.plot(tokens, values, **style)
    axes.plot(tokens[-1:], values[-1:], "|", color=style["color"], markersize=14, markeredgewidth=2)


def _style(index: int, colour: drawing.Colour | str) -> dict[str, Any]:
    return {
        "color": colour, "linestyle": LINES[index % len(LINES)], "marker": MARKERS[index % len(MARKERS)],
        "markersize": 6, "linewidth": 1.7,
    }  # fmt: skip


def _length_axis(axes: Axes, lengths: Sequence[int]) -> None:
    """A logarithmic axis of lengths with a tick at each power of four."""
    axes.set_xscale("log", base=4)
    ticks = [4**exponent for exponent in range(30) if lengths[0] <= 4**exponent <= lengths[-1]]
    axes.set_xticks(ticks, [length_text(tokens) for tokens in ticks])
    axes.set_xticks([], minor=True)
    axes.tick_params(axis="x", labelsize=9)
    axes.set_xlabel("length of the sequence, tokens (K = 1024)")
    axes.grid(True, which="major", alpha=0.3)


def _time_axis(axes: Axes) -> None:
    """A logarithmic axis of seconds with ticks such as 20 us, or a plain one where nothing takes time."""
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

    seconds = [s for line in axes.lines for s in np.asarray(line.get_ydata(), dtype=float) if s > 0]
    if not seconds:
        return
    axes.set_yscale("log")
    within = (1.0, 2.0, 5.0) if max(seconds) < 300 * min(seconds) else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=within, numticks=20))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(EngFormatter(unit="s"))


def _plain(text: str) -> str:
    """`text` as it is in a label, where a pair of dollar signs would be a formula."""
    return text.replace("$", r"\$")
