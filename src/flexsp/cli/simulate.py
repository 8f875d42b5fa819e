"""`flexsp simulate`: what would mixed degrees gain, on these lengths, this model and this cluster?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flexsp.batches import Overlong
from flexsp.cli.lengths import COLUMN_HELP, LENGTHS_HELP
from flexsp.cli.simulate_tables import say, show_case, show_legend, show_sweep, show_timelines
from flexsp.distributions import lengths_of
from flexsp.lengths import LengthArray, parse_tokens
from flexsp.planner import COMPARED, find_planner
from flexsp.planner.policies import policy_for, under_policy
from flexsp.plans import Plan
from flexsp.profile import MOST_DEVICES, Profile
from flexsp.simulate.cases import Case, make_case
from flexsp.simulate.figures import BASELINE, step_figures
from flexsp.simulate.output import Result, prepare_output, result, write_output
from flexsp.simulate.runs import Done, case_figures, jobs, simulate

PLANNERS = "flex,batch-adaptive,static"
CHOOSE = "choose"
"""Instead of a policy's name: planners that can choose a policy for each micro-batch do."""
MOST_SEQUENCES = 1 << 26
"""More are taken for a slip of the keyboard: they would take hours or all memory."""
DRAWN = 100_000
"""Lengths drawn from a named distribution, or twice what the batches need where that is more."""


def add_to(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "simulate", help="what would mixed degrees gain?", description=__doc__
    )
    add = parser.add_argument
    add(
        "lengths",
        metavar="LENGTHS",
        nargs="+",
        help=f"{LENGTHS_HELP}; or a distribution of flexsp lengths --list; several are compared",
    )
    add("--profile", required=True, metavar="PROFILE", help="a flexsp-profile/1 file")
    add("--column", metavar="NAME", help=COLUMN_HELP)
    add("--batch-size", type=int, metavar="K", help="sequences of a global batch (default: 512)")
    add("--iterations", type=int, metavar="N", help="global batches (default: 40)")
    add("--max-length", metavar="192K,...", help="context limit, or several (default: the longest sequence)")
    add("--overlong", choices=[str(o) for o in Overlong], help="what to do with longer ones (default: error)")
    add("--num-devices", metavar="64,...", help="devices, or several numbers of them (default: the profile's)")
    policies = f"activation policy of the profile for all micro-batches; {CHOOSE!r} leaves it to planners that can"
    add("--policy", metavar="NAME", help=policies)
    known = f"of {', '.join(COMPARED)}, or module:function, or all (default: {PLANNERS})"
    add("--planners", metavar="NAME,...", help=known)
    add("--sp-degree", type=int, metavar="D", help="the degree of static (default: the least that holds the limit)")
    add("--time-limit-s", type=float, metavar="S", help="for each plan of milp")
    add("--seed", type=int, metavar="N", help="of the order of the data, that of flexsp train (default: 0)")
    add("--workers", type=int, metavar="N", help="processes that plan (default: one for each core)")
    add("--plan", nargs="+", metavar="PLAN.json", help="replay these plans of LENGTHS as one batch instead")
    add("--timeline", action="store_true", help="print the timeline of one step; a replay always does")
    add("--output", metavar="DIR", help="where to write report.json, report.html, pictures, plans and traces")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    profile = Profile.load(arguments.profile)
    if arguments.policy not in (None, CHOOSE):
        under_policy(profile, arguments.policy)  # refused here, where it is not one case's fault
    if profile.memory.policies and arguments.policy is None and not arguments.plan:
        _notice(f"policies {', '.join(profile.memory.policies)} of the profile are left out; --policy takes one")
    cases = list(_cases(arguments, profile))
    usual = BASELINE if arguments.plan else PLANNERS
    asked = [name.strip() for name in (usual if arguments.planners is None else arguments.planners).split(",")]
    planners = list(COMPARED) if asked == ["all"] else asked
    for name in planners:
        find_planner(name)
    called = _names(arguments.plan or (), {*planners, BASELINE})
    replayed = [_replayed(path, name, cases[0]) for path, name in zip(arguments.plan or (), called, strict=True)]
    names = [*called, *planners]
    taken = [*names, *([] if BASELINE in planners else [BASELINE])]
    if clash := next((one.planner for one in replayed if taken.count(one.planner) > 1), None):
        raise ValueError(f"--plan: {clash!r} is the name of two plans, or of a planner that runs too; rename the file")
    if arguments.output is not None:
        prepare_output(Path(arguments.output))
    done, interrupted = _simulated(arguments, cases, planners)
    return _say(arguments, cases, [*replayed, *done], names, interrupted)


