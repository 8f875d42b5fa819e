"""Simulates what docs/paper.md shows: cells, case study and scaling, as plain dictionaries for results/paper.json."""

from __future__ import annotations

import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

import paper_baselines as baselines
import paper_claims as claims
from paper_cases import Settings, case_of, model_profile, swept, with_fewer_activations

from flexsp.lengths import LengthArray
from flexsp.plans import Plan
from flexsp.profile import Profile
from flexsp.simulate.cases import Case
from flexsp.simulate.figures import CaseFigures
from flexsp.simulate.runs import Done, case_figures, simulate

PUBLISHED_DEVICES = 64
"""Of the published profiles."""
PLANNERS = ("flex", "batch-adaptive", "static")
CASE_MODEL = "7b"
"""Of the case study (at the highest context limit), of the scaling and of the ablation."""

Corpora = Mapping[str, LengthArray]
Row = dict[str, Any]


def run(what: str, cases: Sequence[Case], planners: Sequence[str], iterations: int, **options: Any) -> list[Done]:
    """All plans of all cases, with a line of progress now and then on standard error."""
    total = len(cases) * iterations * len({*planners, "static"})
    done: list[Done] = []
    for one in simulate(cases, planners, iterations, **options):
        done.append(one)
        if len(done) % max(1, total // 20) == 0:
            print(f"{what}: {len(done)} of {total} plans", file=sys.stderr, flush=True)
    return done


def figures_of(case: Case, own: Sequence[Done]) -> CaseFigures:
    """The case's figures; every planner must have planned every batch."""
    figures = case_figures(case, own, PLANNERS)
    assert figures is not None and not figures.refused, [one.refusal for one in own if one.refusal]
    return figures


def planner_rows(figures: CaseFigures) -> Row:
    """What is kept of each planner; `speedup` is the ratio of the seconds of all steps, static's over its own."""
    kept = (
        "median_step_s", "total_s", "speedup", "exchange_share", "fixed_share", "idle_share", "micro_batches",
        "median_solve_s", "slowest_solve_s", "tokens_per_s",
    )  # fmt: skip
    return {name: {key: getattr(each, key) for key in kept} for name, each in figures.planners.items()}


# ---- (a) speedups of every cell, (b) the case study, which is among their batches


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A batch that may stand for one of the paper's case study."""

    corpus: str
    step: int
    figures: CaseFigures
    plans: Mapping[str, Plan]
    """By planner."""

    def unlike(self, case: claims.CaseStudy) -> tuple[float, float]:
        """How far from the paper's case: static's micro-batches, then the best single degree in doublings."""
        degree = self.plans["batch-adaptive"].micro_batches[0].groups[0].sp_degree
        count = len(self.plans["static"].micro_batches)
        return abs(count - case.static_micro_batches), abs(math.log2(degree / case.adaptive_sp_degree))


def cells(corpora: Corpora, settings: Settings) -> tuple[list[Row], list[Row]]:
    """A row for each corpus, model and context limit, and the case study."""
    keys = [(c, m, k) for c in corpora for k in settings.contexts_k for m in settings.models]
    cases = [case_of(c, corpora[c], model_profile(m, k), k, settings) for c, m, k in keys]
    done = run("speedups", cases, PLANNERS, settings.iterations)
    rows: list[Row] = []
    candidates: list[Candidate] = []
    for index, ((corpus, model, context_k), case) in enumerate(zip(keys, cases, strict=True)):
        own = [one for one in done if one.case == index]
        figures = figures_of(case, own)
        rows.append({
            "corpus": corpus, "model": model, "context_k": context_k, **_cell(case, figures),
            "published": _published(case, settings.iterations),
        })  # fmt: skip
        if (model, context_k) == (CASE_MODEL, max(settings.contexts_k)):
            plans: dict[int, dict[str, Plan]] = {}
            for one in own:
                if one.plan is not None:
                    plans.setdefault(one.step, {})[one.planner] = one.plan
            candidates += [Candidate(corpus=corpus, step=s, figures=figures, plans=p) for s, p in plans.items()]
    return rows, case_study(candidates, swept(corpora))


def _cell(case: Case, figures: CaseFigures) -> Row:
    flex = figures.planners["flex"]
    return {
        "static_sp_degree": figures.static_sp_degree,
        "left_out": case.touched.documents / (case.touched.documents + len(case.lengths)),
        "tokens_per_batch": statistics.fmean(step.tokens for step in flex.steps),
        "static_micro_batches": sorted(step.micro_batches for step in figures.planners["static"].steps),
        "gap": flex.total_s / sum(step.lower_bound_s for step in flex.steps) - 1,
        "planners": planner_rows(figures),
    }


def _published(case: Case, iterations: int) -> Row:
    """Seconds of all steps under the published solver's baselines."""
    batches = [case.batch(step) for step in range(iterations)]
    return {
        "static_s": sum(baselines.static_s(batch, case.profile) for batch in batches),
        "batch_adaptive_s": sum(baselines.adaptive(batch, case.profile)[0] for batch in batches),
    }


def case_study(candidates: Sequence[Candidate], corpus: str) -> list[Row]:
    """For each case of the paper the batch that is most like it, of `corpus` where others are no more like it."""
    free = list(candidates)
    rows = []
    for case in claims.CASES:
        chosen = min(free, key=lambda c: (c.unlike(case), c.corpus != corpus, c.corpus, c.step))
        free.remove(chosen)
        steps = {
            name: next(step for step in each.steps if step.step == chosen.step)
            for name, each in chosen.figures.planners.items()
        }
        rows.append({
            "case": case.name, "corpus": chosen.corpus, "step": chosen.step, "tokens": steps["flex"].tokens,
            "layouts": {name: layout(chosen.plans[name]) for name in PLANNERS},
            "steps": {name: asdict(each) for name, each in steps.items()},
        })  # fmt: skip
    return rows


def layout(plan: Plan) -> str:
    """Degrees as in the paper's Table 3, longest first: `<32, 16, 8x2> <8x8> x2`."""
    texts = []
    for micro_batch in plan.micro_batches:
        runs = [(degree, len(list(alike))) for degree, alike in groupby(micro_batch.sp_degrees)]
        texts.append(f"<{', '.join(f'{d}x{count}' if count > 1 else f'{d}' for d, count in runs)}>")
    counted = [(text, len(list(alike))) for text, alike in groupby(texts)]
    return " ".join(f"{text} x{count}" if count > 1 else text for text, count in counted)


# ---- (c) scaling


def scaling(corpora: Corpora, settings: Settings) -> Row:
    """Rows by number of devices and by context limit, and what does not fit, with the reason."""
    corpus = swept(corpora)
    wanted: list[tuple[str, int, Profile, int]] = []
    for devices in settings.devices:
        profile = model_profile(CASE_MODEL, settings.devices_context_k).for_devices(devices)
        wanted.append(("devices", devices, profile, settings.devices_context_k))
        if devices == 16:
            wanted.append(("devices", devices, with_fewer_activations(profile), settings.devices_context_k))
    for context_k in settings.sweep_contexts_k:
        wanted.append(("contexts", context_k, model_profile(CASE_MODEL, context_k), context_k))
    cases: list[Case] = []
    rows: list[Row] = []
    misfits: list[Row] = []
    for along, value, profile, context_k in wanted:
        batch_size = settings.batch_size * max(1, profile.num_devices // PUBLISHED_DEVICES)
        row = {"along": along, "value": value, "profile": profile.name, "context_k": context_k}
        try:
            cases.append(case_of(corpus, corpora[corpus], profile, context_k, settings, batch_size))
        except ValueError as error:
            kept = {
                "num_devices": profile.num_devices,
                "activation_bytes_per_token": profile.activation_bytes_per_token(),
            }
            misfits.append({**row, **kept, "reason": str(error)})
            continue
        rows.append({**row, "num_devices": profile.num_devices, "batch_size": batch_size})
    large = [case.profile.num_devices > PUBLISHED_DEVICES for case in cases]
    for part, iterations in ((False, settings.sweep_iterations), (True, settings.large_iterations)):
        chosen = [(row, case) for row, case, is_large in zip(rows, cases, large, strict=True) if is_large is part]
        if not chosen:
            continue
        done = run("scaling", [case for _, case in chosen], PLANNERS, iterations)
        for index, (row, case) in enumerate(chosen):
            own = [one for one in done if one.case == index]
            row |= {"iterations": iterations, **_cell(case, figures_of(case, own))}
    assumed = model_profile(CASE_MODEL, settings.devices_context_k).for_devices(max(settings.devices))
    assumptions = assumed.provenance.get("assumptions", [])
    return {"corpus": corpus, "rows": rows, "misfits": misfits, "assumptions": assumptions}
