"""What a simulation leaves in a folder: the report, its pictures, and one step's plans, ready for replay.

    report.json  report.html                 all cases
    step-17/lengths.txt  NAME.plan.json      a step of median speedup, `flexsp simulate lengths.txt --plan ...`
    step-17/trace.json  timeline.png         its timelines, for ui.perfetto.dev or chrome://tracing, and as a picture

Where there are several cases each has a folder of its own for its step.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flexsp import __version__
from flexsp import jsonfields as jf
from flexsp.lengths import LengthArray, length_text
from flexsp.plans import Plan
from flexsp.simulate import trace
from flexsp.simulate.cases import Case
from flexsp.simulate.figures import BASELINE, CaseFigures
from flexsp.simulate.page import html
from flexsp.simulate.pictures import drawing, gantt
from flexsp.simulate.runs import Done
from flexsp.simulate.timeline import Timeline, replay
from flexsp.simulate.verdict import fastest_mixed

FORMAT = "flexsp-report/1"
MOST_PLAIN_EVENTS = 20_000
"""Micro-batches of ranks: a trace of more, some 10 MB, is packed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A case, its figures, and one step to look at."""

    case: Case
    figures: CaseFigures
    step: int
    """A step of median speedup."""
    plans: Mapping[str, Plan]
    """Of that step, by planner."""

    @property
    def lengths(self) -> LengthArray:
        """(batch_size,) tokens of that step's sequences."""
        return self.case.batch(self.step)

    def timelines(self) -> dict[str, Timeline]:
        """Of that step, by planner."""
        return {name: replay(plan, self.lengths, self.case.whole) for name, plan in self.plans.items()}


def result(case: Case, figures: CaseFigures, done: Iterable[Done]) -> Result:
    """The step at which the fastest mixed planner's speedup (else the last planner's) is the median one."""
    shown = fastest_mixed(figures) or list(figures.planners.values())[-1]
    order = sorted(range(len(shown.steps)), key=lambda index: (shown.step_speedups[index], index))
    step = shown.steps[order[(len(order) - 1) // 2]].step
    plans = {one.planner: one.plan for one in done if one.step == step and one.plan is not None}
    return Result(case=case, figures=figures, step=step, plans={name: plans[name] for name in figures.planners})


def report_json(results: Sequence[Result]) -> dict[str, Any]:
    """The document of report.json: that of the case, or of all cases under `cases`."""
    head = {"format": FORMAT, "flexsp": __version__, "baseline": BASELINE}
    documents = [each.figures.to_json() for each in results]
    return {**head, **documents[0]} if len(documents) == 1 else {**head, "cases": documents}


def prepare_output(folder: Path) -> None:
    """Makes `folder` and tries it, before anything slow.

    Raises:
        ValueError: nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".flexsp"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise ValueError(f"--output={folder}: cannot be written ({error.strerror}); give a writable folder") from None


def write_output(folder: Path, results: Sequence[Result]) -> Path:
    """Writes what this module's docstring lists into `folder`; the path of report.html.

    Without matplotlib there are no pictures, and the report says so.

    Raises:
        ValueError: `folder` cannot be written.
    """
    try:
        for each in results:
            _write_step(_step_folder(folder, results, each), each)
        path = folder / "report.html"
        timelines = [each.timelines() for each in results]
        page = html.report([each.figures for each in results], timelines, _notes(folder, results))
        aside = path.with_name(".report.html.tmp")
        aside.write_text(page, encoding="utf-8")
        jf.write_object(folder / "report.json", report_json(results))
        aside.replace(path)
    except OSError as error:
        raise ValueError(f"{folder}: cannot be written ({error.strerror}); give a writable folder") from None
    return path


def _step_folder(folder: Path, results: Sequence[Result], each: Result) -> Path:
    if len(results) > 1:
        slugs = [_slug(one.case) for one in results]
        at = next(index for index, one in enumerate(results) if one is each)
        folder = folder / (slugs[at] if slugs.count(slugs[at]) == 1 else f"{slugs[at]}-{at + 1}")
    return folder / f"step-{each.step}"


def _notes(folder: Path, results: Sequence[Result]) -> list[str]:
    """Which steps the timelines are of."""
    where = ", ".join(str(_step_folder(folder, results, each).relative_to(folder)) for each in results)
    return [
        "The timelines are of a step of median speedup; its lengths, plans and traces for ui.perfetto.dev lie beside "
        f"this page: {where}."
    ]


def _slug(case: Case) -> str:
    """A folder's name: corpus, context limit and devices."""
    corpus = re.sub(r"[^A-Za-z0-9._-]+", "-", case.corpus).strip("-.") or "lengths"
    return f"{corpus}-{length_text(case.max_length)}-{case.profile.num_devices}"


def _write_step(step: Path, each: Result) -> None:
    if step.is_dir():  # of an earlier report in this folder
        for old in [*step.glob("*.plan.json"), *step.glob("trace.json*"), *step.glob("timeline.png")]:
            old.unlink()
    step.mkdir(parents=True, exist_ok=True)
    (step / "lengths.txt").write_text("".join(f"{length}\n" for length in each.lengths.tolist()), encoding="utf-8")
    names = {name: re.sub(r"[^A-Za-z0-9._-]+", "-", name) for name in each.plans}
    for number, (name, plan) in enumerate(each.plans.items(), start=1):
        unique = list(names.values()).count(names[name]) == 1
        plan.save(step / f"{names[name] if unique else f'{names[name]}-{number}'}.plan.json")
    timelines = each.timelines()
    events = sum(len(t.micro_batches) * t.num_devices for t in timelines.values())
    name = "trace.json" if events < MOST_PLAIN_EVENTS else "trace.json.gz"  # viewers open both
    trace.save(trace.chrome_traces(timelines, each.lengths), step / name)
    if drawing.can_draw():
        drawing.save(gantt.draw(timelines), step / "timeline.png")
