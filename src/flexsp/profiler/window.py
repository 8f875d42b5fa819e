"""The ratios that the last steps agree upon: a least squares fit over a window, which outliers do not move.

Every equation is `seconds = sum over terms of ratio * predicted seconds`. All steps of the window are fitted anew each
time, from a start that depends on no earlier result, so that no mistake outlives the steps it was made from:

1. One ratio for all terms: the median, over the seconds of the window, of what was measured over what was predicted.
2. A ratio of each term: least squares of errors relative to the larger of measured and predicted seconds. Steps that
   are far from it as a whole hardly count, being held up or of a machine that has changed; of the others, single groups
   that are far count less (Huber's weights). And again, until nothing changes.

Steps weigh alike, whatever number of groups they had, and later ones more: once the changed machine has most of the
weight, the steps before the change are those left out. An equation `ratio = 1` for each term, the only one that does
not fade, decides where plans say nothing of a term or no longer do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import lsq_linear

from flexsp.profile import FloatArray

FORGET = 0.93
"""What a step weighs one step later: the last ten weigh as much as all before them."""
PULL = 1e-4
"""Weight of the equation `ratio = 1` relative to that of a step."""
USUAL_ERROR = 0.03
"""Relative errors below this are never outliers."""
MIDDLE = 0.45
"""The share of the weight that decides what is usual. Below a half: ranks are held up rather than rushed."""
FAR = 2.0
"""An error is far where it is above what is usual by this factor."""
ROUNDS = 30
"""Of weights; they settle in a few."""
SETTLED = 1e-3
"""Ratios that change by less than this are final."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """Of the unknowns, each (terms,)."""

    usual: FloatArray
    """What they are where nothing was measured: a ratio is 1."""
    low: FloatArray
    high: FloatArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreed:
    """What most of the steps say."""

    ratios: FloatArray
    """(terms,) within bounds; those usual where there is no equation."""
    weights: FloatArray
    """(steps,) of each, by its age and by how far it is from the ratios."""


def middle(values: FloatArray, weights: FloatArray, share: float = MIDDLE) -> float:
    """That one of (n,) values, n > 0, below which there is this share of the weights."""
    order = np.argsort(values, kind="stable")
    up_to = np.cumsum(weights[order])
    at = int(np.searchsorted(up_to, share * up_to[-1]))
    return float(values[order[min(at, len(values) - 1)]])


def agree(steps: Sequence[tuple[FloatArray, FloatArray]], bounds: Bounds) -> Agreed:
    """What most of the steps agree upon.

    Args:
        steps: by step, the oldest first, (groups, terms) predicted seconds and (groups,) measured ones, above 0.
        bounds: of the unknowns.
    """
    age = np.asarray(FORGET ** np.arange(len(steps) - 1, -1, -1.0))
    groups = np.array([len(y) for _, y in steps])
    if not groups.sum():
        return Agreed(ratios=bounds.usual, weights=age)
    some = groups > 0
    x, y = np.concatenate([x for x, _ in steps]), np.concatenate([y for _, y in steps])
    given = np.repeat(age / np.maximum(groups, 1), groups)
    ends = np.cumsum(groups[some])[:-1]
    expected = np.maximum(x @ bounds.usual, 1e-12)
    ratios = np.clip(middle(y / expected, given * expected) * bounds.usual, bounds.low, bounds.high)
    near = np.ones(len(steps))
    for _ in range(ROUNDS):
        predicted = x @ ratios
        relative_to = np.maximum(predicted, y)
        errors = np.abs(y - predicted) / relative_to
        of_step = np.array([np.median(part) for part in np.split(errors, ends)])
        far = FAR * max(USUAL_ERROR, 1.4826 * middle(of_step, age[some]))
        near[some] = np.minimum(1.0, far / np.maximum(of_step, 1e-12)) ** 2
        weights = given * np.repeat(near, groups) * np.minimum(1.0, far / np.maximum(errors, 1e-12)) / relative_to**2
        before, ratios = ratios, _solved((x * weights[:, None]).T @ x, x.T @ (weights * y), bounds)
        if np.abs(ratios - before).max() < SETTLED:
            break
    return Agreed(ratios=ratios, weights=age * near)


def _solved(normal: FloatArray, right: FloatArray, bounds: Bounds) -> FloatArray:
    """(terms,) the solution of normal equations, the pull added, within bounds."""
    factor = np.linalg.cholesky(normal + PULL * np.eye(len(right)))
    solvable = np.linalg.solve(factor, right + PULL * bounds.usual)
    return np.asarray(lsq_linear(factor.T, solvable, bounds=(bounds.low, bounds.high), method="bvls").x)
