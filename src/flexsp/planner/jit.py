"""Compiles the planner's kernels: numba, cached on disk, so that only the first process ever waits for it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import numba

P = ParamSpec("P")
R = TypeVar("R")


def kernel(function: Callable[P, R]) -> Callable[P, R]:
    """`function` compiled at its first call; machine code is kept beside the source (or in numba's user cache)."""
    return _compiled(function)


def inlined(function: Callable[P, R]) -> Callable[P, R]:
    """A small kernel whose code is copied into its callers.

    Passing a named tuple of arrays counts references to each of them, which costs more than what such a kernel does.
    """
    return _compiled(function, inline="always")


def _compiled(function: Callable[P, R], **options: Any) -> Callable[P, R]:
    dispatcher: Any = numba.njit(function, cache=True, nogil=True, **options)
    # numba compares a cached kernel with its own source file alone, but kernels call those of other files.
    cached = getattr(getattr(dispatcher, "_cache", None), "_cache_file", None)
    if cached is not None:
        cached._source_stamp = _sources_stamp()
    return cast("Callable[P, R]", dispatcher)


@cache
def _sources_stamp() -> tuple[tuple[str, int, int], ...]:
    """Changes whenever a file of the planner does."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files)
