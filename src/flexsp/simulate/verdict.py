"""What a simulation's figures mean, in sentences: what mixed degrees gain, why, and where they gain little or lose.

Every sentence is one that its figures bear out; a reason that is not true of them is not given.
"""

from __future__ import annotations

from flexsp.profile import Profile
from flexsp.simulate.figures import BASELINE, CaseFigures, PlannerFigures

SINGLE_DEGREE = (BASELINE, "batch-adaptive")
"""Planners that use one degree for a whole batch."""
FLEX = "flex"
"""The planner that training uses: whoever is faster on these batches is said first."""
LITTLE = 1.1
"""A speedup below this is little: calibration, kernels and the cluster's mood change a step by as much."""
CHEAP_EXCHANGE = 0.08
"""Of the baseline's time: what mixing degrees saves is mostly exchange, and there is no more of it than this."""
MOST_TOKENS = 0.6
"""Of the tokens."""
MOST_TIME = 0.6
"""Of a planner's time."""
MOST_SAVED = 0.7
"""Of the seconds that mixed degrees save: a clear majority."""
ALIKE = 0.02
"""Idle shares that differ by less, and numbers of micro-batches that differ by less relatively, are about equal."""
ROUNDING = 1e-9
"""Relative: times that differ by less are the same, added up in another order."""


def verdict(case: CaseFigures, profile: Profile) -> tuple[str, ...]:
    """Sentences about `case`, the most important first; empty where only the baseline has figures."""
    static = case.planners[BASELINE]
    mixed = fastest_mixed(case)
    if mixed is None:
        return _single_degree_only(case, static)
    sentences = [*_beaten(case, mixed, static), _gain(case, mixed, static), _where_time_goes(mixed, static)]
    if mixed.table_speedup is not None:
        contrary = (mixed.table_speedup < 1) != (mixed.speedup < 1)
        sentences.insert(0 if contrary else -1, _by_tables(mixed, mixed.table_speedup))
    if not _faster(static, mixed):
        if mixed.speedup < LITTLE:
            sentences.append(f"Mixed degrees gain little here: {'; '.join(_why_little(case, mixed, static, profile))}.")
        elif (adaptive := case.planners.get("batch-adaptive")) and not _faster(adaptive, mixed):
            saved = (static.total_s - adaptive.total_s) / (static.total_s - mixed.total_s)
            if saved >= MOST_SAVED:
                sentences.append(
                    f"Most of it one degree per batch gains too, chosen anew for each: batch-adaptive saves "
                    f"{saved:.0%} of the seconds that {mixed.planner} saves."
                )
    best = min(case.planners.values(), key=lambda figures: figures.total_s)
    # planners may know different policies: the least of their bounds is one on every plan
    if bound_s := sum(min(bounds_s) for bounds_s in zip(*_bounds_s(case), strict=True)):
        above = max(0.0, best.total_s / bound_s - 1)
        sentences.append(f"No plan could be more than {above:.1%} faster than {best.planner}'s.")
    if mixed.median_solve_s is not None and mixed.median_solve_s > mixed.median_step_s:
        sentences.append(
            f"Planning a batch takes longer ({mixed.median_solve_s:.3g} s) than its step: one planner process does "
            f"not keep up."
        )
    if (source := profile.provenance.get("source")) in ("estimated", "mixed"):
        sentences.append(f"The profile is {source}, not measured: trust ratios before seconds.")
    return tuple(sentences)


def _bounds_s(case: CaseFigures) -> list[list[float]]:
    return [[step.lower_bound_s for step in figures.steps] for figures in case.planners.values()]


def fastest_mixed(case: CaseFigures) -> PlannerFigures | None:
    """The fastest of the planners that mix degrees."""
    mixed = [figures for name, figures in case.planners.items() if name not in SINGLE_DEGREE]
    return min(mixed, key=lambda figures: figures.total_s, default=None)


def _faster(one: PlannerFigures, other: PlannerFigures) -> bool:
    return one.total_s < other.total_s * (1 - ROUNDING)


