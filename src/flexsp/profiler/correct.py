"""Correcting a profile while training: how far measured times are from predicted ones, term by term.

A term of the cost model (attention, everything else that grows with tokens, the exchange of each degree, the fixed cost
of a micro-batch) is predicted in seconds; the unknown is by what ratio it is off. Each step gives equations:

    group        what its slowest rank was busy = sum over terms of ratio * predicted seconds + own * fixed_s
    micro-batch  elapsed                        = ratio * fixed_s + the largest of its groups' sums without `own`

`own` is the part of the fixed cost that a rank spends inside its layers: launches, not gathers. The second equation
takes what the ratios say of the groups, not what was measured: the slowest of many noisy groups takes longer than any
of them does on average, and a micro-batch pays for that every time, so it belongs to its fixed cost.

Tables were measured where the formula does not hold, so its ratios say nothing of them. A table has one ratio, that of
its degree, from the same groups:

    group        what its slowest rank was busy = ratio * seconds by its degree's table + own * fixed_s

The ratios are what the last `WINDOW` steps agree upon (`flexsp.profiler.window`): a fit made anew at each step, whose
equations join it while the oldest leave, so that no stalled step counts for longer. Pure: no clock, no ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from flexsp.lengths import LengthArray
from flexsp.plans import Group, MicroBatch, Plan
from flexsp.profile import FloatArray, Profile
from flexsp.profiler.window import Agreed, Bounds, agree, middle

BOUNDS = (0.125, 8.0)
"""A ratio stays within these, whatever was measured."""
WINDOW = 64
"""Steps that count, the older the less."""
LEAST = 8
"""Steps to have seen before ratios are taken from them: of fewer, three that were held up could be the most."""
MOVED = 0.05
"""A new profile is made once a ratio has moved by this share."""
MOST_GROUPS, MOST_MICRO_BATCHES = 64, 16
"""Of a micro-batch and of a step, how many are kept at the most, spread evenly: the window's memory is bounded."""
OWN = 2
"""Place of `own` among the formula's terms; it is the last of the tables'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """What one step took."""

    elapsed_s: tuple[float, ...]
    """By micro-batch, of its slowest rank."""
    group_s: tuple[tuple[float, ...], ...]
    """By micro-batch and group: what the group's slowest rank was busy, waiting for other groups excluded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Equations:
    """What a micro-batch says of the ratios. G = its groups that are kept."""

    formula: FloatArray
    """(G, terms) predicted seconds."""
    table: FloatArray
    """(G, tables + 1) seconds by the table of a group's degree, and the fixed cost; zeros where there is no table."""
    measured: FloatArray
    """(G,) seconds; 0 where none was measured."""
    elapsed_s: float