def _check(arguments: argparse.Namespace) -> None:
    """Refuses flags that are out of range or do not go together."""
    for name, least in (("batch_size", 1), ("iterations", 1), ("workers", 1), ("seed", 0)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')}={value} must be at least {least}; correct it")
    if (limit_s := arguments.time_limit_s) is not None and not limit_s > 0:
        raise ValueError(f"--time-limit-s={limit_s} must be above 0; give seconds")
    if (arguments.batch_size or 1) * (arguments.iterations or 1) > MOST_SEQUENCES:
        raise ValueError(
            f"--batch-size={arguments.batch_size} x --iterations={arguments.iterations} are more than "
            f"{MOST_SEQUENCES:,} sequences; lower one"
        )
    if not arguments.plan:
        return
    for name in ("batch_size", "iterations", "overlong", "seed"):
        if (value := getattr(arguments, name)) is not None:
            flag = f"--{name.replace('_', '-')}"
            raise ValueError(
                f"{flag}={value} does not go with --plan, whose batch is LENGTHS as they are; leave it out"
            )
    if len(arguments.lengths) > 1 or "," in (arguments.num_devices or "") + (arguments.max_length or ""):
        raise ValueError(f"--plan={arguments.plan[0]} is for one batch on one cluster; give one of each")


def _cases(arguments: argparse.Namespace, profile: Profile) -> Iterator[Case]:
    """Every corpus on every number of devices under every context limit; one that cannot be is said, if others can."""
    iterations, batch_size = arguments.iterations or 40, arguments.batch_size or 512
    limits: list[int | None] = [None]
    if arguments.max_length is not None:
        limits = [parse_tokens(text.strip(), "--max-length") for text in arguments.max_length.split(",")]
    devices = [profile.num_devices]
    if arguments.num_devices is not None:
        devices = [_count(text.strip()) for text in arguments.num_devices.split(",")]
    for flag, values in (("--max-length", limits), ("--num-devices", devices)):
        if len(set(values)) < len(values):
            raise ValueError(f"{flag}={values} has one twice; give each once")
    names = _corpus_names(arguments.lengths)
    corpora: dict[str, LengthArray] = {
        name: lengths_of(
            text,
            column=arguments.column,
            count=max(DRAWN, 2 * batch_size * iterations),
            seed=arguments.seed or 0,
        )
        for name, text in names.items()
    }
    wanted = list(product(corpora, limits, devices))
    found, said = 0, set[str]()
    for corpus, limit, num_devices in wanted:
        try:
            whole = profile.for_devices(num_devices)
            policy = _policy(arguments, whole, limit or int(corpora[corpus].max()))
            case = make_case(
                corpus,
                corpora[corpus],
                whole if arguments.policy == CHOOSE else under_policy(whole, policy),
                batch_size=None if arguments.plan else batch_size,
                max_length=limit,
                overlong=Overlong(arguments.overlong or Overlong.ERROR),
                seed=arguments.seed or 0,
                static_sp_degree=arguments.sp_degree,
                policy=policy,
                whole=whole,
            )
        except ValueError as error:
            if len(wanted) == 1:
                raise
            limit_text = "" if limit is None else f", max_length={limit}"
            _notice(f"left out: {corpus}{limit_text}, num_devices={num_devices}: {error}")
            continue
        found += 1
        _say_assumptions(case, profile, said)
        yield case
    if not found:
        raise ValueError(
            f"--num-devices={arguments.num_devices} --max-length={arguments.max_length} leave nothing to simulate; see "
            f"the notices above"
        )


def _policy(arguments: argparse.Namespace, profile: Profile, max_length: int) -> str | None:
    """The one that planners are under; beside a replay, where none is named, what the longest sequence needs."""
    if arguments.policy == CHOOSE:
        return None
    if not arguments.plan or arguments.policy is not None:
        named: str | None = arguments.policy
        return named
    needed = policy_for(profile, max_length)
    if profile.memory.policies:
        use = (
            "no policy" if needed is None else f"policy {needed!r}, without which max_length={max_length} does not fit"
        )
        known = ", ".join(profile.memory.policies)
        _notice(f"policies {known} are for the plans; planners beside them use {use}; --policy names another")
    return needed


def _count(text: str) -> int:
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text) <= MOST_DEVICES:
        raise ValueError(
            f"--num-devices={text!r} must be positive integers up to {MOST_DEVICES:,}, comma-separated; write "
            f"them like 64,128"
        )
    return int(text)


