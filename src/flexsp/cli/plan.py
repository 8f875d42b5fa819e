"""`flexsp plan`: plan one global batch and print it."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

import flexsp
from flexsp.lengths import LengthArray, parse_tokens, read_lengths
from flexsp.planner import PLANNERS
from flexsp.plans import MicroBatch, Plan
from flexsp.profile import Profile


def add_to(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser("plan", help="plan one global batch", description=__doc__)
    parser.add_argument("lengths", metavar="LENGTHS", help="one integer a line, a .npy file, or - for standard input")
    parser.add_argument("--profile", required=True, help="a flexsp-profile/1 file")
    parser.add_argument("--planner", default="flex", metavar="NAME", help=f"{', '.join(PLANNERS)} (default: flex)")
    parser.add_argument("--sp-degree", type=int, metavar="D", help="for static: the degree")
    parser.add_argument("--max-length", metavar="TOKENS", help="for static: the context limit that forces the degree")
    parser.add_argument(
        "--num-devices", type=int, metavar="N", help="plan for N devices instead of the profile's number"
    )
    parser.add_argument("--output", metavar="PLAN.json", help="where to save the plan")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    lengths = read_lengths(arguments.lengths)
    profile = Profile.load(arguments.profile)
    if arguments.num_devices is not None:
        profile = profile.for_devices(arguments.num_devices)
    options: dict[str, Any] = {}
    if arguments.sp_degree is not None:
        options["sp_degree"] = arguments.sp_degree
    if arguments.max_length is not None:
        options["max_length"] = parse_tokens(arguments.max_length, "--max-length")
    plan = flexsp.plan(lengths, profile, arguments.planner, **options)
    if not plan.has_plan:
        raise ValueError(f"{plan.status.value}: {plan.reason}")
    if arguments.output:
        plan.save(arguments.output)
    show(plan, lengths, profile, Console())
    return 0


def show(plan: Plan, lengths: LengthArray, profile: Profile, console: Console) -> None:
    """Prints the plan as a table with one row per micro-batch and degree, and a closing line."""
    table = Table(
        title=f"{len(lengths)} sequences, {int(lengths.sum()):,} tokens on {plan.num_devices} devices",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),  # all columns within the 80 of a pipe
    )
    for column in ("batch", "groups", "degree", "sequences", "lengths", "tokens", "seconds", "memory"):
        table.add_column(column, justify="right", overflow="fold")
    for b, micro_batch in enumerate(plan.micro_batches):
        for row in _rows(b, micro_batch, lengths, profile):
            table.add_row(*row)
        table.add_section()
    console.print(table)
    gap = "" if plan.gap is None else f" (at most {plan.gap:.1%} above the optimum)"
    console.print(
        f"{plan.planner}: predicted {plan.predicted_s:.4g} s, bound {plan.lower_bound_s:.4g} s{gap}; "
        f"planned in {plan.solve_s:.3g} s",
        highlight=False,
        soft_wrap=True,
    )


def _rows(b: int, micro_batch: MicroBatch, lengths: LengthArray, profile: Profile) -> list[list[str]]:
    rows: list[list[str]] = []
    used = 0
    for degree in sorted({group.sp_degree for group in micro_batch.groups}, reverse=True):
        groups = [group for group in micro_batch.groups if group.sp_degree == degree]
        held = [lengths[list(group.sequences)] for group in groups]
        together = np.concatenate(held)
        used += degree * len(groups)
        full = max(float(h.sum()) for h in held) / profile.capacity_tokens(degree)
        rows.append([
            str(b) if not rows else "", str(len(groups)), str(degree), str(len(together)),
            _span(int(together.min()), int(together.max())), f"{int(together.sum()):,}",
            _span_s([group.predicted_s or 0.0 for group in groups]), f"{full:.0%}",
        ])  # fmt: skip
    idle = profile.num_devices - used
    if idle:
        rows.append(["", "", "", "", "", f"{idle} idle", "", ""])
    return rows


def _span(low: int, high: int) -> str:
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"


def _span_s(seconds: list[float]) -> str:
    low, high = f"{min(seconds):.3g}", f"{max(seconds):.3g}"
    return low if low == high else f"{low}-{high}"
