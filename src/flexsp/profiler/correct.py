"""Correcting a profile while training: how far measured times are from predicted ones, term by term.

A term of the cost model (attention, everything else that grows with tokens, the exchange of each degree, the fixed cost
of a micro-batch) is predicted in seconds; the unknown is by what ratio it is off. Each step gives equations:

    group        what its slowest rank was busy = sum over terms of ratio * predicted seconds + own * fixed_s
    micro-batch  elapsed                        = ratio * fixed_s + the largest of its groups' sums without `own`

`own` is the part of the fixed cost that a rank spends inside its layers: launches, not gathers. The second equation
takes what the ratios say of the groups, not what was measured: the slowest of many noisy groups takes longer than any
of them does on average, and a micro-batch pays for that every time, so it belongs to its fixed cost. Equations are
summed into normal equations that forget with time, each over its own seconds, far ones weighing less (Huber's weights),
with a pull towards 1 for what the plans do not tell apart. The ratios are their solution within bounds: a recursive
least squares fit that a stalled step cannot throw off. Pure: no clock, no ranks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np
from scipy.optimize import lsq_linear

from flexsp.lengths import LengthArray
from flexsp.plans import Plan
from flexsp.profile import FloatArray, Profile

FORGET = 0.97
"""What a step's equations weigh one step later."""
BOUNDS = (0.125, 8.0)
"""A ratio stays within these, whatever was measured."""
PULL = (0.03 / 0.5) ** 2
"""Weight of the equation `ratio = 1` relative to one group's: 3 % of noise a group, against ratios that are 0.5 off."""
MOVED = 0.05
"""A new profile is made once a ratio has moved by this share."""
USUAL_ERROR = 0.03
"""Relative errors below this are never outliers."""
MEMORY = 15
"""Steps before, the median of whose usual errors says what is usual now."""
STALL = 5.0
"""A step whose errors are usually above what is usual by this factor is left out: a rank was held up by something..."""
PATIENCE = 3
"""...unless it is one of so many in a row: then the machine has changed..."""
OLD = 0.05
"""...and earlier equations are kept with this weight."""
HELD_UP = 0.5
"""Of a micro-batch's seconds: what it takes beyond its usual fixed cost by more than this weighs less."""
OWN = 2
"""Place of `own` among the unknowns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """What one step took."""

    elapsed_s: tuple[float, ...]
    """By micro-batch, of its slowest rank."""
    group_s: tuple[tuple[float, ...], ...]
    """By micro-batch and group: what the group's slowest rank was busy, waiting for other groups excluded."""


