"""What a simulation says: figures of each step under each planner, and of all steps together.

These are what `report.json` holds, what the tables print and what the pictures draw.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from flexsp.lengths import LengthArray
from flexsp.planner.bound import lower_bound_s
from flexsp.planner.by_tables import table_s
from flexsp.plans import Plan
from flexsp.profile import Profile
from flexsp.simulate.timeline import Timeline, replay

BASELINE = "static"
"""What speedups are against: one degree for all, the least that holds the context limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFigures:
    """One global batch under one planner."""

    step: int
    sequences: int
    tokens: int
    step_s: float
    """By the cost model's formula; the optimizer's own time is not in it."""
    table_s: float | None = None
    """The same by the profile's measured tables; None where it has none."""
    lower_bound_s: float
    """No plan for this batch takes less."""
    solve_s: float | None
    """What planning took; None: the plan was not made here."""
    layout: str
    """Degrees by micro-batch, e.g. `<4> <2,1,1>`."""
    micro_batches: int
    compute_share: float
    exchange_share: float
    fixed_share: float
    idle_share: float
    """Shares of the step's device-seconds; the four add up to 1."""
    peak_memory_bytes: float
    """The most on a device."""
    tokens_by_degree: Mapping[int, int]
    sequences_by_degree: Mapping[int, Mapping[int, int]]
    """How many sequences of [2^band, 2^(band+1)) tokens a degree was assigned, by degree and band."""
    process_groups: tuple[tuple[int, int], ...]
    """First rank and degree of every group of more than one rank, each once."""


def step_figures(step: int, plan: Plan, lengths: LengthArray, profile: Profile, trusted: bool = False) -> StepFigures:
    """The figures of `plan` for a global batch of (K,) `lengths` in tokens.

    Args:
        trusted: whether the plan's own lower bound is taken; a file, or a planner of the user's, may claim any.

    Raises:
        ValueError: the plan is none, or not legal.
    """
    timeline = replay(plan, lengths, profile)
    if timeline.step_s == 0:
        raise ValueError(f"step_s=0 of {plan.planner}'s plan: the profile's costs are all 0; give one that has some")
    bound_s = plan.lower_bound_s
    if not bound_s or not trusted:
        bound_s = min(lower_bound_s(lengths, profile), timeline.step_s)
    shares = timeline.shares()
    return StepFigures(
        step=step,
        sequences=len(lengths),
        tokens=int(lengths.sum()),
        step_s=timeline.step_s,
        table_s=table_s(plan.micro_batches, lengths, profile),
        lower_bound_s=bound_s,
        solve_s=plan.solve_s or 0.0,
        layout=str(plan),
        micro_batches=len(timeline.micro_batches),
        compute_share=shares.compute,
        exchange_share=shares.exchange,
        fixed_share=shares.fixed,
        idle_share=shares.idle,
        peak_memory_bytes=max(span.memory_bytes for span in timeline.spans),
        **_by_degree(timeline, lengths),
        process_groups=tuple(sorted({(s.ranks[0], s.sp_degree) for s in timeline.spans if s.sp_degree > 1})),
    )


