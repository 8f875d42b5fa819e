"""A batch as the search of `flex` sees it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

import numpy as np

from flexsp.lengths import LengthArray
from flexsp.planner.degrees import usable_degrees
from flexsp.planner.packing import Space, space_for
from flexsp.planner.placement import few_layouts
from flexsp.planner.tables import Ints, Tables, tables
from flexsp.profile import Profile

FEW = 24
"""With at most so many sequences, every mode of filling is tried everywhere: it costs nothing."""
STEPS = 6
"""Bisections for the least time within which a micro-batch holds what it must."""


@dataclass
class Problem:
    """What all steps of one search share."""

    t: Tables
    deadline: float | None
    """`time.perf_counter()` at which to stop; None: after a fixed effort."""
    space: Space = field(init=False)
    few: bool = field(init=False)
    """Whether there are so few sequences that everything is tried."""
    manners: int = field(init=False)
    """Modes of filling for each policy: the p-th policy's are those from p * manners on."""
    modes: Ints = field(init=False)
    """All modes of filling."""
    plain: Ints = field(init=False)
    """Those tried everywhere: one for each policy, groups of any degree."""
    steps: int = field(init=False)

    def __post_init__(self) -> None:
        num_degrees = len(self.t.degrees)
        self.space = space_for(self.t)
        self.few = len(self.t.tokens) <= FEW
        self.manners = num_degrees + len(self.t.layouts)
        self.modes = np.arange(len(self.t.factor) * self.manners)
        self.plain = self.modes[self.modes % self.manners < (num_degrees if self.few else 1)]
        self.steps = -10 if self.few else STEPS

    def late(self) -> bool:
        return self.deadline is not None and time.perf_counter() >= self.deadline


def problem_of(lengths: LengthArray, profile: Profile, deadline: float | None = None) -> Problem:
    """The problem of a batch; with few sequences, layouts worth trying as such belong to it."""
    degrees = usable_degrees(profile)
    layouts = few_layouts(degrees, profile, len(lengths)) if len(lengths) <= FEW else []
    return Problem(tables(lengths, profile, degrees, layouts), deadline)
