"""Compiles a kernel of the planner: numba, cached on disk, so that only the first process ever waits for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar, cast

import numba

P = ParamSpec("P")
R = TypeVar("R")


def kernel(function: Callable[P, R]) -> Callable[P, R]:
    """`function` compiled at its first call; machine code is kept beside the source (or in numba's user cache)."""
    return cast("Callable[P, R]", numba.njit(function, cache=True, nogil=True))