class Correction:
    """The ratios of one run."""

    def __init__(self, base: Profile) -> None:
        """`base`: the profile that the ratios are relative to."""
        self.base = base
        self._degrees = [d for d in base.sp_degrees if d > 1]
        self.names = ("attention", "linear", "own", *(f"exchange {d}" for d in self._degrees))
        self._normal = np.zeros((len(self.names), len(self.names)))
        self._right = np.zeros(len(self.names))
        self._fixed = np.zeros(2)  # weight and weighted sum of the fixed ratio
        self._errors: deque[float] = deque(maxlen=MEMORY)
        self._stalled = 0
        self._ratios = np.ones(len(self.names))
        self._ratios[OWN] = 0.0
        self._fixed_ratio = 1.0
        self._applied = self.ratios

    @property
    def ratios(self) -> dict[str, float]:
        """By term, what measured seconds are over the base profile's; `own` apart, which is a share of fixed_s."""
        found = dict(zip(self.names, self._ratios.tolist(), strict=True))
        del found["own"]
        return {**found, "fixed": self._fixed_ratio}

    def observe(self, plan: Plan, lengths: LengthArray, times: StepTimes) -> Profile | None:
        """Takes in one step; the corrected profile where a ratio has moved since the last one, else None."""
        rows = self._rows(plan, lengths)
        pairs = [
            (row, s)
            for row, s in zip(chain.from_iterable(rows), chain.from_iterable(times.group_s), strict=True)
            if s > 0.0
        ]
        if not pairs:
            return None
        x, y = np.array([row for row, _ in pairs]), np.array([s for _, s in pairs])
        predicted = np.maximum(x @ self._ratios, 1e-9)
        errors = np.abs(y / predicted - 1.0)
        own_usual = 1.4826 * float(np.median(errors))
        usual = max(USUAL_ERROR, float(np.median(self._errors)) if self._errors else own_usual)
        if self._errors and own_usual > STALL * usual:
            self._stalled += 1
            if self._stalled < PATIENCE:
                return None
            usual = own_usual  # so it is from now on, and what came before hardly counts
            self._errors.clear()
            self._normal, self._right, self._fixed = (OLD * kept for kept in (self._normal, self._right, self._fixed))
        self._stalled = 0
        self._errors.append(own_usual)
        weights = np.minimum(1.0, 2.0 * usual / np.maximum(errors, 1e-12)) / predicted**2
        self._normal = FORGET * self._normal + (x * weights[:, None]).T @ x
        self._right = FORGET * self._right + x.T @ (weights * y)
        self._solve()
        self._observe_fixed(rows, times)
        now = self.ratios
        if all(abs(now[name] / self._applied[name] - 1.0) <= MOVED for name in now):
            return None
        self._applied = now
        return corrected(self.base, now)

    def _rows(self, plan: Plan, lengths: LengthArray) -> list[list[FloatArray]]:
        """Predicted seconds by term, of every group of every micro-batch."""
        compute, exchange = self.base.compute, self.base.exchange_s_per_token
        rows: list[list[FloatArray]] = []
        for micro_batch in plan.micro_batches:
            policy = micro_batch.policy
            factor = self.base.memory.policies[policy].compute_factor if policy else 1.0
            rows.append([])
            for group in micro_batch.groups:
                degree, tokens = group.sp_degree, lengths[list(group.sequences)].astype(np.float64)
                row = np.zeros(len(self.names))
                row[0] = factor * compute.quadratic_s * float((tokens * tokens).sum()) / degree
                row[1] = factor * compute.linear_s * float(tokens.sum()) / degree
                row[OWN] = compute.fixed_s
                if degree > 1:
                    at = 3 + self._degrees.index(degree)
                    row[at] = float(tokens.sum()) * exchange(degree) + self.base.latency_s(degree)
                rows[-1].append(row)
        return rows

    def _solve(self) -> None:
        """The ratios of all equations so far, within bounds."""
        towards = np.ones(len(self.names))
        towards[OWN] = 0.0
        factor = np.linalg.cholesky(self._normal + PULL * np.eye(len(towards)))
        right = np.linalg.solve(factor, self._right + PULL * towards)
        low, high = np.full(len(towards), BOUNDS[0]), np.full(len(towards), BOUNDS[1])
        low[OWN], high[OWN] = 0.0, 1.0
        self._ratios = lsq_linear(factor.T, right, bounds=(low, high), method="bvls").x

    def _observe_fixed(self, rows: list[list[FloatArray]], times: StepTimes) -> None:
        """The fixed cost: what a micro-batch took beyond what the ratios say of its slowest group."""
        fixed_s = self.base.compute.fixed_s
        if fixed_s <= 0.0:
            return
        without_own = np.where(np.arange(len(self.names)) == OWN, 0.0, self._ratios)
        forget = FORGET ** (1.0 / len(times.elapsed_s))
        for elapsed_s, groups in zip(times.elapsed_s, rows, strict=True):
            slowest_s = max((float(row @ without_own) for row in groups), default=0.0)
            ratio = min(max((elapsed_s - slowest_s) / fixed_s, BOUNDS[0]), BOUNDS[1])
            usual = HELD_UP * elapsed_s / fixed_s  # noise is in proportion to the micro-batch, not to its fixed cost
            weight = min(1.0, usual / max(abs(ratio - self._fixed_ratio), 1e-12)) if self._fixed[0] else 1.0
            self._fixed = forget * self._fixed + weight * np.array([1.0, ratio])
            weight_sum, ratio_sum = self._fixed + PULL
            self._fixed_ratio = float(ratio_sum / weight_sum)


def corrected(base: Profile, ratios: Mapping[str, float]) -> Profile:
    """`base` with every term multiplied by its ratio; tables in proportion to the formula at their lengths."""
    exchange = {d: ratios[f"exchange {d}"] for d in base.sp_degrees if d > 1}
    compute, all_to_all = base.compute, base.all_to_all
    new = replace(
        base,
        compute=replace(
            compute,
            quadratic_s=compute.quadratic_s * ratios["attention"],
            linear_s=compute.linear_s * ratios["linear"],
            fixed_s=compute.fixed_s * ratios["fixed"],
        ),
        all_to_all=replace(
            all_to_all,
            bandwidth_bytes_per_s={d: v / exchange.get(d, 1.0) for d, v in all_to_all.bandwidth_bytes_per_s.items()},
            latency_s={d: v * exchange.get(d, 1.0) for d, v in all_to_all.latency_s.items()},
        ),
        provenance={**base.provenance, "correction": dict(ratios)},
    )
    tables = {
        degree: replace(
            table,
            seconds_per_token=tuple(
                seconds * new.group_s(degree, [s]) / base.group_s(degree, [s]) if base.group_s(degree, [s]) else seconds
                for s, seconds in zip(table.lengths, table.seconds_per_token, strict=True)
            ),
        )
        for degree, table in base.tables.items()
    }
    return replace(new, tables=tables)


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
