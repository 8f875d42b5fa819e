"""Runs planners on the global batches of a case, in parallel processes, and puts their figures together.

A step is planned by every planner before the next one is begun, so that whatever stops a run leaves whole steps.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from flexsp.lengths import LengthArray
from flexsp.planner import PLANNERS, plan
from flexsp.planner.kernels import load_kernels
from flexsp.plans import Plan
from flexsp.profile import Profile
from flexsp.simulate.cases import Case
from flexsp.simulate.figures import BASELINE, CaseFigures, StepFigures, planner_figures, step_figures
from flexsp.simulate.verdict import verdict
from flexsp.workers import end_with_parent

AHEAD = 4
"""Tasks handed over for each worker: enough to keep it busy, few enough that whole steps are done early."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A planner's name and options, for one case."""

    planner: str
    options: Mapping[str, Any]
    policy: str | None = None
    """The policy that its profile is under, to be named in its plans."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """What came of one planner on one batch: figures and plan, or why there are none."""

    case: int
    """Index among the cases."""
    planner: str
    step: int
    plan: Plan | None = None
    figures: StepFigures | None = None
    refusal: str | None = None


def jobs(case: Case, planners: Sequence[str], options: Mapping[str, Mapping[str, Any]]) -> list[Job]:
    """What to run for a case: `planners` in their order and the baseline, which speedups are against."""
    names = list(dict.fromkeys([*planners, BASELINE]))
    fixed = {BASELINE: {"sp_degree": case.static_sp_degree}}
    return [
        Job(planner=name, options={**options.get(name, {}), **fixed.get(name, {})}, policy=case.policy)
        for name in names
    ]


def simulate(
    cases: Sequence[Case],
    planners: Sequence[str],
    iterations: int,
    *,
    options: Mapping[str, Mapping[str, Any]] | None = None,
    workers: int | None = None,
) -> Generator[Done, None, None]:
    """Plans `iterations` batches of each case with each planner and the baseline, as they are done.

    Closing the iterator ends the worker processes.

    Args:
        cases: what to plan for.
        planners: names in `flexsp.planner.PLANNERS`, or `module:function`.
        iterations: batches of each case.
        options: by planner.
        workers: processes; by default one for each core.

    Raises:
        ValueError: a worker process died, or a profile says that nothing takes any time.
    """
    for case in cases:
        case.profile.require_costs()
    workers = workers or _cores()
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),  # forking a process that has threads can hang
        initializer=_begin_worker,
        initargs=(sys.path,),
    )
    tasks = (
        (c, case.profile, case.batch(step), job, step)
        for c, case in enumerate(cases)
        for step in range(iterations)
        for job in jobs(case, planners, options or {})
    )
    try:
        # the first alone: the first worker of an installation compiles the planner's kernels, for all of them
        yield pool.submit(_plan_one, *next(tasks)).result()
        yield from _as_they_come(pool, tasks, AHEAD * workers)
    except BrokenProcessPool:
        raise ValueError(
            "workers: a planner's process ended by itself, killed for its memory perhaps; lower --workers or "
            "--batch-size"
        ) from None
    except BaseException:  # closed or interrupted: what is being planned is of no use
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _as_they_come(pool: ProcessPoolExecutor, tasks: Iterator[tuple[Any, ...]], ahead: int) -> Iterator[Done]:
    """Results as they come, `ahead` tasks being handed over."""
    pending = {pool.submit(_plan_one, *task) for task in islice(tasks, ahead)}
    while pending:
        finished, pending = wait(pending, return_when=FIRST_COMPLETED)
        pending |= {pool.submit(_plan_one, *task) for task in islice(tasks, len(finished))}
        for future in finished:
            yield future.result()


def _begin_worker(path: list[str]) -> None:
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means
    sys.path[:] = path  # for planners of the user's own
    load_kernels()  # no batch's planning time includes it


def _plan_one(case: int, profile: Profile, lengths: LengthArray, job: Job, step: int) -> Done:
    try:
        made = plan(lengths, profile, job.planner, **job.options)
        if not made.has_plan:
            return Done(case=case, planner=job.planner, step=step, refusal=f"{made.status.value}: {made.reason}")
        figures = step_figures(step, made, lengths, profile, trusted=job.planner in PLANNERS)
    except BaseException as error:  # a planner of the user's own may raise anything, SystemExit too
        said = " ".join(str(error).split())
        refusal = said if isinstance(error, ValueError) else f"it raised {type(error).__name__}: {said}"
        return Done(case=case, planner=job.planner, step=step, refusal=refusal)
    if job.policy is not None:  # the plan is for the profile as it is, where it can be checked and replayed
        made = replace(made, micro_batches=tuple(replace(m, policy=job.policy) for m in made.micro_batches))
    return Done(case=case, planner=job.planner, step=step, plan=made, figures=figures)


def case_figures(case: Case, done: Iterable[Done], planners: Sequence[str]) -> CaseFigures | None:
    """The figures of the steps that all planners have done; None where there is no such step.

    A planner without a plan for some batch has no figures, only the reason.
    """
    refused: dict[str, str] = {}
    steps: dict[str, dict[int, StepFigures]] = {}
    for one in sorted(done, key=lambda one: one.step):
        if one.refusal is not None:
            refused.setdefault(one.planner, f"step {one.step}: {one.refusal}")
        elif one.figures is not None:
            steps.setdefault(one.planner, {})[one.step] = one.figures
    if BASELINE in refused or BASELINE not in steps:
        return None
    names = [name for name in dict.fromkeys([*planners, BASELINE]) if name not in refused]
    whole = sorted(set.intersection(*(set(steps.get(name, {})) for name in names)))
    if not whole:
        return None
    baseline = [steps[BASELINE][step] for step in whole]
    figures = CaseFigures(
        corpus=case.corpus,
        profile=case.profile.name,
        num_devices=case.profile.num_devices,
        devices_per_node=case.profile.devices_per_node,
        memory_bytes=case.profile.memory.memory_bytes,
        max_length=case.max_length,
        batch_size=case.batch_size,
        seed=case.seed,
        static_sp_degree=case.static_sp_degree,
        planners={name: planner_figures(name, [steps[name][s] for s in whole], baseline) for name in names},
        refused=refused,
        sentences=(),
    )
    return replace(figures, sentences=verdict(figures, case.profile))
