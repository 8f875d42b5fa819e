"""Plans that were made before, by step: the log of a run, to be run again."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from flexsp import jsonfields as jf
from flexsp.lengths import LengthArray
from flexsp.plans import MicroBatch, Plan
from flexsp.profile import Profile

FILE = "plans.jsonl"


def read_plan_log(path: str | Path) -> dict[int, Plan]:
    """The plans of a run by step; the last of a step is the one that counts, and a row that a kill tore is left out.

    Args:
        path: a plans.jsonl, or the run's folder.

    Raises:
        ValueError: the file cannot be read, or a row is no plan of a step.
    """
    path = Path(path)
    file = path / FILE if os.path.isdir(path) else path
    try:
        # a kill may have torn a row in the middle of a character
        lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: cannot be read ({error}); give the {FILE} of a run, or its folder") from None
    plans: dict[int, Plan] = {}
    for number, line in enumerate(lines, start=1):
        try:
            row = jf.parse(line, f"{file}:{number}")
        except ValueError:
            if number == len(lines) or not line.rstrip().endswith("}"):
                continue
            raise
        step, plan = (row.get("step"), row.get("plan")) if isinstance(row, dict) else (None, None)
        if not isinstance(step, int) or isinstance(step, bool) or step < 0 or not isinstance(plan, dict):
            raise ValueError(f"{file}:{number}: must be an object of 'step' and 'plan'; give the {FILE} of a run")
        plans[jf.as_integer(step, f"{file}:{number}: step", 0)] = Plan.from_json(plan, f"{file}:{number}")
    return plans


def predicted_anew(plan: Plan, lengths: LengthArray, profile: Profile) -> Plan:
    """`plan` for (K,) `lengths` in tokens with what this profile predicts, which may have been another one then.

    It must be legal but for what it predicts: see `violations`.
    """
    micro_batches = tuple(_predicted(micro_batch, lengths, profile) for micro_batch in plan.micro_batches)
    return replace(
        plan,
        micro_batches=micro_batches,
        predicted_s=sum(micro_batch.predicted_s or 0.0 for micro_batch in micro_batches),
        predicted_table_s=None,
        lower_bound_s=None,
    )


def _predicted(micro_batch: MicroBatch, lengths: LengthArray, profile: Profile) -> MicroBatch:
    groups = tuple(
        replace(
            group,
            predicted_s=profile.group_s(group.sp_degree, lengths[list(group.sequences)], micro_batch.policy),
        )
        for group in micro_batch.groups
    )
    slowest_s = max(group.predicted_s or 0.0 for group in groups)
    return replace(micro_batch, groups=groups, predicted_s=profile.compute.fixed_s + slowest_s)
