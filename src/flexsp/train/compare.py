"""The same global batches under several planners, side by side: what mixed degrees gain here, measured."""

from __future__ import annotations

import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedModel

import flexsp
from flexsp.data import PlannedBatch
from flexsp.parallel import GroupPool
from flexsp.planner.static import static_degree
from flexsp.plans import Plan
from flexsp.profile import Profile
from flexsp.profiler import timed_step
from flexsp.train.display import Display

log = logging.getLogger(__name__)


def compare_planners(
    model: PreTrainedModel,
    batches: Sequence[PlannedBatch],
    profile: Profile,
    groups: GroupPool,
    max_length: int,
    display: Display,
) -> dict[str, Any]:
    """Times forward and backward of `batches` under flex, batch-adaptive and static.

    Groups are made and every plan's shapes run once before; then the planners take turns, in another order on every
    batch. Weights are not touched.

    Args:
        model: from `prepare_model`.
        batches: the global batches; their own plans are not used.
        profile: what the planners plan with.
        groups: the pool.
        max_length: the context limit, which forces the static degree.
        display: where progress is shown.

    Returns:
        Median seconds per planner and their ratio, as in comparison.json.
    """
    options: dict[str, dict[str, Any]] = {"flex": {}, "batch-adaptive": {}, "static": {"max_length": max_length}}
    planned = [
        {name: replace(batch, plan=_plan(batch, profile, name, chosen, groups)) for name, chosen in options.items()}
        for batch in batches
    ]
    groups.prepare([entry.plan for by_planner in planned for entry in by_planner.values()], profile.layouts)
    names = list(options)
    for name in names:
        timed_step(model, planned[0][name], groups)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn, (by_planner, line) in enumerate(display.track(planned, len(planned), "comparison")):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            seconds[name].append(timed_step(model, by_planner[name], groups))
        line.say(", ".join(f"{name} {seconds[name][-1]:.2f} s" for name in names))
    predicted = {name: [by_planner[name].plan.predicted_s or 0.0 for by_planner in planned] for name in names}
    return _summary(seconds, predicted, static_degree(profile, max_length))


def _summary(
    seconds: Mapping[str, Sequence[float]], predicted: Mapping[str, Sequence[float]], sp_degree: int
) -> dict[str, Any]:
    report: dict[str, Any] = {
        name: {
            "median_step_s": statistics.median(taken),
            "step_s": list(taken),
            "predicted_s": list(predicted[name]),
        }
        for name, taken in seconds.items()
    }
    report["static"]["sp_degree"] = sp_degree
    report["speedup"] = report["static"]["median_step_s"] / report["flex"]["median_step_s"]
    report["batches"] = len(seconds["flex"])
    return report


def summary_line(report: Mapping[str, Any]) -> str:
    """The comparison in one line."""
    flex, adaptive, static = (report[name]["median_step_s"] for name in ("flex", "batch-adaptive", "static"))
    return (
        f"comparison on {report['batches']} batches: flex {flex:.2f} s a step, batch-adaptive {adaptive:.2f} s, "
        f"static (sp_degree {report['static']['sp_degree']}) {static:.2f} s: "
        f"flex is {report['speedup']:.2f} times as fast as static"
    )


def _plan(batch: PlannedBatch, profile: Profile, name: str, options: dict[str, Any], groups: GroupPool) -> Plan:
    """Planned on rank 0, the same on all."""
    held = [flexsp.plan(batch.lengths, profile, name, **options) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(held, src=0, group=groups.control)
    plan = held[0]
    assert plan is not None
    return plan
