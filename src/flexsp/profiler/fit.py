"""Fitting the cost model's coefficients to measured times."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


def fit_nonnegative(features: FloatArray, seconds: FloatArray) -> FloatArray:
    """Coefficients >= 0 that explain measured seconds with the least relative squared error.

    Tries every set of coefficients that stay above zero, which is exact and cheap for the few of the cost model.

    Args:
        features: (points, coefficients), each column scaled by whatever the coefficient multiplies.
        seconds: (points,), above 0.

    Returns:
        (coefficients,).
    """
    relative = features / seconds[:, None]
    scale = np.abs(relative).max(axis=0)
    scale[scale == 0] = 1.0
    scaled = relative / scale
    count = features.shape[1]
    best, best_error = np.zeros(count), float(len(seconds))
    for size in range(1, count + 1):
        for kept in combinations(range(count), size):
            solution = np.linalg.lstsq(scaled[:, kept], np.ones(len(seconds)), rcond=None)[0]
            error = float(((scaled[:, kept] @ solution - 1) ** 2).sum())
            if (solution >= 0).all() and error < best_error - 1e-15:
                best, best_error = np.zeros(count), error
                best[list(kept)] = solution
    return np.asarray(best / scale, dtype=np.float64)
