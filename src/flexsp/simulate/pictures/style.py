"""What the pictures of a simulation share: how a planner looks, what a case is called, how titles are set."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexsp.lengths import length_text
from flexsp.simulate.figures import BASELINE, CaseFigures, PlannerFigures
from flexsp.simulate.pictures import drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH_IN = 9.0
"""Of every picture: 10 point letters stay legible where a page of paper makes it 7 inches."""

# No two of 20 planners share line and marker, nor two of 6 a hatch: a grey print can be read.
LINES = ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)))
MARKERS = ("o", "s", "^", "D", "v")
HATCHES = ("", "///", "", "xxx", "", "...")

Line = str | tuple[int, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """How a planner is drawn."""

    colour: drawing.Colour
    line: Line
    marker: str
    hatch: str


def looks(planners: Iterable[str]) -> dict[str, Look]:
    """A look for each planner, by their order; the baseline's is the same in every picture."""
    names = list(dict.fromkeys(planners))
    others = [name for name in names if name != BASELINE]
    colours = drawing.degree_colours(range(len(others)))
    found = {
        name: Look(
            colour=colours[i],
            line=LINES[i % len(LINES)],
            marker=MARKERS[i % len(MARKERS)],
            hatch=HATCHES[i % len(HATCHES)],
        )
        for i, name in enumerate(others)
    }
    if BASELINE in names:
        found[BASELINE] = Look(colour=(0.4, 0.4, 0.4, 1.0), line=":", marker="X", hatch="---")
    return {name: found[name] for name in names}


def all_planners(cases: Sequence[CaseFigures]) -> list[str]:
    """Names of the planners of all cases, refused ones too, each once, in the order in which they first appear."""
    return list(dict.fromkeys(name for case in cases for name in [*case.planners, *case.refused]))


def fastest(case: CaseFigures) -> PlannerFigures:
    """The fastest planner that is not the baseline; the baseline where there is no other."""
    others = [figures for name, figures in case.planners.items() if name != BASELINE]
    return max(others or case.planners.values(), key=lambda figures: figures.speedup)


def case_text(case: CaseFigures) -> str:
    """E.g. `wikipedia, up to 192K tokens, 64 devices`."""
    devices = "device" if case.num_devices == 1 else "devices"
    return f"{plain(case.corpus)}, up to {length_text(case.max_length)} tokens, {case.num_devices:,} {devices}"


def plain(text: str) -> str:
    """`text` on one line, free of the halves of characters that an undecodable file name has."""
    return " ".join(text.encode("utf-8", "replace").decode().split())


def label(text: str) -> str:
    """`text` as it is in a legend or at a tick, where dollar signs would be a formula and a leading _ would hide it."""
    escaped = plain(text).replace("$", r"\$")
    return f" {escaped}" if escaped.startswith("_") else escaped


def set_title(figure: Figure, sentence: str, *contexts: str) -> None:
    """A sentence that says what the picture shows, and below it what it is about."""
    wrapped = [line for text in (sentence, *contexts) for line in textwrap.wrap(text, 92)]
    figure.suptitle("\n".join(wrapped), fontsize=11.5, parse_math=False)


def count_text(count: int) -> str:
    """At most seven characters: 12,345 or 1.2 M."""
    return f"{count:,}" if count < 100_000 else f"{count / 1e6:.1f} M"


def share_text(share: float) -> str:
    """E.g. 23% or, where a digit after the point matters, 0.2%."""
    return f"{share:.1%}" if 0 < share < 0.1 else f"{share:.0%}"
