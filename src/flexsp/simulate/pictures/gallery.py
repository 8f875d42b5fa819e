"""All pictures of a simulation by name, each with what to say of it: for a page and for files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flexsp.simulate.figures import BASELINE, CaseFigures
from flexsp.simulate.pictures import case as pictures
from flexsp.simulate.pictures import gantt
from flexsp.simulate.pictures import sweep as pictures_sweep
from flexsp.simulate.pictures.style import case_text, fastest, plain
from flexsp.simulate.timeline import Timeline

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Picture:
    """A figure, and how to read it."""

    name: str
    """Of a file, without suffix."""
    figure: Figure
    caption: str
    """How to read it."""

    @property
    def alternative(self) -> str:
        """What to say where it cannot be seen."""
        titles = [self.figure.get_suptitle(), *(axes.get_title(loc="left") for axes in self.figure.axes)]
        return " ".join(f"{text}.".replace("\n", ", ") for text in titles if text) + f" {self.caption}"


def case_pictures(
    case: CaseFigures, timelines: Mapping[str, Timeline] | None = None, planners: Sequence[str] = ()
) -> list[Picture]:
    """The pictures of one case.

    Args:
        case: what to draw.
        timelines: one step of it by planner, or none.
        planners: names in the order that decides who looks how; by default those of the case.

    Raises:
        ValueError: matplotlib is missing.
    """
    best = fastest(case)
    found = [
        Picture(
            name="shares",
            figure=pictures.shares(case),
            caption=f"Where the time of all devices goes, relative to {BASELINE}: the shorter a bar, the faster.",
        ),
        Picture(
            name="idle",
            figure=pictures.idle(case, planners),
            caption="Time of each step, and the share of it that devices wait: further left is faster, lower is "
            "better balanced.",
        ),
        Picture(
            name="assigned",
            figure=pictures.assigned(best, case_text(case)),
            caption=f"Lengths that {best.planner} assigned to each degree, all steps together.",
        ),
    ]
    if timelines:
        named = {plain(name): timeline for name, timeline in timelines.items()}
        caption = "One step: which ranks are in a group together, when, and who waits."
        found.append(Picture(name="timeline", figure=gantt.draw(named), caption=caption))
    return found


def sweep_pictures(cases: Sequence[CaseFigures], planners: Sequence[str] = ()) -> list[Picture]:
    """The pictures of several cases together; none where there is one case.

    Raises:
        ValueError: matplotlib is missing.
    """
    found = []
    if _vary(cases, "corpus") or _vary(cases, "max_length"):
        caption = f"How many times as fast as {BASELINE} planners are, by corpus and context limit."
        found.append(Picture(name="speedup", figure=pictures_sweep.speedup(cases, planners), caption=caption))
    if _vary(cases, "num_devices"):
        caption = f"Throughput of a device, and how many times as fast as {BASELINE} planners are, by devices."
        found.append(Picture(name="scaling", figure=pictures_sweep.scaling(cases, planners), caption=caption))
    return found


def _vary(cases: Sequence[CaseFigures], field: str) -> bool:
    return len({getattr(case, field) for case in cases}) > 1