class Correction:
    """The ratios of one run."""

    def __init__(self, base: Profile, ratios: Mapping[str, float] | None = None) -> None:
        """
        Args:
            base: the profile that the ratios are relative to, the one that the run started from.
            ratios: what the run had learned before it was started again, of any term; they hold until `LEAST` steps
                have been seen.
        """
        self.base = base
        self._degrees = [d for d in base.sp_degrees if d > 1]
        self._tables = sorted(base.tables)
        self._formula_names = ["attention", "linear", "own", *(f"exchange {d}" for d in self._degrees)]
        self._formula_bounds = _bounds(len(self._formula_names), own=OWN)
        self._table_bounds = _bounds(len(self._tables) + 1, own=len(self._tables))
        self._steps: deque[list[_Equations]] = deque(maxlen=WINDOW)
        learned = {} if ratios is None else ratios
        self.ratios = {name: min(max(learned.get(name, 1.0), BOUNDS[0]), BOUNDS[1]) for name in self.names}
        """By term, what measured seconds are over the base profile's."""
        self.applied = self.ratios
        """Those of the last profile that was made."""

    @property
    def names(self) -> list[str]:
        """Of the ratios: the formula's terms without `own`, which is a share of fixed_s, and the tables."""
        formula = [name for name in self._formula_names if name != "own"]
        return [*formula, "fixed", *(f"table {d}" for d in self._tables)]

    def observe(self, plan: Plan, lengths: LengthArray, times: StepTimes) -> Profile | None:
        """Takes in one step; the corrected profile where a ratio has moved since the last one, else None."""
        if not any(s > 0.0 for groups in times.group_s for s in groups):
            return None
        measured = list(zip(plan.micro_batches, times.group_s, times.elapsed_s, strict=True))
        kept = measured[_every(len(measured), MOST_MICRO_BATCHES)]
        self._steps.append([self._equations(*one, lengths) for one in kept])
        if len(self._steps) < LEAST:
            return None
        self.ratios = self._agreed()
        if all(abs(self.ratios[name] / self.applied[name] - 1.0) <= MOVED for name in self.names):
            return None
        self.applied = self.ratios
        return self.profile()

    def profile(self) -> Profile:
        """The base profile, corrected by the ratios last applied."""
        return corrected(self.base, self.applied)

    def _equations(
        self, micro_batch: MicroBatch, group_s: Sequence[float], elapsed_s: float, lengths: LengthArray
    ) -> _Equations:
        kept = list(zip(micro_batch.groups, group_s, strict=True))[_every(len(group_s), MOST_GROUPS)]
        return _Equations(
            formula=np.array([self._formula_s(group, micro_batch.policy, lengths) for group, _ in kept]),
            table=np.array([self._table_s(group, micro_batch.policy, lengths) for group, _ in kept]),
            measured=np.array([s for _, s in kept]),
            elapsed_s=elapsed_s,
        )

    def _formula_s(self, group: Group, policy: str | None, lengths: LengthArray) -> FloatArray:
        """(terms,) predicted seconds of a group."""
        compute, degree = self.base.compute, group.sp_degree
        factor = self.base.memory.policies[policy].compute_factor if policy else 1.0
        tokens = lengths[list(group.sequences)].astype(np.float64)
        row = np.zeros(len(self._formula_names))
        row[0] = factor * compute.quadratic_s * float((tokens * tokens).sum()) / degree
        row[1] = factor * compute.linear_s * float(tokens.sum()) / degree
        row[OWN] = compute.fixed_s
        if degree > 1:
            at = OWN + 1 + self._degrees.index(degree)
            row[at] = float(tokens.sum()) * self.base.exchange_s_per_token(degree) + self.base.latency_s(degree)
        return row

    def _table_s(self, group: Group, policy: str | None, lengths: LengthArray) -> FloatArray:
        """(tables + 1,) seconds of a group by the table of its degree, and the fixed cost; zeros without a table."""
        row = np.zeros(len(self._tables) + 1)
        if group.sp_degree in self.base.tables:
            of_group = lengths[list(group.sequences)].tolist()
            row[self._tables.index(group.sp_degree)] = self.base.group_table_s(group.sp_degree, of_group, policy)
            row[-1] = self.base.compute.fixed_s
        return row

    def _agreed(self) -> dict[str, float]:
        """The ratios of all steps in the window."""
        steps = [[np.concatenate(kind) for kind in zip(*((m.formula, m.table, m.measured) for m in step), strict=True)]
                 for step in self._steps]  # fmt: skip
        formula = agree([(x[y > 0], y[y > 0]) for x, _, y in steps], self._formula_bounds)
        by_table = [(y > 0) & x.any(axis=1) for _, x, y in steps]
        table = agree(
            [(x[known], y[known]) for (_, x, y), known in zip(steps, by_table, strict=True)], self._table_bounds
        )
        found = dict(zip(self._formula_names, formula.ratios.tolist(), strict=True))
        del found["own"]
        tables = {f"table {d}": ratio for d, ratio in zip(self._tables, table.ratios.tolist(), strict=False)}
        return {**found, "fixed": self._fixed(formula, table), **tables}

    def _fixed(self, formula: Agreed, table: Agreed) -> float:
        """The fixed cost: what micro-batches took beyond what the ratios say of their slowest group, in the median.

        Of a group whose degree has a table, by that: the formula's error is no part of the fixed cost.
        """
        fixed_s = self.base.compute.fixed_s
        if fixed_s <= 0.0:
            return 1.0
        by_formula, by_table = formula.ratios.copy(), table.ratios.copy()
        by_formula[OWN] = by_table[-1] = 0.0
        found, weights = [], []
        for weight, step in zip(np.minimum(formula.weights, table.weights), self._steps, strict=True):
            for one in step:
                group_s = np.where(one.table.any(axis=1), one.table @ by_table, one.formula @ by_formula)
                found.append((one.elapsed_s - float(group_s.max())) / fixed_s)
                weights.append(weight / len(step))
        return min(max(middle(np.array(found), np.array(weights), 0.5), BOUNDS[0]), BOUNDS[1])


def _bounds(terms: int, own: int) -> Bounds:
    usual, low, high = np.ones(terms), np.full(terms, BOUNDS[0]), np.full(terms, BOUNDS[1])
    usual[own], low[own], high[own] = 0.0, 0.0, 1.0
    return Bounds(usual=usual, low=low, high=high)


def _every(number: int, most: int) -> slice:
    """At most so many of a number of items, spread evenly over them."""
    return slice(None, None, -(-number // most))


def corrected(base: Profile, ratios: Mapping[str, float]) -> Profile:
    """`base` with every term, and every table, multiplied by its ratio; what has none stays."""
    exchange = {d: ratios.get(f"exchange {d}", 1.0) for d in base.sp_degrees}
    compute, all_to_all = base.compute, base.all_to_all
    return replace(
        base,
        compute=replace(
            compute,
            quadratic_s=compute.quadratic_s * ratios.get("attention", 1.0),
            linear_s=compute.linear_s * ratios.get("linear", 1.0),
            fixed_s=compute.fixed_s * ratios.get("fixed", 1.0),
        ),
        all_to_all=replace(
            all_to_all,
            bandwidth_bytes_per_s={d: v / exchange.get(d, 1.0) for d, v in all_to_all.bandwidth_bytes_per_s.items()},
            latency_s={d: v * exchange.get(d, 1.0) for d, v in all_to_all.latency_s.items()},
        ),
        tables={
            degree: replace(
                table, seconds_per_token=tuple(s * ratios.get(f"table {degree}", 1.0) for s in table.seconds_per_token)
            )
            for degree, table in base.tables.items()
        },
    )


def times_of(plan: Plan, elapsed_s: Sequence[Sequence[float]], busy_s: Sequence[Sequence[float]]) -> StepTimes:
    """Step times from what every rank measured.

    Args:
        plan: what was run.
        elapsed_s, busy_s: by rank and micro-batch.
    """
    return StepTimes(
        elapsed_s=tuple(max(rank[b] for rank in elapsed_s) for b in range(len(plan.micro_batches))),
        group_s=tuple(
            tuple(max(busy_s[rank][b] for rank in group.ranks) for group in micro_batch.groups)
            for b, micro_batch in enumerate(plan.micro_batches)
        ),
    )
