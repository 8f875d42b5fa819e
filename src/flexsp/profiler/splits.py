"""How each degree splits into heads x context: every split that serves it is timed, and the fastest is kept.

Splits far behind after their first time are not timed again: of high degrees there are many."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flexsp.parallel import layouts_of
from flexsp.parallel.model import attention_of
from flexsp.parallel.needs import Attention
from flexsp.profile import Layout
from flexsp.profiler.points import Point, row_tokens
from flexsp.profiler.probe import Probe
from flexsp.track import Track

ROWS = (1, 4)
"""A full row in so many sequences: high degrees are for long ones."""
ROUNDS = 3
"""Of the splits in turn, so that what else the machine does falls on all of them alike."""
HOPELESS = 1.5
"""So many times the fastest in the first round: not timed again. What else the machine does seldom takes as much.
The one with the most Ulysses is timed on all the same: it is what runs unless another is faster."""
WORTH = 0.03
"""Of its seconds that a split with less Ulysses must save: below that it is noise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Splits:
    """What was chosen, and why."""

    layouts: Mapping[int, Layout]
    """Of the degrees that are not Ulysses alone."""
    seconds: Mapping[int, Mapping[str, float]]
    """By degree and split, "2x4" being ulysses x ring: the two rows together; empty where there was no choice."""


def measured_splits(probe: Probe, tokens: int, degrees: Sequence[int], track: Track) -> Splits:
    """Times every split of every degree. A collective; the same answer on all ranks.

    Args:
        probe: the model on its ranks; its layouts are left as they were.
        tokens: of a rank.
        degrees: to decide about.
        track: shows progress.
    """
    before = probe.layouts
    layouts, seconds = {}, {}
    for degree, say in track([d for d in degrees if d > 1], "choosing how degrees split"):
        candidates = served(attention_of(probe.model), layouts_of(probe.model.config, degree), degree)
        taken: dict[str, float] = {}
        if len(candidates) > 1:
            taken = {name_of(each): each_s for each, each_s in _timed(probe, tokens, degree, candidates)}
            seconds[degree] = taken
        chosen = fastest(candidates, taken)
        if chosen.ring > 1:
            layouts[degree] = chosen
        said = "".join(f", {name} {each_s:.4f} s" for name, each_s in taken.items())
        say(f"sp_degree {degree} runs as ulysses x ring = {name_of(chosen)}{said}")
    probe.layouts = before
    return Splits(layouts=layouts, seconds=seconds)


def served(attention: Attention, layouts: Sequence[Layout], degree: int) -> list[Layout]:
    """Those in which a kernel computes the model's attention.

    Raises:
        ValueError: in none.
    """
    found, why = [], ""
    for layout in layouts:
        try:
            attention.check([layout])
        except ValueError as error:
            why = str(error)
        else:
            found.append(layout)
    if not found:
        raise ValueError(f"sp_degree={degree} cannot run: {why}; or leave the degree out of planner.sp_degrees")
    return found


def fastest(candidates: Sequence[Layout], seconds: Mapping[str, float]) -> Layout:
    """The split to use: of those within `WORTH` of the fastest, the one with the most Ulysses."""
    if not seconds:
        return candidates[0]
    limit_s = min(seconds.values()) / (1.0 - WORTH)
    return next(each for each in candidates if seconds[name_of(each)] <= limit_s)


def name_of(layout: Layout) -> str:
    """ "2x4": ulysses x ring."""
    return f"{layout.ulysses}x{layout.ring}"


def _timed(probe: Probe, tokens: int, degree: int, candidates: Sequence[Layout]) -> list[tuple[Layout, float]]:
    row = row_tokens(tokens, degree)
    points = [Point(degree, (max(1, row // count),) * count) for count in ROWS]
    warm_up = Point(degree, (max(1, row // 16),))  # makes communicators, which may take seconds
    rounds: list[list[float]] = [[] for _ in candidates]
    for number in range(ROUNDS):
        least_s = min((taken[0] for taken in rounds if taken), default=0.0)
        for layout, taken in zip(candidates, rounds, strict=True):
            if number and layout != candidates[0] and taken[0] > HOPELESS * least_s:
                continue
            probe.layouts = {**probe.layouts, degree: layout}
            if not number:
                probe.once(warm_up.mixes(probe.world_size))
            taken.append(sum(probe.once(point.mixes(probe.world_size)) for point in points))
    return [(layout, statistics.median(taken)) for layout, taken in zip(candidates, rounds, strict=True)]
