"""The rules of benchmarks/soak.py, stated before it ran, and what they say of a series.

memory          by the Theil-Sen slope (the median of the slopes between all pairs of samples, which a few peaks do
                not move) after the first quarter, a process gains less than 1 % of its warm size in 1,000 steps:
                resident memory, and the pages that it alone has
open files      the median of the last fifth is not above that of the first fifth after the warm-up
threads         likewise
communicators   no more than the sets of ranks that the rules of placement allow: 2N-1 with powers of two
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import theilslopes

WARM_UP = 0.25
"""Of the steps."""
GROWTH = 0.01
"""Of the warm size, in 1,000 steps."""
MEMORY = ("rss_bytes", "own_bytes")
COUNTS = ("open_files", "threads")


@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """What one process held."""

    steps: list[int]
    columns: Mapping[str, list[int]]
    """By name, a value for each of `steps`."""


def verdict(series: Mapping[str, Series], steps: int) -> dict[str, dict[str, Any]]:
    """By process, warm sizes, slopes and whether the rules hold.

    Args:
        series: by process.
        steps: of the run; the first quarter is warm-up. A process with few samples after it is judged by none.
    """
    found = {}
    for name, one in series.items():
        warm = [i for i, step in enumerate(one.steps) if step >= WARM_UP * steps]
        if len(warm) < 10:
            found[name] = {"samples": len(warm), "holds": not name.startswith(("rank", "planner", "torchrun"))}
            continue
        at = [one.steps[i] for i in warm]
        columns = {key: [values[i] for i in warm] for key, values in one.columns.items()}
        memory = {key: growth(at, columns[key]) for key in MEMORY}
        counts = {key: ends(columns[key]) for key in COUNTS}
        holds = all(each["share_per_1000_steps"] < GROWTH for each in memory.values())
        holds = holds and all(last <= first for first, last in counts.values())
        found[name] = {"samples": len(warm), **memory, **counts, "holds": holds}
    return found


def growth(steps: list[int], values: list[int]) -> dict[str, float | None]:
    """The robust slope of bytes over steps, and its 95 % interval, as shares of the warm size in 1,000 steps."""
    warm, _ = ends(values)
    with np.errstate(invalid="ignore"):  # of an interval that there is not
        slope, _, low, high = theilslopes(values, steps)
    share, low_share, high_share = (
        round(1000 * float(each) / warm, 5) if math.isfinite(each) else None for each in (slope, low, high)
    )  # a series without any change has no interval
    return {
        "warm_bytes": warm,
        "bytes_per_1000_steps": round(1000 * float(slope)),
        "share_per_1000_steps": share,
        "low": low_share,
        "high": high_share,
    }


def ends(values: list[int]) -> tuple[float, float]:
    """Medians of the first and the last fifth."""
    fifth = max(1, len(values) // 5)
    return statistics.median(values[:fifth]), statistics.median(values[-fifth:])


def communicator_bound(world_size: int, degrees: Iterable[int]) -> int:
    """Sets of ranks that may share sequences: a power of two begins at a multiple of itself, others anywhere."""
    total = 0
    for degree in degrees:
        power_of_two = degree & (degree - 1) == 0
        total += world_size // degree if power_of_two else world_size - degree + 1
    return total
