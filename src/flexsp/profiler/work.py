"""How much `flexsp profile` computes: FLOPs of a rank, counted from the plan of what is run, without running it.

Counted are the least repeats of every row (2 a round): rows of less than a quarter of a second get more, and take
little. So much by so many FLOP/s is about how long measuring takes on a GPU; what is launched, exchanged and built
beside is not in it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from flexsp.estimate import ModelShape
from flexsp.profiler.parts import HEAD_TOKENS, parts_of
from flexsp.profiler.points import SHARES, Mix, Part, fit_points, held_out_mixes, row_tokens
from flexsp.profiler.policies import LEAST_PAIRS
from flexsp.profiler.probe import LEAST_REPEATS, ROUNDS, short_sequences
from flexsp.profiler.splits import ROUNDS as SPLIT_ROUNDS
from flexsp.profiler.splits import ROWS

RUNS = ROUNDS * (LEAST_REPEATS + 1)
"""Of every row that is timed, warm-ups included."""
PEAK_ROWS = (0.25, 0.25, 1.0, 2.0, 4.0)
"""Rows whose memory is measured, as shares of the largest that is timed: the first twice, see `memory.peak_fit`."""


def planned_flops(
    shape: ModelShape,
    tokens: int,
    degrees: Sequence[int],
    world_size: int,
    num_splits: Callable[[int], int],
    policies: Sequence[str] = (),
) -> float:
    """FLOPs that a rank computes while a profile is measured by parts: at most about so many.

    Args:
        shape: of the whole model.
        tokens: of a rank in the largest row.
        degrees: that are measured.
        world_size: how many ranks there are.
        num_splits: in how many ways a degree splits into heads x context.
        policies: that are measured too.
    """
    total = 0.0
    parts = parts_of(shape)
    for part in parts:
        first = part == parts[0]
        head = part.head == 1.0 and not part.whole and len(parts) > 1
        most = min(tokens, HEAD_TOKENS) if head else tokens
        cost = _CostOfRank(shape, part)
        plan: list[tuple[float, Mix]] = []  # how often what is run
        if head:
            plan += [(RUNS, [(1, (most,))])] * 2
        else:
            for point in fit_points(most, degrees if first else [1]):
                plan.append((RUNS * point.count, [(point.degree, point.lengths)]))
        if first:
            plan += [(RUNS, mix) for mix in held_out_mixes(most, degrees, world_size, 6)]
            for degree in degrees:
                plan.append((2, [(degree, short_sequences(most * degree))]))  # what a degree holds
                if num_splits(degree) > 1:
                    row = row_tokens(most, degree)
                    rounds = SPLIT_ROUNDS * num_splits(degree)
                    plan += [(rounds, [(degree, (row // count,) * count)]) for count in ROWS]
        peaks = sum(PEAK_ROWS[:3] if head else PEAK_ROWS)
        peak = cost([(1, short_sequences(round(peaks * most)))])
        total += peak + sum(times * cost(mix) for times, mix in plan)
        for _ in policies:  # recomputing is counted as a third more; offload computes nothing again
            total += 4 / 3 * peak
            if not head:
                pairs = sum(cost([(1, (most // share,) * share)]) for share in SHARES)
                total += (LEAST_PAIRS + 1) * (1 + 4 / 3) * pairs
    return total


class _CostOfRank:
    """FLOPs that the busiest rank computes in a micro-batch of a part."""

    def __init__(self, shape: ModelShape, part: Part) -> None:
        own = replace(shape, num_layers=part.layers, vocab_size=max(1, round(part.head * shape.vocab_size)))
        self._linear, self._square = own.linear_flops_per_token(), own.attention_flops_per_square()

    def __call__(self, mix: Mix) -> float:
        return max((self._linear * sum(row) + self._square * sum(s * s for s in row)) / degree for degree, row in mix)
