"""`flexsp plan`: plan one global batch and print it."""

from __future__ import annotations

import argparse
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console

import flexsp
from flexsp.cli.lengths import COLUMN_HELP, LENGTHS_HELP
from flexsp.cli.plan_tables import show_explanation, show_plan
from flexsp.lengths import parse_tokens, read_lengths
from flexsp.planner import PLANNERS, find_planner
from flexsp.planner.kernels import load_kernels
from flexsp.profile import Profile

PATIENCE_S = 3.0
"""After which a person at a terminal is told what takes so long."""


def add_to(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser("plan", help="plan one global batch", description=__doc__)
    parser.add_argument("lengths", metavar="LENGTHS", help=LENGTHS_HELP)
    parser.add_argument("--column", metavar="NAME", help=COLUMN_HELP)
    parser.add_argument("--profile", required=True, help="a flexsp-profile/1 file")
    parser.add_argument("--planner", default="flex", metavar="NAME", help=f"{', '.join(PLANNERS)} (default: flex)")
    parser.add_argument("--sp-degree", type=int, metavar="D", help="for static: the degree")
    parser.add_argument("--max-length", metavar="TOKENS", help="for static: the context limit that forces the degree")
    parser.add_argument(
        "--num-devices", type=int, metavar="N", help="plan for N devices instead of the profile's number"
    )
    parser.add_argument("--time-limit-s", type=float, metavar="S", help="for flex and milp: search for this long")
    parser.add_argument("--groups", action="store_true", help="print every group, not one row per degree")
    parser.add_argument(
        "--explain", type=int, metavar="I", help="say for sequence I of LENGTHS, from 0, why it sits where it sits"
    )
    parser.add_argument("--output", metavar="PLAN.json", help="where to save the plan")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    lengths = read_lengths(arguments.lengths, arguments.column)
    profile = Profile.load(arguments.profile)
    profile.require_costs()
    if arguments.num_devices is not None:
        profile = profile.for_devices(arguments.num_devices)
    options: dict[str, Any] = {}
    if arguments.sp_degree is not None:
        options["sp_degree"] = arguments.sp_degree
    if arguments.max_length is not None:
        options["max_length"] = parse_tokens(arguments.max_length, "--max-length")
    if arguments.time_limit_s is not None:
        options["time_limit_s"] = arguments.time_limit_s
    find_planner(arguments.planner)
    with _said_if_long():
        load_kernels()  # solve_s is what planning takes, not what a process takes to begin
        plan = flexsp.plan(lengths, profile, arguments.planner, **options)
    if not plan.has_plan:
        raise ValueError(f"{plan.status.value}: {plan.reason}")
    if arguments.output is not None:
        plan.save(arguments.output)
    console = Console(markup=False)
    if arguments.explain is None:
        show_plan(plan, lengths, profile, console, every_group=arguments.groups)
    else:
        show_explanation(plan, lengths, profile, arguments.explain, console)
    return 0


@contextmanager
def _said_if_long() -> Iterator[None]:
    """Says on a terminal that an installation's first plan compiles the planner, once it takes longer than a plan."""

    def say() -> None:
        if sys.stderr.isatty():
            print(
                "still planning; an installation's first plan compiles the planner, about half a minute",
                file=sys.stderr,
            )

    timer = threading.Timer(PATIENCE_S, say)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
