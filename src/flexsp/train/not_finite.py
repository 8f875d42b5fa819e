"""Steps whose loss or gradients are infinite or no numbers: they never reach the weights.

One such step of Adam makes every weight that it touches no number, the next checkpoints replace the good ones, and
nothing is left to go on from. Loss and gradient norm are the same on all ranks, so all decide alike without asking.
"""

from __future__ import annotations

import math

ERROR, SKIP = "error", "skip"
MOST_IN_A_ROW = 10
"""After so many steps left out one after the other the weights themselves must be at fault."""


class NotFiniteError(RuntimeError):
    """Raised on all ranks alike, before the step has changed any weight."""


class NotFinite:
    """What a run does about such steps."""

    def __init__(self, how: str) -> None:
        """`how`: `ERROR` or `SKIP`."""
        self._how = how
        self._in_a_row = 0

    def why_left_out(self, step: int, loss: float, grad_norm: float) -> str:
        """Why the step must not change the weights; empty where it may.

        Raises:
            NotFiniteError: it ends the run, by `how` or after too many in a row.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self._in_a_row = 0
            return ""
        self._in_a_row += 1
        said = f"step {step}: loss={loss:g} and grad_norm={grad_norm:g} must be finite"
        if self._how == ERROR:
            raise NotFiniteError(
                f"{said}; it has changed no weight: with train.on_not_finite='skip' the same command goes on from the "
                f"last checkpoint, if there is one, and leaves such steps out, with another run.dir and "
                f"checkpoint.resume it takes a lower train.lr"
            )
        if self._in_a_row >= MOST_IN_A_ROW:
            raise NotFiniteError(
                f"{said}, nor were those of the {MOST_IN_A_ROW - 1} steps before it, which were left out; begin "
                f"another run.dir from an earlier checkpoint (checkpoint.resume), with a lower train.lr say"
            )
        return f"{said}; left out: train.on_not_finite='skip'"
