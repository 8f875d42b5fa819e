"""`flexsp check`: say every way in which a plan is illegal; exit 0 where it is legal, 1 where it is not."""

from __future__ import annotations

import argparse
from typing import Any

from flexsp.cli.lengths import COLUMN_HELP, LENGTHS_HELP
from flexsp.legality import violations
from flexsp.lengths import read_lengths
from flexsp.plans import Plan
from flexsp.profile import Profile


def add_to(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser("check", help="is a plan legal?", description=__doc__)
    parser.add_argument("lengths", metavar="LENGTHS", help=LENGTHS_HELP)
    parser.add_argument("profile", metavar="PROFILE", help="a flexsp-profile/1 file")
    parser.add_argument("plan", metavar="PLAN", help="a flexsp-plan/1 file")
    parser.add_argument("--column", metavar="NAME", help=COLUMN_HELP)
    parser.add_argument(
        "--num-devices", type=int, metavar="N", help="the plan is for N devices instead of the profile's number"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    lengths = read_lengths(arguments.lengths, arguments.column)
    profile = Profile.load(arguments.profile)
    if arguments.num_devices is not None:
        profile = profile.for_devices(arguments.num_devices)
    plan = Plan.load(arguments.plan)
    if not plan.has_plan:
        raise ValueError(f"{arguments.plan}: {plan.status.value}: {plan.reason}")
    faults = violations(plan, lengths, profile)
    for fault in faults:
        print(fault)
    num_groups = sum(len(micro_batch.groups) for micro_batch in plan.micro_batches)
    print(
        f"{f'illegal, {len(faults)} faults' if faults else 'legal'}: "
        f"{len(plan.micro_batches)} micro-batches, {num_groups} groups, {len(lengths)} sequences"
    )
    return 1 if faults else 0
