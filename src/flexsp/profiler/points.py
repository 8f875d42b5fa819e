"""What is measured: rows of like sequences, run on all ranks at once, and mixed micro-batches held out from the fit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from flexsp.data.batch import PlannedBatch
from flexsp.data.packing import IntArray
from flexsp.plans import Group, MicroBatch, Plan
from flexsp.profile import Layout

Mix = list[tuple[int, tuple[int, ...]]]
"""One micro-batch: by group its degree and the lengths that it holds, larger degrees first."""

SHARES = (1, 4, 16)
"""Sequences of a full row, from a long one to many short ones, where a few rows must do."""
MANY = SHARES[-1]
"""Sequences of which rows of the fixed terms are made, and those of full rows even where they are short."""
SHORTEST = 16
"""Tokens of the shortest sequences that are timed."""
SHORT = 128
"""Rows large enough to hold more than 16 sequences of so many tokens a rank are timed with more, too: a GPU's rows have
thousands of short sequences, at which it is slower a token."""
FULL_ROW = 64 * 1024
"""Tokens of a row that every degree fills, as far as its ranks hold as many. Beyond, a sequence's attention grows
faster than the ranks that share it, see `row_tokens`."""


@dataclass(frozen=True, slots=True)
class Point:
    """One timed mix: every group of `degree` holds sequences of these lengths, in `count` micro-batches."""

    degree: int
    lengths: tuple[int, ...]
    count: int = 1

    def __str__(self) -> str:
        return f"sp_degree {self.degree}, {self.count} x {len(self.lengths)} of {self.lengths[0]:,} tokens"

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def squares(self) -> int:
        return sum(s * s for s in self.lengths)

    @property
    def alike(self) -> int | None:
        """The one length of a full row's sequences; None for a point that serves the fixed terms."""
        return self.lengths[0] if self.count == 1 and len(set(self.lengths)) == 1 else None

    def mixes(self, world_size: int) -> list[Mix]:
        """As many groups of the degree as there is room for, alike."""
        return [[(self.degree, self.lengths)] * (world_size // self.degree)] * self.count


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The model that a point runs on: the whole one, or few of its layers with some of its vocabulary."""

    layers: int
    """Of this part; the seconds of a layer are its own unknowns where the model is not whole."""
    head: float
    """Share of the model's vocabulary."""
    whole: bool = False


def row_tokens(tokens: int, degree: int) -> int:
    """Tokens of the longest row that is timed at a degree.

    Above `FULL_ROW` as many as cost a rank no more attention than a row of degree 1, as one sequence: s^2 / degree =
    tokens^2. So what is timed of a high degree takes no longer than of a low one; at degree 64 of 32K tokens a rank it
    is still 4K tokens on each.
    """
    return min(tokens * degree, max(FULL_ROW, round(tokens * math.sqrt(degree))))


def shares(tokens: int) -> list[int]:
    """How many sequences full rows of `tokens` a rank are timed with."""
    most = max(MANY, tokens // SHORT)
    return [4**power for power in range(most.bit_length()) if 4**power <= most]


def fit_points(tokens: int, degrees: Sequence[int]) -> list[Point]:
    """Mixes that tell the terms of the cost model apart; none above `tokens` a rank, none above `row_tokens`.

    Where memory is short, micro-batches are far from as full as the largest row, and a device that has little to do is
    slower a token than the cost model can say. So rows of an eighth and of a 32nd are among them.
    """
    points = [Point(1, (1,), count=4)]
    for degree in degrees:
        row = row_tokens(tokens, degree)
        for share in shares(tokens):
            length = max(1, row // share)
            if length >= SHORTEST or share == 1:
                points.append(Point(degree, (length,) * share))
        if row >= MANY:  # so many tokens less, so much more often: what is paid a row
            short = row // MANY
            points += [Point(degree, (short,) * 8, count=2), Point(degree, (short,) * 2, count=4)]
        if row >= 2 * MANY:
            points.append(Point(degree, (row // (2 * MANY),), count=4))
    return points


def held_out_mixes(tokens: int, degrees: Sequence[int], world_size: int, count: int, seed: int = 0) -> list[Mix]:
    """Micro-batches that no point is like: drawn degrees, drawn lengths, rows of any filling."""
    draw = Random(seed)
    mixes = []
    for _ in range(count):
        mix: Mix = []
        start = 0
        while start < world_size:
            fitting = [d for d in degrees if start % d == 0 and start + d <= world_size]
            if not fitting:  # the rest stays idle
                break
            degree = draw.choice(fitting)
            mix.append((degree, tuple(_drawn_row(draw, row_tokens(tokens, degree)))))
            start += degree
        mixes.append(sorted(mix, key=lambda group: -group[0]))
    return mixes


def _drawn_row(draw: Random, tokens: int) -> Iterator[int]:
    """Lengths of a long-tailed row that fills between a third and all of `tokens`."""
    left = draw.randint(-(-tokens // 3), tokens)
    while left > 0:
        length = min(left, max(1, round(tokens * 2.0 ** -draw.uniform(0.0, 6.0))))
        yield length
        left -= length


class RandomTokens:
    """A SequenceSource of random tokens; every one has a label, so that a row of one token has something to learn."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def read(self, sequence: int, start: int, stop: int) -> tuple[IntArray, IntArray]:
        tokens = np.random.default_rng([sequence, start]).integers(0, self.vocab_size, stop - start)
        return tokens, tokens


def batch_of(mixes: Sequence[Mix], world_size: int, vocab_size: int, layouts: Mapping[int, Layout]) -> PlannedBatch:
    """A global batch of random tokens that runs as these micro-batches."""
    micro_batches: list[MicroBatch] = []
    lengths: list[int] = []
    for mix in mixes:
        groups, start = [], 0
        for degree, row in mix:
            ids = tuple(range(len(lengths), len(lengths) + len(row)))
            groups.append(Group(ranks=tuple(range(start, start + degree)), sequences=ids))
            lengths += row
            start += degree
        micro_batches.append(MicroBatch(groups=tuple(groups)))
    return PlannedBatch(
        step=0,
        sequence_ids=np.arange(len(lengths)),
        lengths=np.array(lengths, dtype=np.int64),
        plan=Plan(num_devices=world_size, micro_batches=tuple(micro_batches)),
        source=RandomTokens(vocab_size),
        layouts=layouts,
    )
