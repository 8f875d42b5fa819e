"""The micro-batches of a run by their shape: what each mix of degrees took and was predicted to, and its idle."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

from flexsp.plans import degrees_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """All micro-batches of one mix of degrees."""

    degrees: str
    """`<4,2,2>`."""
    count: int
    seconds: float
    """Of all together."""
    median_s: float
    ratio: float | None
    """Measured over predicted seconds, the median; None where nothing was predicted."""
    idle_share: float
    """Of their rank-seconds."""


def shapes(rows: Iterable[Mapping[str, Any]]) -> list[Shape]:
    """Those that took the most time first.

    Args:
        rows: of metrics.jsonl; those without times of micro-batches are left out.
    """
    found: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    for row in rows:
        if "micro_batch_s" not in row or "micro_batches" not in row:
            continue
        missing = [0.0] * len(row["micro_batch_s"])
        predicted, idle = (row.get(key, missing) for key in ("predicted_micro_batch_s", "micro_batch_idle_share"))
        for degrees, *numbers in zip(row["micro_batches"], row["micro_batch_s"], predicted, idle, strict=True):
            found[f"<{degrees_text(degrees)}>"].append((numbers[0], numbers[1], numbers[2]))
    made = [_shape(text, measured) for text, measured in found.items()]
    return sorted(made, key=lambda shape: (-shape.seconds, shape.degrees))


def _shape(degrees: str, measured: list[tuple[float, float, float]]) -> Shape:
    """`measured`: of each micro-batch seconds, predicted seconds and the share that was idle."""
    seconds = math.fsum(s for s, _, _ in measured)
    ratios = [s / predicted for s, predicted, _ in measured if predicted > 0]
    return Shape(
        degrees=degrees,
        count=len(measured),
        seconds=seconds,
        median_s=median(s for s, _, _ in measured),
        ratio=median(ratios) if ratios else None,
        idle_share=math.fsum(s * idle for s, _, idle in measured) / seconds if seconds > 0 else 0.0,
    )
