"""A step as a picture: ranks down, time across, one panel for each plan.

A group is a block over its ranks: compute in the colour of its degree, then its exchange as a dark end. A micro-batch
begins with its fixed cost, a light band over all ranks; idle ranks are hatched.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, groupby, pairwise
from typing import TYPE_CHECKING, Any

from flexsp.simulate.pictures import drawing
from flexsp.simulate.timeline import MicroBatchSpan, Span, Timeline

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_IN = 12.0
AXES_WIDTH_IN = 11.0
"""About what the labels leave of it; decides where there is room for a number."""
MOST_HEIGHT_IN = 24.0
"""Of all panels together, unless there are so many that each would be below a readable height."""
FONT_POINTS = 8.0
MOST_NAME = 60
"""Characters of a plan's name in its title."""
MOST_TICKS = 12
MOST_NODE_LINES = 32
"""More nodes than that are marked at the edge of the panel alone: lines across it would hide the groups."""

FIXED = "0.87"
BORDER = "black"
IDLE: dict[str, Any] = {"facecolor": "white", "edgecolor": "0.6", "hatch": "////", "linewidth": 0.0}
EXCHANGE_SHADE = 0.45
"""What is left of a colour's lightness in its exchange."""


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle of the picture: ranks [top, bottom) from `begin_s` on."""

    top: int
    bottom: int
    begin_s: float
    seconds: float

    @property
    def corners(self) -> list[tuple[float, float]]:
        """Seconds and ranks."""
        begin_s, end_s = self.begin_s, self.begin_s + self.seconds
        return [(begin_s, self.top), (end_s, self.top), (end_s, self.bottom), (begin_s, self.bottom)]


@dataclass(frozen=True, slots=True)
class Scale:
    """How large a panel is drawn."""

    inches_per_s: float
    inches_per_rank: float

    def has_room(self, text: str, seconds: float, ranks: int) -> bool:
        """Whether a block of `seconds` and `ranks` can hold `text`."""
        wide_in, high_in = (len(text) * 0.62 + 0.3) * FONT_POINTS / 72, 1.3 * FONT_POINTS / 72
        return seconds * self.inches_per_s >= wide_in and ranks * self.inches_per_rank >= high_in


def draw(timelines: Mapping[str, Timeline]) -> Figure:
    """One panel for each timeline, by name, from top to bottom, on one axis of time.

    Raises:
        ValueError: there is no timeline, or matplotlib is missing.
    """
    if not timelines:
        raise ValueError(f"timelines={dict(timelines)} is empty; give at least one timeline to draw")
    heights = [_height_in(timeline, len(timelines)) for timeline in timelines.values()]
    figure = drawing.new_figure(WIDTH_IN, sum(heights) + 0.45 * len(heights) + 1.1)
    panels = figure.subplots(len(timelines), 1, sharex=True, squeeze=False, gridspec_kw={"height_ratios": heights})
    colours = drawing.degree_colours(span.sp_degree for timeline in timelines.values() for span in timeline.spans)
    longest_s = max(timeline.step_s for timeline in timelines.values()) or 1.0
    for axes, height_in, (name, timeline) in zip(panels[:, 0], heights, timelines.items(), strict=True):
        scale = Scale(AXES_WIDTH_IN / longest_s, height_in / timeline.num_devices)
        _draw_blocks(axes, timeline, colours, scale)
        _draw_borders(axes, timeline)
        _draw_degrees(axes, timeline, colours, scale)
        _set_axes(axes, timeline)
        axes.set_title(_title(name, timeline), loc="left", fontsize=11, parse_math=False)
    panels[-1, 0].set(xlim=(0, longest_s * 1.005), xlabel="time since the step began, seconds")
    _add_legends(figure, list(timelines.values()), colours)
    return figure


def boxes(timeline: Timeline) -> dict[str, list[Box]]:
    """All that is drawn of a timeline: `fixed`, `compute`, `exchange` and `idle`, which together cover the step.

    `compute` has one box for each span of the timeline, in its order; what takes no time has no box among the others.
    """
    found: dict[str, list[Box]] = {"fixed": [], "compute": [], "exchange": [], "idle": []}
    for micro_batch in timeline.micro_batches:
        found["fixed"].append(Box(0, timeline.num_devices, micro_batch.begin_s, micro_batch.fixed_s))
        groups_begin_s = micro_batch.begin_s + micro_batch.fixed_s
        for span in micro_batch.groups:
            top, bottom = span.ranks[0], span.ranks[-1] + 1
            found["compute"].append(Box(top, bottom, span.begin_s, span.compute_s))
            found["exchange"].append(Box(top, bottom, span.begin_s + span.compute_s, span.exchange_s))
            found["idle"].append(Box(top, bottom, span.end_s, span.idle_s))
        for top, bottom in _runs(micro_batch.idle_ranks):
            found["idle"].append(Box(top, bottom, groups_begin_s, micro_batch.slowest_s))
    return {kind: [box for box in some if kind == "compute" or box.seconds > 0] for kind, some in found.items()}


def _height_in(timeline: Timeline, panels: int) -> float:
    """Enough for a number beside each of 16 ranks; more ranks are thinner."""
    return min(0.9 + 0.2 * timeline.num_devices, max(1.6, min(3.4, MOST_HEIGHT_IN / panels)))


def _title(name: str, timeline: Timeline) -> str:
    name = " ".join(name.split())
    name = name if len(name) <= MOST_NAME else f"{name[: MOST_NAME - 3]}..."
    shares = timeline.shares()
    micro_batches = len(timeline.micro_batches)
    return (
        f"{name}: step {timeline.step_s:.3g} s, idle {shares.idle:.1%}, "
        f"exchange {shares.exchange:.1%}, {micro_batches} micro-batch{'' if micro_batches == 1 else 'es'}"
    )


def _draw_blocks(axes: Axes, timeline: Timeline, colours: Mapping[int, drawing.Colour], scale: Scale) -> None:
    """Collections, since a step of 1,024 ranks has thousands of blocks."""
    from matplotlib.collections import PathCollection, PolyCollection
    from matplotlib.path import Path

    found = boxes(timeline)
    plain = [colours[span.sp_degree] for span in timeline.spans]
    dark = [shaded(colours[span.sp_degree]) for span in timeline.spans if span.exchange_s > 0]
    # An outline must stay thinner than a rank and a micro-batch, or of many nothing but outlines would be seen.
    micro_batch_in = timeline.step_s / len(timeline.micro_batches) * scale.inches_per_s
    width_points = 72 * min(0.12 * scale.inches_per_rank, 0.02 * micro_batch_in)
    outline = {"edgecolors": "white", "linewidths": min(0.8, width_points)}
    if found["idle"]:
        # Hatching goes by path, and is slow: all idle time is one.
        whole = Path.make_compound_path(*(Path([*box.corners, box.corners[0]], closed=True) for box in found["idle"]))
        axes.add_collection(PathCollection([whole], label="idle", **IDLE), autolim=False)
    styles: dict[str, dict[str, Any]] = {
        "fixed": {"facecolors": FIXED, "linewidths": 0.0},
        "compute": {"facecolors": plain, **outline},
        "exchange": {"facecolors": dark, **outline},
    }
    for kind, style in styles.items():
        if found[kind]:
            axes.add_collection(
                PolyCollection([box.corners for box in found[kind]], label=kind, **style), autolim=False
            )


def shaded(colour: drawing.Colour) -> drawing.Colour:
    """The colour of the exchange of groups of a degree that has `colour`."""
    red, green, blue, opacity = colour
    return (red * EXCHANGE_SHADE, green * EXCHANGE_SHADE, blue * EXCHANGE_SHADE, opacity)


def _draw_degrees(axes: Axes, timeline: Timeline, colours: Mapping[int, drawing.Colour], scale: Scale) -> None:
    """Writes degrees into the blocks, on a ground of their colour where a node's border runs through."""
    for blocks in _labelled(timeline, scale):
        degree = blocks[0].sp_degree
        text = axes.text(
            blocks[0].begin_s + min(span.compute_s for span in blocks) / 2,
            (blocks[0].ranks[0] + blocks[-1].ranks[-1] + 1) / 2,
            _degree_text(blocks),
            color=_readable_on(colours[degree]), fontsize=FONT_POINTS, ha="center", va="center", clip_on=True,
            bbox={"facecolor": colours[degree], "edgecolor": "none", "pad": 0.6},
        )  # fmt: skip
        text.set_in_layout(False)  # it lies inside the panel, and hundreds of them would only slow its layout


