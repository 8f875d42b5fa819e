"""A simulation as one page of HTML that needs nothing else: no network, no script, no font, no file beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from itertools import zip_longest

from flexsp import __version__
from flexsp.simulate.figures import BASELINE, CaseFigures
from flexsp.simulate.page import tables
from flexsp.simulate.page.tags import Markup, joined, tag
from flexsp.simulate.pictures import drawing
from flexsp.simulate.pictures.gallery import Picture, case_pictures, sweep_pictures
from flexsp.simulate.pictures.style import all_planners, case_text, plain
from flexsp.simulate.pictures.sweep import gain_sentence
from flexsp.simulate.timeline import Timeline

HEADING = "What mixed sequence-parallel degrees gain"
NO_PICTURES = "This page has no pictures: they need matplotlib, pip install 'flexsp[plot]'."
HOW = (
    "Times of steps come from the profile's cost model; none was measured in training. A micro-batch takes a fixed "
    "cost (fixed_s) and then as long as its slowest group; a step takes the sum of its micro-batches. The optimizer's "
    "own time is apart. Planning times were measured where the simulation ran.",
    "All planners planned the same global batches. The peak memory is what the profile says that the fullest device "
    "holds. A process group is counted once, however often it is used.",
)

Timelines = Mapping[str, Timeline]


def report(cases: Sequence[CaseFigures], timelines: Sequence[Timelines] = (), notes: Sequence[str] = ()) -> str:
    """The page of `cases`: what the figures mean, tables, pictures; with several cases an overview first.

    Without matplotlib there are no pictures, and a line says so.

    Args:
        cases: figures of at least one case.
        timelines: for each case one step to draw, by planner; may end early.
        notes: paragraphs for the end, such as where a trace was written to.

    Raises:
        ValueError: there is no case.
    """
    if not cases:
        raise ValueError("cases=[] is empty; give the figures of at least one case")
    corpora = ", ".join(dict.fromkeys(plain(case.corpus) for case in cases))
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", f"flexsp simulate: {corpora}"),
        tag("style", Markup(files("flexsp.simulate.page").joinpath("report.css").read_text(encoding="utf-8"))),
    )
    body = tag("body", tag("h1", HEADING), *_body(cases, timelines), _footer(notes))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _body(cases: Sequence[CaseFigures], timelines: Sequence[Timelines]) -> Iterator[Markup]:
    drawn = drawing.can_draw()
    planners = all_planners(cases)
    if not drawn:
        yield tag("p", NO_PICTURES, class_="about")
    if len(cases) > 1:
        yield tag("p", f"{gain_sentence(cases)} in {len(cases)} cases.", class_="verdict")
        yield tables.overview(cases)
        if drawn:
            yield joined(map(_picture, sweep_pictures(cases, planners)))
    for index, (case, step) in enumerate(zip_longest(cases, timelines[: len(cases)]), 1):
        pictures = case_pictures(case, step, planners) if drawn else []
        yield tag("section", *_case(case, pictures), id=f"case-{index}")


def _case(case: CaseFigures, pictures: Sequence[Picture]) -> Iterator[Markup]:
    yield tag("h2", case_text(case))
    yield tag("p", _about(case), class_="about")
    yield tag("ul", *(tag("li", sentence) for sentence in case.sentences), class_="verdict")
    yield tables.planners(case)
    yield joined(map(_picture, pictures))
    yield tag("details", tag("summary", "Every step under every planner"), tables.steps(case))


def _about(case: CaseFigures) -> str:
    """What was simulated, in a line."""
    iterations = max(len(each.steps) for each in case.planners.values())
    steps = f"{iterations} step{'' if iterations == 1 else 's'} of {case.batch_size:,} sequences"
    order = "" if case.seed is None else f", seed {case.seed}"
    return (
        f"{steps}{order}; {case.devices_per_node} devices a node; profile: {case.profile}; {BASELINE}: all groups of "
        f"degree {case.static_sp_degree}, which holds the context limit."
    )


def _picture(picture: Picture) -> Markup:
    image = tag("img", src=drawing.as_data_uri(picture.figure), alt=picture.alternative)
    return tag("figure", image, tag("figcaption", picture.caption))


def _footer(notes: Sequence[str]) -> Markup:
    return tag(
        "footer",
        tag("h2", "How the figures come about"),
        *(tag("p", text) for text in (*HOW, *notes)),
        tag("p", f"Made by flexsp {__version__}."),
    )