def _corpus_names(texts: Sequence[str]) -> dict[str, str]:
    """A short name for each LENGTHS: the file's without folder and suffix, where these are all different."""
    short = ["standard input" if text == "-" else Path(text).stem for text in texts]
    if len(set(texts)) < len(texts):
        raise ValueError(f"LENGTHS={' '.join(texts)} has one twice; give each once")
    return dict(zip(short if len(set(short)) == len(short) else texts, texts, strict=True))


def _say_assumptions(case: Case, given: Profile, said: set[str]) -> None:
    """Once each, though a corpus and a limit come with several numbers of devices."""
    lines = []
    touched = case.touched
    if touched.documents:
        fate = f"dropped, {touched.lost_tokens:,} tokens" if touched.lost_tokens else "split, no token lost"
        exceed = "1 sequence exceeds" if touched.documents == 1 else f"{touched.documents:,} sequences exceed"
        lines.append(f"{case.corpus}: {exceed} max_length={case.max_length}: {fate}")
    if case.profile.num_devices != given.num_devices:
        lines.append(case.profile.provenance["assumptions"][-1])
    for line in lines:
        if line not in said:
            _notice(line)
    said.update(lines)


def _names(paths: Sequence[str], running: set[str]) -> list[str]:
    """What to call plans from files: `flex` for flex.plan.json; `flex.plan` where another is called so."""
    stems = [Path(path).stem for path in paths]
    short = [stem.removesuffix(".plan") or stem for stem in stems]
    return [stem if name in running or short.count(name) > 1 else name for stem, name in zip(stems, short, strict=True)]


def _replayed(path: str, name: str, case: Case) -> Done:
    plan = replace(Plan.load(path), lower_bound_s=None)  # the bound is ours to say, the plan is anyone's
    if not plan.has_plan:
        raise ValueError(f"{path}: {plan.status.value}: {plan.reason}")
    try:
        figures = step_figures(0, plan, case.lengths, case.whole)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    # what planning took, wherever that was, is nothing that we know
    return Done(case=0, planner=name, step=0, plan=plan, figures=replace(figures, solve_s=None))


def _simulated(arguments: argparse.Namespace, cases: list[Case], planners: list[str]) -> tuple[list[Done], bool]:
    """What came of all batches, and whether an interrupt ended them early."""
    iterations = 1 if arguments.plan else arguments.iterations or 40
    options = {} if arguments.time_limit_s is None else {"milp": {"time_limit_s": arguments.time_limit_s}}
    total = sum(len(jobs(case, planners, {})) for case in cases) * iterations
    done: list[Done] = []
    columns = (TextColumn("planning"), BarColumn(), MofNCompleteColumn(), TextColumn("plans"), TimeRemainingColumn())
    console = Console(stderr=True, markup=False)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=total)
        running = simulate(cases, planners, iterations, options=options, workers=arguments.workers)
        try:
            with closing(running):
                for one in running:
                    done.append(one)
                    progress.advance(task)
        except KeyboardInterrupt:
            return done, True
    return done, False


def _say(
    arguments: argparse.Namespace, cases: list[Case], done: list[Done], names: list[str], interrupted: bool
) -> int:
    """Prints and writes the figures of whole steps; the exit status."""
    console = Console(markup=False)
    results: list[Result] = []
    refused: list[str] = []
    for c, case in enumerate(cases):
        of_case = [one for one in done if one.case == c]
        refused += [f"{one.planner}: {one.refusal}" for one in of_case if one.refusal is not None]
        if (figures := case_figures(case, of_case, names)) is not None:
            results.append(result(case, figures, of_case))
    if interrupted:
        whole = sum(len(each.figures.planners[BASELINE].steps) for each in results)
        steps = "the 1 step" if whole == 1 else f"the {whole} steps"
        _notice(f"interrupted; {f'what follows is of {steps} done' if whole else 'no step was done'}")
    elif not results:
        raise ValueError(refused[0])
    for each in results:
        show_case(each.figures, console)
        if arguments.plan or arguments.timeline:
            show_timelines(each.timelines(), console)
    if results:
        show_legend(console)
    if len(results) > 1:
        show_sweep([each.figures for each in results], console)
    if arguments.output is not None and results:
        say(console, f"report: {write_output(Path(arguments.output), results)}")
    return 130 if interrupted else 0


def _notice(line: str) -> None:
    print(f"flexsp simulate: {line}", file=sys.stderr)