def _labelled(timeline: Timeline, scale: Scale) -> Iterator[list[Span]]:
    """The blocks that have room for their degree: each alone, or neighbours that have it only together."""
    for micro_batch in timeline.micro_batches:
        for some in _neighbours(micro_batch):
            alone = [[span] for span in some]
            roomy = all(scale.has_room(_degree_text([span]), span.compute_s, span.sp_degree) for span in some)
            for blocks in alone if roomy else [some]:
                ranks = blocks[-1].ranks[-1] + 1 - blocks[0].ranks[0]
                if scale.has_room(_degree_text(blocks), min(span.compute_s for span in blocks), ranks):
                    yield blocks


def _degree_text(blocks: Sequence[Span]) -> str:
    """As in a plan's layout: eight groups of 4 are `4x8`."""
    return f"{blocks[0].sp_degree}" if len(blocks) == 1 else f"{blocks[0].sp_degree}x{len(blocks)}"


def _neighbours(micro_batch: MicroBatchSpan) -> Iterator[list[Span]]:
    """Groups of one degree that lie on each other, from the first rank down."""
    ordered = sorted(micro_batch.groups, key=lambda span: span.ranks[0])
    some = ordered[:1]
    for above, below in pairwise(ordered):
        if (below.sp_degree, below.ranks[0]) != (above.sp_degree, above.ranks[-1] + 1):
            yield some
            some = []
        some.append(below)
    yield some


