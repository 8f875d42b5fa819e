"""Parts (d) and (e) of docs/paper.md: what sorting and bucketing do for the paper's planner, and bucketing's error.

The planners here are named `paper_ablation:NAME`, so that `simulate` runs them in its worker processes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import paper_claims as claims
from paper_cases import Settings, case_of, model_profile, swept
from paper_measure import CASE_MODEL, Corpora, Row, run

from flexsp.planner.blaster import balanced_chunks, buckets
from flexsp.planner.milp import plan_milp
from flexsp.profile import Profile
from flexsp.simulate.runs import Done

Ints = npt.NDArray[np.int64]
NUM_BUCKETS = 16

sorted_dp = partial(plan_milp, sort=True, bucketing="dp")
sorted_naive = partial(plan_milp, sort=True, bucketing="naive")
sorted_none = partial(plan_milp, sort=True, bucketing="none")
unsorted_dp = partial(plan_milp, sort=False, bucketing="dp")
unsorted_naive = partial(plan_milp, sort=False, bucketing="naive")
unsorted_none = partial(plan_milp, sort=False, bucketing="none")
cold = partial(plan_milp, sort=True, bucketing="dp", warm_start=False)

VARIANTS: Mapping[str, str] = {
    "sorted_dp": "sorted, DP buckets (the paper's planner)",
    "sorted_naive": "sorted, buckets of equal width",
    "sorted_none": "sorted, no buckets",
    "unsorted_dp": "not sorted, DP buckets",
    "unsorted_naive": "not sorted, buckets of equal width",
    "unsorted_none": "not sorted, no buckets",
    "cold": "sorted, DP buckets, no groups to begin with",
}
FULL = "sorted_dp"


def ablation(corpora: Corpora, settings: Settings) -> list[Row]:
    """A row for each context limit and variant, over the batches that the variant and the full planner both planned."""
    corpus = swept(corpora)
    cases = [
        case_of(corpus, corpora[corpus], model_profile(CASE_MODEL, k), k, settings) for k in settings.contexts_k
    ]  # fmt: skip
    names = {name: f"paper_ablation:{name}" for name in VARIANTS}
    limit = {planner: {"time_limit_s": settings.milp_limit_s} for planner in names.values()}
    done = run("ablation", cases, [*names.values(), "flex"], settings.milp_batches, options=limit)
    rows = []
    for index, context_k in enumerate(settings.contexts_k):
        by_step = {(one.planner, one.step): one for one in done if one.case == index}
        for name, planner in names.items():
            own = [by_step[planner, step] for step in range(settings.milp_batches)]
            rows.append({"corpus": corpus, "context_k": context_k, "variant": name, **_against(own, by_step)})
    return rows


def _against(own: list[Done], by_step: Mapping[tuple[str, int], Done]) -> Row:
    """Predicted time of a variant's plans, by geometric mean relative to the full planner's, static's and flex's."""
    solved = [one for one in own if one.plan is not None]
    said = [one.plan.extra["milp"] for one in solved if one.plan is not None]

    def over(planner: str) -> float | None:
        pairs = [(one, by_step[planner, one.step]) for one in solved]
        ratios = [_step_s(one) / _step_s(other) for one, other in pairs if other.plan is not None]
        return statistics.geometric_mean(ratios) if ratios else None

    return {
        "batches": len(own),
        "planned": len(solved),
        "over_full": over(f"paper_ablation:{FULL}"),
        "over_static": over("static"),
        "over_flex": over("flex"),
        "token_error": max((each["token_error"] for each in said), default=None),
        "milps": sum(each["solved"] for each in said),
        "proven": sum(each["proven"] for each in said),
    }


def _step_s(one: Done) -> float:
    assert one.figures is not None
    return one.figures.step_s


# ---- (e) the error of bucketing


def bucketing(corpora: Corpora, settings: Settings) -> list[Row]:
    """A row for each corpus and context limit: tokens that bucketing adds over tokens, largest and mean of the batches.

    Of the lengths as they are, and rounded up to multiples of 128 first, as the published solver does. As in the paper,
    each of the fewest sorted micro-batches that memory allows has its own buckets.
    """
    rows = []
    for corpus, lengths in corpora.items():
        for context_k in settings.contexts_k:
            profile = model_profile(CASE_MODEL, context_k)
            case = case_of(corpus, lengths, profile, context_k, settings)
            errors: dict[str, list[float]] = {}
            for step in range(settings.iterations):
                for key, error in _errors(case.batch(step), profile).items():
                    errors.setdefault(key, []).append(error)
            figures: dict[str, Any] = {
                key: {"largest": max(own), "mean": statistics.fmean(own)} for key, own in errors.items()
            }
            rows.append({"corpus": corpus, "context_k": context_k, **figures})
    return rows


def _errors(lengths: Ints, profile: Profile) -> dict[str, float]:
    rounded = -(-lengths // claims.ROUNDED_TO) * claims.ROUNDED_TO
    return {
        f"{how}_{kind}": token_error(tokens, profile, kind)
        for how, tokens in (("exact", lengths), ("rounded", rounded))
        for kind in ("dp", "naive")
    }


def token_error(lengths: Ints, profile: Profile, kind: str) -> float:
    """Tokens that bucketing adds, relative to the tokens there are."""
    row = np.sort(lengths)[::-1]
    fewest = math.ceil(int(row.sum()) / (profile.capacity_tokens(1) * profile.num_devices))
    chunks = [row[positions] for positions in balanced_chunks(row, max(1, fewest))]
    added = sum(int((buckets(chunk, NUM_BUCKETS, kind) - chunk).sum()) for chunk in chunks)
    return added / int(row.sum())