def _beaten(case: CaseFigures, mixed: PlannerFigures, static: PlannerFigures) -> list[str]:
    """That mixed degrees lose, and who else is faster than flex, or than the fastest planner that mixes degrees."""
    sentences = []
    if lose := _faster(static, mixed):
        longer = _percent(mixed.total_s / static.total_s - 1)
        sentences.append(f"Mixed degrees lose here: {mixed.planner} takes {longer} longer than static.")
    flex = case.planners.get(FLEX, mixed)
    faster = sorted((f for f in case.planners.values() if _faster(f, flex)), key=lambda figures: figures.total_s)
    if lose and flex is mixed:
        faster.remove(static)  # said
    if faster:
        each = [f"{figures.planner} by {_percent(flex.total_s / figures.total_s - 1)}" for figures in faster]
        sentences.append(f"Faster than {flex.planner} here: {', '.join(each)}.")
    return sentences


def _percent(part: float) -> str:
    return f"{part:.1%}" if part >= 0.0005 else "less than 0.1%"


def _gain(case: CaseFigures, mixed: PlannerFigures, static: PlannerFigures) -> str:
    seconds = f"{mixed.median_step_s:.3g} s a step against {static.median_step_s:.3g} s"
    said = f"{mixed.planner} is {mixed.speedup:.2f} times as fast as static degree {case.static_sp_degree}, {seconds}"
    if len(mixed.steps) == 1:
        return f"{said}."
    low, high = min(mixed.step_speedups), max(mixed.step_speedups)
    return f"{said} in the median over {len(mixed.steps)} steps ({low:.2f} to {high:.2f} step by step)."


def _by_tables(mixed: PlannerFigures, speedup: float) -> str:
    chosen = ", by which it chooses its plans," if mixed.planner == FLEX else ""
    return (
        f"By the profile's measured tables {mixed.planner}{chosen} is {speedup:.2f} times as fast as static; all else "
        f"here is by the formula."
    )


def _where_time_goes(mixed: PlannerFigures, static: PlannerFigures) -> str:
    def shares(figures: PlannerFigures) -> str:
        return f"{figures.exchange_share:.0%} exchange and {figures.idle_share:.0%} idle"

    return f"Of static's device-seconds {shares(static)}; of {mixed.planner}'s {shares(mixed)}."


def _why_little(case: CaseFigures, mixed: PlannerFigures, static: PlannerFigures, profile: Profile) -> list[str]:
    """Reasons, each one true of these figures."""
    degree = case.static_sp_degree
    as_many = abs(mixed.micro_batches / static.micro_batches - 1) < ALIKE
    reasons = []
    if degree == 1:
        if as_many and abs(mixed.idle_share - static.idle_share) < ALIKE:
            reasons.append("one device holds every sequence up to the context limit, so there is no exchange to save")
    elif static.exchange_share < CHEAP_EXCHANGE:
        where = "inside a node" if degree <= profile.devices_per_node else "between nodes"
        reasons.append(
            f"static exchanges {where} for {static.exchange_share:.0%} of its time, and there is little of that to save"
        )
    needed = sum(share for d, share in mixed.tokens_by_degree.items() if d >= degree)
    if degree > 1 and needed > MOST_TOKENS:
        reasons.append(f"{needed:.0%} of the tokens run at degree {degree} or above in {mixed.planner}'s plans too")
    if mixed.fixed_share > MOST_TIME:
        stays = ", of which static has as many" if as_many else ""
        reasons.append(f"{mixed.fixed_share:.0%} of the time is the fixed cost of micro-batches{stays}")
    return reasons or [
        f"exchange and idle take {_lost(mixed):.0%} of {mixed.planner}'s time, and {_lost(static):.0%} of static's"
    ]


def _lost(figures: PlannerFigures) -> float:
    return figures.exchange_share + figures.idle_share


def _single_degree_only(case: CaseFigures, static: PlannerFigures) -> tuple[str, ...]:
    sentences = []
    for name, figures in case.planners.items():
        if name != BASELINE:
            sentences.append(f"{name} is {figures.speedup:.2f} times as fast as static degree {case.static_sp_degree}.")
    if bound_s := sum(step.lower_bound_s for step in static.steps):
        sentences.append(f"No plan could be more than {static.total_s / bound_s:.2f} times as fast as static.")
    return tuple(sentences)
