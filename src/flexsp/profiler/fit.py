"""Fitting the cost model to measured times: weighted, robust, no coefficient below zero.

Every reading gives one equation, in seconds over its own seconds, so that the fit is of relative errors:

    seconds = count * fixed + (quadratic * squares + linear * tokens) / degree + exchange[degree] * tokens
              + count * latency[degree]

On a part of a model the terms of a layer count as often as the part has layers; what is left is the model's own: a
fixed time, that of gathering the head, and the head's seconds a token. Readings that were noisy weigh less; then
readings far from the fit weigh less and it is made again (Huber's weights), until nothing changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import lsq_linear

from flexsp.profile import FloatArray, Table
from flexsp.profiler.points import Mix, Part
from flexsp.profiler.probe import Reading

ROUNDS = 20
"""Of Huber's weights; they settle in a few."""
USUAL_ERROR = 0.02
"""Relative errors below this are never outliers, and a reading's noise never counts as less."""
LEAST_WEIGHT = 0.1
"""Of a reading, however noisy it was: one alone may speak of a coefficient."""
EXCHANGE_WEIGHT = 0.3
"""Weight of an exchange timed by itself, relative to a reading: steps decide where they can tell."""
TABLE_AT = 0.10
"""Where the formula misses a row of like sequences by this share, and by twice its noise, there are tables too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coefficients:
    """The cost model of a whole model, in seconds."""

    fixed_s: float
    quadratic_s: float
    linear_s: float
    exchange_s: Mapping[int, float]
    """By degree above 1: seconds a token of a group."""
    latency_s: Mapping[int, float]

    def group_s(self, degree: int, lengths: Sequence[int]) -> float:
        tokens = sum(lengths)
        work_s = self.quadratic_s * sum(s * s for s in lengths) + self.linear_s * tokens
        return work_s / degree + self.exchange_s.get(degree, 0.0) * tokens + self.latency_s.get(degree, 0.0)

    def mix_s(self, mix: Mix) -> float:
        """Seconds of one micro-batch."""
        return self.fixed_s + max(self.group_s(degree, lengths) for degree, lengths in mix)


def robust_nonnegative(features: FloatArray, seconds: FloatArray, weights: FloatArray | None = None) -> FloatArray:
    """Coefficients >= 0 that explain measured seconds, relative errors counting, outliers less.

    Args:
        features: (points, coefficients), each column scaled by whatever its coefficient multiplies.
        seconds: (points,), above 0.
        weights: (points,) how much each point counts; by default alike.

    Returns:
        (coefficients,).
    """
    relative = features / seconds[:, None]
    scale = np.abs(relative).max(axis=0)
    scale[scale == 0] = 1.0
    scaled = relative / scale
    given = np.ones(len(seconds)) if weights is None else weights
    huber = np.ones(len(seconds))
    solution = np.zeros(features.shape[1])
    for _ in range(ROUNDS):
        w = np.sqrt(given * huber)
        found = lsq_linear(scaled * w[:, None], w, bounds=(0.0, np.inf), method="bvls").x
        errors = np.abs(scaled @ found - 1.0)
        usual = max(USUAL_ERROR, 1.4826 * float(np.median(errors)))
        huber = np.minimum(1.0, 2.0 * usual / np.maximum(errors, 1e-12))
        if np.allclose(found, solution, rtol=1e-9, atol=1e-12):
            break
        solution = found
    return np.asarray(solution / scale, dtype=np.float64)


class Fit:
    """The coefficients that readings give, for any number of layers."""

    def __init__(self, readings: Sequence[Reading], degrees: Sequence[int], exchange_s: Mapping[int, float]) -> None:
        """
        Args:
            readings: timed points; at least one of each degree.
            degrees: of the readings.
            exchange_s: by degree above 1, seconds a token of a group that one layer's exchanges took by themselves.
        """
        self._above = [d for d in degrees if d > 1]
        self._readings = list(readings)
        rows = [self._row(reading) for reading in readings]
        seconds = [reading.seconds for reading in readings]
        weights = [max(LEAST_WEIGHT, (USUAL_ERROR / max(USUAL_ERROR, r.spread)) ** 2) for r in readings]
        layers = readings[0].part.layers if readings[0].part.whole else 1
        for degree, alone_s in exchange_s.items():
            row = np.zeros(len(rows[0]))
            row[3 + self._above.index(degree)] = 1.0
            rows.append(row)
            seconds.append(alone_s * layers)
            weights.append(EXCHANGE_WEIGHT)
        self._values = robust_nonnegative(np.array(rows), np.array(seconds), np.array(weights))

    def _row(self, reading: Reading) -> FloatArray:
        point, part = reading.point, reading.part
        layers, other = (1, 0.0) if part.whole else (part.layers, 1.0)
        row = np.zeros(6 + 2 * len(self._above))
        row[:3] = np.array([point.count, point.squares / point.degree, point.tokens / point.degree]) * layers
        row[:3] *= np.array([1, point.count, point.count])  # a point's lengths are of one of its micro-batches
        if point.degree > 1:
            at = 3 + self._above.index(point.degree)
            row[at] = point.count * point.tokens * layers
            row[at + len(self._above)] = point.count * layers
        row[-3:] = other * point.count, other * point.count * part.head, 0.0
        row[-1] = other * part.head * point.count * point.tokens / point.degree
        return row

    def for_part(self, part: Part) -> Coefficients:
        """Of a part that was measured."""
        return self.for_layers(1 if part.whole else part.layers, part.head)

    def for_layers(self, layers: int, head: float = 1.0) -> Coefficients:
        """Of a model of so many layers and this share of the vocabulary; (1, 1) where the readings are of all of it."""
        fixed, quadratic, linear = self._values[:3] * layers
        model_fixed, head_fixed, head_linear = self._values[-3:] * np.array([1.0, head, head])
        by_degree = np.maximum(self._values[3:-3], 0.0) * layers
        exchange, latency = by_degree[: len(self._above)], by_degree[len(self._above) :]
        return Coefficients(  # a bound of 0 is kept to rounding only, and a profile takes nothing below 0
            fixed_s=max(0.0, float(fixed + model_fixed + head_fixed)),
            quadratic_s=max(0.0, float(quadratic)),
            linear_s=max(0.0, float(linear + head_linear)),
            exchange_s=dict(zip(self._above, exchange.tolist(), strict=True)),
            latency_s=dict(zip(self._above, latency.tolist(), strict=True)),
        )

    def residuals(self) -> list[float]:
        """What the fit says over what was measured, less 1, by reading."""
        return [float(self._row(r) @ self._values) / r.seconds - 1.0 for r in self._readings]

    def tables(self, layers: int) -> dict[int, Table]:
        """Measured seconds a token by length and degree, where the formula misses a row by `TABLE_AT`.

        Rows are those of the first part, put in proportion to what the fit says of it and of the model.
        """
        whole = self.for_layers(layers)
        rows: dict[int, dict[int, float]] = {}
        worst, first = 0.0, self._readings[0].part
        for reading, residual in zip(self._readings, self.residuals(), strict=True):
            point, length = reading.point, reading.point.alike
            if length is None or reading.part != first:
                continue
            group_s = whole.group_s(point.degree, point.lengths)
            own_fixed_s = float(self._row(reading)[[0, -3, -2]] @ self._values[[0, -3, -2]])
            said_s = reading.seconds * (1.0 + residual) - own_fixed_s
            if said_s <= 0.0:
                continue
            measured_s = max(0.0, reading.seconds - own_fixed_s) * group_s / said_s
            worst = max(worst, abs(residual) if abs(residual) > 2.0 * reading.spread else 0.0)
            rows.setdefault(point.degree, {})[length] = measured_s / point.tokens
        if worst < TABLE_AT:
            return {}
        return {
            degree: Table(lengths=tuple(sorted(row)), seconds_per_token=tuple(row[s] for s in sorted(row)))
            for degree, row in rows.items()
        }