def _readable_on(colour: drawing.Colour) -> str:
    red, green, blue, _ = colour
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.55 else "black"


def _draw_borders(axes: Axes, timeline: Timeline) -> None:
    """Lines between nodes and micro-batches, and where the step ends."""
    nodes = _node_lines(timeline)
    if nodes:
        # White under black is seen on the dark and on the light.
        axes.hlines(nodes, 0, timeline.step_s, color="white", linewidth=1.3)
        axes.hlines(nodes, 0, timeline.step_s, color=BORDER, linewidth=0.6, label="nodes")
    begins = [micro_batch.begin_s for micro_batch in timeline.micro_batches[1:]]
    axes.vlines(begins, 0, timeline.num_devices, color=BORDER, linewidth=0.5, label="micro-batches")
    axes.vlines([timeline.step_s], 0, timeline.num_devices, color=BORDER, linewidth=2.0, label="end")


def _node_lines(timeline: Timeline) -> range:
    """First ranks of all nodes but the first; none where they are too many for lines."""
    nodes = range(timeline.devices_per_node, timeline.num_devices, timeline.devices_per_node)
    return nodes if len(nodes) < MOST_NODE_LINES else nodes[:0]


def _set_axes(axes: Axes, timeline: Timeline) -> None:
    """Ranks from 0 at the top, the first of each node marked."""
    ranks, per_node = timeline.num_devices, timeline.devices_per_node
    step = next(step for step in rank_steps(timeline) if len(range(0, ranks, step)) <= MOST_TICKS)
    ticks = range(0, ranks, step)
    # Where each rank has a tick it stands at the middle of the rank, else at its upper edge, where a node begins.
    axes.set_yticks([tick + 0.5 if step == 1 else tick for tick in ticks], [str(tick) for tick in ticks])
    axes.set_yticks(range(0, ranks + 1, per_node), minor=True)
    axes.tick_params(axis="y", which="minor", length=2)
    axes.tick_params(axis="x", labelbottom=True)
    axes.set(ylim=(ranks, 0), ylabel=f"rank ({per_node} a node)" if per_node < ranks else "rank")
    axes.spines[["top", "right"]].set_visible(False)


def rank_steps(timeline: Timeline) -> Iterator[int]:
    """1, 2, 4, ... ranks: ascending numbers of adjacent ranks that divide a node, or are whole nodes."""
    per_node = timeline.devices_per_node
    yield from (step for step in range(1, per_node) if per_node % step == 0)
    yield from (per_node * 2**doublings for doublings in count())


def _add_legends(figure: Figure, timelines: Sequence[Timeline], colours: Mapping[int, drawing.Colour]) -> None:
    """Degrees on the left, all else on the right."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    middle = list(colours.values())[len(colours) // 2]
    keys = [
        Patch(facecolor=shaded(middle), label="exchange: dark end of a group"),
        Patch(facecolor=FIXED, label="fixed cost of a micro-batch"),
        Patch(label="idle", **IDLE),
        Line2D([], [], color=BORDER, linewidth=2.0, label="end of the step"),
    ]
    if any(_node_lines(timeline) for timeline in timelines):
        keys.append(Line2D([], [], color=BORDER, linewidth=0.6, label="border of a node"))
    degrees = [Patch(facecolor=colour, label=str(degree)) for degree, colour in colours.items()]
    style: dict[str, Any] = {"fontsize": 9, "handlelength": 1.4, "columnspacing": 1.2}
    title = "sp_degree: ranks of a group; 4x8: eight groups of 4"
    columns = math.ceil(len(degrees) / math.ceil(len(degrees) / 10))
    figure.legend(handles=degrees, title=title, title_fontsize=9, loc="outside lower left", ncols=columns, **style)
    figure.legend(handles=keys, loc="outside lower right", ncols=3, **style)


def _runs(ranks: Sequence[int]) -> Iterator[tuple[int, int]]:
    """[begin, end) of each run of consecutive ones among ascending `ranks`."""
    for _, run in groupby(enumerate(ranks), key=lambda place: place[1] - place[0]):
        found = [rank for _, rank in run]
        yield found[0], found[-1] + 1
