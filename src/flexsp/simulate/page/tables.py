"""The tables of a report: all cases, the planners of one, and its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from flexsp.lengths import length_text
from flexsp.simulate.figures import BASELINE, CaseFigures, PlannerFigures, StepFigures
from flexsp.simulate.page.tags import Markup, table, tag
from flexsp.simulate.pictures.style import all_planners, share_text

GIB = 2**30


def overview(cases: Sequence[CaseFigures]) -> Markup:
    """A row for each case: how many times as fast as the baseline each planner is, and tokens per second and device."""
    names = all_planners(cases)
    others = [name for name in names if name != BASELINE]

    def rows(shown: Sequence[str], value: Callable[[CaseFigures, PlannerFigures], str]) -> Iterator[list[str]]:
        for index, case in enumerate(cases, 1):
            yield [
                tag("a", case.corpus, href=f"#case-{index}"),
                length_text(case.max_length),
                f"{case.num_devices:,}",
                str(case.static_sp_degree),
                *(value(case, case.planners[name]) if name in case.planners else "no plan" for name in shown),
            ]

    head = ["corpus", "context limit", "devices", f"{BASELINE} degree"]
    faster = rows(others, lambda _, each: f"{each.speedup:.2f}")
    tokens = rows(names, lambda case, each: tokens_text(each.tokens_per_s / case.num_devices))
    return Markup(
        table([*head, *others], faster, f"How many times as fast as {BASELINE}")
        + table([*head, *names], tokens, "Tokens per second and device")
    )


def planners(case: CaseFigures) -> Markup:
    """A row for each planner of a case, those that had no plan with the reason."""
    head = [
        "planner", "step, median", f"times as fast as {BASELINE}", "planning, median", "exchange", "idle",
        "micro-batches a step", "peak memory of a device", "process groups", "tokens by degree",
    ]  # fmt: skip
    rows = [[name, *_planner_cells(each)] for name, each in case.planners.items()]
    refused = [[name, f"no plan: {reason}"] for name, reason in case.refused.items()]
    room = f"{case.memory_bytes / GIB:.1f} GiB"
    caption = f"All steps under each planner. A device has {room}; exchange and idle are shares of device-seconds."
    return table(head, [*rows, *refused], caption, words=(0, len(head) - 1))


def _planner_cells(each: PlannerFigures) -> list[str]:
    degrees = [f"{degree}:\N{NO-BREAK SPACE}{share_text(share)}" for degree, share in each.tokens_by_degree.items()]
    return [
        f"{each.median_step_s:.3g} s",
        f"{each.speedup:.2f}",
        duration_text(each.median_solve_s),
        share_text(each.exchange_share),
        share_text(each.idle_share),
        f"{each.micro_batches:.3g}",
        f"{each.peak_memory_bytes / GIB:.1f} GiB",
        f"{each.process_groups:,}",
        ", ".join(degrees),
    ]


def steps(case: CaseFigures) -> Markup:
    """A row for each step and planner."""
    head = [
        "step", "sequences", "tokens", "planner", "time", f"times as fast as {BASELINE}", "above the lower bound",
        "planning", "exchange", "idle", "peak memory", "degrees by micro-batch",
    ]  # fmt: skip
    count = max(len(each.steps) for each in case.planners.values())
    rows = (
        _step_cells(name, each.steps[index], each.step_speedups[index])
        for index in range(count)
        for name, each in case.planners.items()
    )
    caption = "Each step under each planner; no plan for its batch takes less than the lower bound."
    return table(head, rows, caption, words=(3, len(head) - 1))


def _step_cells(planner: str, step: StepFigures, speedup: float) -> list[str]:
    return [
        str(step.step),
        f"{step.sequences:,}",
        f"{step.tokens:,}",
        planner,
        f"{step.step_s:.3g} s",
        f"{speedup:.2f}",
        f"{step.step_s / step.lower_bound_s - 1:.1%}" if step.lower_bound_s else "-",
        duration_text(step.solve_s),
        share_text(step.exchange_share),
        share_text(step.idle_share),
        f"{step.peak_memory_bytes / GIB:.1f} GiB",
        step.layout,
    ]


def duration_text(seconds: float | None) -> str:
    """E.g. 31 ms; a dash where there is none."""
    if seconds is None:
        return "-"
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:,.0f} {unit}" if seconds >= 100 * size else f"{seconds / size:.3g} {unit}"
    return "0 s"


def tokens_text(tokens: float) -> str:
    return f"{tokens:,.0f}" if tokens >= 1000 else f"{tokens:.4g}"
