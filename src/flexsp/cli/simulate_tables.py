"""How `flexsp simulate` prints figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from flexsp.lengths import length_text
from flexsp.simulate.figures import BASELINE, CaseFigures, PlannerFigures
from flexsp.simulate.pictures import gantt_text
from flexsp.simulate.timeline import Timeline

GIB = 2**30


def show_case(case: CaseFigures, console: Console) -> None:
    """One case: a row for each planner, then what it means."""
    any_planner = next(iter(case.planners.values()))
    batches = "batch" if len(any_planner.steps) == 1 else "batches"
    devices = f"{case.num_devices} {'device' if case.num_devices == 1 else 'devices'}"
    say(
        console,
        f"\n{case.corpus}: {len(any_planner.steps)} {batches} of {case.batch_size} sequences up to "
        f"{length_text(case.max_length)} tokens on {devices} of {case.memory_bytes / GIB:.3g} GiB; "
        f"{' '.join(case.profile.split())}",
    )
    table = _table(("planner", "step s", "speedup", "plan", "exch", "idle", "micro", "GiB", "degrees"))
    for name, figures in case.planners.items():
        table.add_row(name, *_cells(figures))
    for column in table.columns[1:]:
        column.no_wrap = True  # a name of one's own planner may fold, a figure and its heading not
    _print(table, console)
    for name, reason in case.refused.items():
        say(console, f"{name} has no plan: {reason}")
    for sentence in case.sentences:
        say(console, sentence)


def show_legend(console: Console) -> None:
    """What the columns of `show_case` are."""
    say(
        console,
        "\nstep s: median seconds by the cost model, the optimizer apart; speedup: all steps against static; "
        "plan: median planning time with the bound's; exch, idle: share of the device-seconds; micro: micro-batches; "
        "GiB: the most on a device; degrees: those used (different groups of more than one rank)",
    )


def show_sweep(cases: Sequence[CaseFigures], console: Console) -> None:
    """All cases: speedups side by side."""
    names = list(dict.fromkeys(name for case in cases for name in case.planners if name != BASELINE))
    say(console, "\nspeedup over static, all cases")
    table = _table(("corpus", "limit", "devices", "static", *names))
    for case in cases:
        speedups = (case.planners[name].speedup if name in case.planners else None for name in names)
        table.add_row(
            case.corpus,
            length_text(case.max_length),
            str(case.num_devices),
            f"{case.planners[BASELINE].median_step_s:.3g} s",
            *("-" if speedup is None else f"{speedup:.2f}" for speedup in speedups),
        )
    _print(table, console)
    say(console, "static: its median seconds a step; -: no figures, see above")


def _cells(figures: PlannerFigures) -> list[str]:
    return [
        f"{figures.median_step_s:.3g}",
        f"{figures.speedup:.2f}",
        _seconds(figures.median_solve_s),
        f"{figures.exchange_share:.1%}",
        f"{figures.idle_share:.1%}",
        f"{figures.micro_batches:.3g}",
        f"{figures.peak_memory_bytes / GIB:.1f}",
        f"{_degrees(figures.tokens_by_degree)} ({figures.process_groups})",
    ]


def _degrees(tokens_by_degree: Mapping[int, float]) -> str:
    degrees = sorted(tokens_by_degree)
    return ",".join(map(str, degrees)) if len(degrees) < 3 else f"{degrees[0]}..{degrees[-1]}"


def _seconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{1e3 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.3g} s"


def _table(columns: tuple[str, ...]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for number, column in enumerate(columns):
        whole = number in (0, len(columns) - 1)
        table.add_column(column, justify="right" if number else "left", overflow="fold", no_wrap=whole)
    return table


def _print(table: Table, console: Console) -> None:
    """With less between the columns where they would have to fold."""
    if console.measure(table, options=console.options.update(max_width=10_000)).maximum > console.width:
        table.padding, table.show_edge = (0, 0), False
    console.print(table)


def say(console: Console, line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True, markup=False)


def show_timelines(timelines: Mapping[str, Timeline], console: Console) -> None:
    """One step of each planner as text."""
    for name, timeline in timelines.items():
        say(console, f"\n{name}")
        gantt_text.show(timeline, console)