def _by_degree(timeline: Timeline, lengths: LengthArray) -> dict[str, Any]:
    tokens: dict[int, int] = {}
    sequences: dict[int, dict[int, int]] = {}
    for span in timeline.spans:
        tokens[span.sp_degree] = tokens.get(span.sp_degree, 0) + span.tokens
        counts = sequences.setdefault(span.sp_degree, {})
        for length in lengths[list(span.sequences)].tolist():
            band = length.bit_length() - 1
            counts[band] = counts.get(band, 0) + 1
    return {
        "tokens_by_degree": dict(sorted(tokens.items())),
        "sequences_by_degree": {degree: dict(sorted(sequences[degree].items())) for degree in sorted(sequences)},
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerFigures:
    """All steps of a case under one planner. Device-second shares are of the whole, not means of steps."""

    planner: str
    steps: tuple[StepFigures, ...]
    median_step_s: float
    total_s: float
    speedup: float
    """Seconds of all steps under the baseline, over those under this planner."""
    step_speedups: tuple[float, ...]
    """The same of each step."""
    table_speedup: float | None
    """Of all steps, by the profile's measured tables; None where it has none."""
    median_solve_s: float | None
    slowest_solve_s: float | None
    """None where no plan was made here."""
    compute_share: float
    exchange_share: float
    fixed_share: float
    idle_share: float
    micro_batches: float
    """The mean of the steps."""
    peak_memory_bytes: float
    tokens_per_s: float
    """Of all devices together."""
    tokens_by_degree: Mapping[int, float]
    """Share of all tokens that each degree was assigned."""
    process_groups: int
    """Different groups of more than one rank, over all steps."""

    def to_json(self) -> dict[str, Any]:
        document = asdict(self)
        steps = document.pop("steps")
        del document["planner"]
        return {**document, "steps": steps}


@dataclass(frozen=True, slots=True, kw_only=True)
class CaseFigures:
    """One corpus, context limit and number of devices under several planners, on the same global batches."""

    corpus: str
    """What the lengths came from."""
    profile: str
    """The profile's name."""
    num_devices: int
    devices_per_node: int
    memory_bytes: float
    """Of a device."""
    max_length: int
    """The context limit, in tokens; where none was given, the longest sequence."""
    batch_size: int
    seed: int | None
    """Of the order of the data; None: the lengths were one batch as they were given."""
    static_sp_degree: int
    """The degree of the baseline."""
    planners: Mapping[str, PlannerFigures]
    """In the order in which they were asked for."""
    refused: Mapping[str, str]
    """Planners that had no plan for some batch, with the first reason; they have no figures."""
    sentences: tuple[str, ...]
    """What the figures mean, in words: see `flexsp.simulate.verdict`."""

    def to_json(self) -> dict[str, Any]:
        return {
            **{
                name: getattr(self, name)
                for name in (
                    "corpus", "profile", "num_devices", "devices_per_node", "memory_bytes", "max_length", "batch_size",
                    "seed", "static_sp_degree",
                )
            },
            "iterations": len(next(iter(self.planners.values())).steps) if self.planners else 0,
            "sentences": list(self.sentences),
            "refused": dict(self.refused),
            "planners": {name: figures.to_json() for name, figures in self.planners.items()},
        }  # fmt: skip


def planner_figures(planner: str, steps: Sequence[StepFigures], baseline: Sequence[StepFigures]) -> PlannerFigures:
    """`steps` together, against the same steps of the baseline."""
    assert [s.step for s in steps] == [s.step for s in baseline] and steps, "both must have planned the same batches"
    total_s = sum(s.step_s for s in steps)
    tokens = sum(s.tokens for s in steps)
    solves_s = [s.solve_s for s in steps if s.solve_s is not None]
    degrees = sorted({degree for s in steps for degree in s.tokens_by_degree})

    def share(name: str) -> float:
        return float(sum(getattr(s, f"{name}_share") * s.step_s for s in steps) / total_s)

    return PlannerFigures(
        planner=planner,
        steps=tuple(steps),
        median_step_s=statistics.median(s.step_s for s in steps),
        total_s=total_s,
        speedup=sum(s.step_s for s in baseline) / total_s,
        step_speedups=tuple(b.step_s / s.step_s for b, s in zip(baseline, steps, strict=True)),
        table_speedup=_over(_table_total_s(baseline), _table_total_s(steps)),
        median_solve_s=statistics.median(solves_s) if solves_s else None,
        slowest_solve_s=max(solves_s, default=None),
        compute_share=share("compute"),
        exchange_share=share("exchange"),
        fixed_share=share("fixed"),
        idle_share=share("idle"),
        micro_batches=statistics.fmean(s.micro_batches for s in steps),
        peak_memory_bytes=max(s.peak_memory_bytes for s in steps),
        tokens_per_s=tokens / total_s,
        tokens_by_degree={d: sum(s.tokens_by_degree.get(d, 0) for s in steps) / tokens for d in degrees},
        process_groups=len({group for s in steps for group in s.process_groups}),
    )


def _table_total_s(steps: Sequence[StepFigures]) -> float | None:
    times = [s.table_s for s in steps]
    return None if None in times else sum(s for s in times if s is not None)


def _over(one: float | None, other: float | None) -> float | None:
    return one / other if one is not None and other else None
