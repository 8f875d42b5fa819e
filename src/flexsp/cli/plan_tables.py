"""How `flexsp plan` prints a plan and explains it."""

from __future__ import annotations

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from flexsp.lengths import LengthArray
from flexsp.planner.explain import explain
from flexsp.plans import Group, MicroBatch, Plan
from flexsp.profile import Profile

COLUMNS = ("degree", "seqs", "lengths", "tokens", "seconds", "idle", "memory")


def show_plan(plan: Plan, lengths: LengthArray, profile: Profile, console: Console, every_group: bool = False) -> None:
    """Prints each micro-batch with one row per degree, or one per group, and a closing line."""
    table = _table(
        f"{len(lengths)} sequences, {int(lengths.sum()):,} tokens on {plan.num_devices} devices",
        (
            "batch",
            "ranks" if every_group else "groups",
            "degree",
            "seqs",
            "lengths",
            "tokens",
            "seconds",
            "idle",
            "memory",
        ),
    )
    for b, micro_batch in enumerate(plan.micro_batches):
        for row in _rows(b, micro_batch, lengths, profile, every_group):
            table.add_row(*row)
        table.add_section()
    console.print(table)
    _say(console, "idle: share of the micro-batch that a group waits for the slowest; memory: tokens over capacity")
    gap = "" if plan.gap is None else f" (at most {plan.gap:.1%} above the optimum)"
    by_tables = "" if plan.predicted_table_s is None else f" ({plan.predicted_table_s:.4g} s by the measured tables)"
    _say(
        console,
        f"{plan.planner}: predicted {plan.predicted_s:.4g} s{by_tables}, bound {plan.lower_bound_s:.4g} s{gap}; "
        f"planned in {plan.solve_s:.3g} s",
    )


def show_explanation(plan: Plan, lengths: LengthArray, profile: Profile, index: int, console: Console) -> None:
    """Prints where sequence `index` sits, its time at each degree, and what moving it would cost."""
    found = explain(plan, lengths, profile, index)
    group = found.group
    _say(
        console,
        f"sequence {index}: {int(lengths[index]):,} tokens, in micro-batch {found.micro_batch} on ranks "
        f"{_ranks(group)}, "
        f"with {_others(len(group.sequences) - 1)}, {found.share:.0%} of its group's time; "
        + (
            f"its group ends {found.slack_s:.3g} s before the slowest"
            if found.slack_s > 0
            else "its group is the slowest of the micro-batch"
        ),
    )
    table = _table("at each degree", ("degree", "alone", "nearest group with room", "plan would take"))
    for row in found.by_degree:
        here = " (here)" if row.sp_degree == group.sp_degree else ""
        move = row.move
        table.add_row(
            f"{row.sp_degree}{here}",
            "does not fit" if row.alone_s is None else f"{row.alone_s:.3g} s",
            "none" if move is None else f"micro-batch {move.micro_batch}, ranks {_ranks(move.group)}",
            "" if move is None else f"{move.change_s:+.3g} s",
        )
    console.print(table)


def _rows(
    b: int, micro_batch: MicroBatch, lengths: LengthArray, profile: Profile, every_group: bool
) -> list[list[str]]:
    """Cells of one micro-batch's rows."""
    policy = micro_batch.policy
    seconds = {
        group: profile.group_s(group.sp_degree, lengths[list(group.sequences)], policy) for group in micro_batch.groups
    }
    slowest_s = max(seconds.values())
    rows: list[list[str]] = []
    for groups in _sections(micro_batch, every_group):
        degree = groups[0].sp_degree
        held = [lengths[list(group.sequences)] for group in groups]
        together = np.concatenate(held)
        name = "" if rows else f"{b}" if policy is None else f"{b} {policy}"
        rows.append([
            name, _ranks(groups[0]) if every_group else str(len(groups)), str(degree), str(len(together)),
            _span(int(together.min()), int(together.max())), f"{int(together.sum()):,}",
            _spread([seconds[group] for group in groups], "{:.3g}"),
            _spread([1 - seconds[group] / slowest_s if slowest_s else 0.0 for group in groups], "{:.0%}"),
            _spread([float(h.sum()) / profile.capacity_tokens(degree, policy) for h in held], "{:.0%}"),
        ])  # fmt: skip
    idle = profile.num_devices - sum(group.sp_degree for group in micro_batch.groups)
    if idle:
        rows.append(["", "", "", "", "", f"{idle} {'rank' if idle == 1 else 'ranks'}", "", "100%", ""])
    return rows


def _sections(micro_batch: MicroBatch, every_group: bool) -> list[list[Group]]:
    """The groups that share a row, larger degrees first."""
    if every_group:
        return [[group] for group in sorted(micro_batch.groups, key=lambda group: (-group.sp_degree, group.ranks))]
    degrees = sorted({group.sp_degree for group in micro_batch.groups}, reverse=True)
    return [[group for group in micro_batch.groups if group.sp_degree == degree] for degree in degrees]


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))  # all columns within the 80 of a pipe
    for column in columns:
        table.add_column(column, justify="right", overflow="fold")
    return table


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True)


def _others(count: int) -> str:
    return "1 other" if count == 1 else f"{count} others"


def _ranks(group: Group) -> str:
    return str(group.ranks[0]) if group.sp_degree == 1 else f"{group.ranks[0]}-{group.ranks[-1]}"


def _span(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"


def _spread(values: list[float], form: str) -> str:
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low}-{high}"
