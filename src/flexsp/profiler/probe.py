"""Runs micro-batches through the real executor and takes their times, with all ranks busy."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from flexsp.data.batch import PlannedBatch
from flexsp.data.packing import share_sizes
from flexsp.parallel import GroupPool, forward_backward
from flexsp.parallel.control import largest_of_all
from flexsp.profile import Layout
from flexsp.profiler.points import Mix, Part, Point, batch_of

ROW_LENGTH = 512
"""Tokens of the sequences in a row whose memory is measured: attention's time would grow with longer ones."""
ROUNDS = 2
"""In which all points are timed, one after the other: what else a machine does comes in spells of seconds, one of which
must not fall on all times of a point."""
LEAST_REPEATS, MOST_REPEATS = 2, 4
"""Timings of a point in a round. Of all rounds' the mean of all but the slowest counts: a step is a sum of many, and on
a busy machine the slow ones are part of it, so that a median would be too low."""
ENOUGH_S = 0.5
"""After so long a point is not timed more often in a round than it must be."""
LONG_S = 2.0
"""After so long once is enough: steps that take seconds are little disturbed by what takes milliseconds."""
ALONE_REPEATS = 4
"""Timings of what is no step: the optimizer's, an exchange by itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """One point, timed."""

    point: Point
    part: Part
    seconds: float
    """Mean over all repeats but the slowest, each of the slowest rank."""
    spread: float
    """Largest over least of those, less 1, over the root of their number: how noisy the mean is."""

    @classmethod
    def of(cls, point: Point, part: Part, taken: Sequence[float]) -> Reading:
        """`taken`: seconds, of all rounds."""
        kept = but_the_slowest(taken)
        noise = (kept[-1] / kept[0] - 1.0) / math.sqrt(len(kept))
        return cls(point=point, part=part, seconds=statistics.fmean(kept), spread=noise)


class Probe:
    """One model on its ranks. All methods are collectives."""

    def __init__(self, model: PreTrainedModel, groups: GroupPool, part: Part) -> None:
        self.model, self.groups, self.part = model, groups, part
        self.layouts: Mapping[int, Layout] = {}
        """How degrees split into heads x context; one that is not here trades heads alone."""
        self.world_size = dist.get_world_size()
        self.device = next(model.parameters()).device
        self.kernels: set[str] = set()
        """The attention kernels that timed rows used on this rank."""

    def times(self, mixes: Sequence[Mix]) -> list[float]:
        """Seconds of the slowest rank, of a round's repeats after a warm-up."""
        batch = self.batch(mixes)
        self._timed(batch)
        taken: list[float] = []  # the same on all ranks, so that all stop alike
        while more_repeats(taken):
            taken.append(self._timed(batch))
        return taken

    def once(self, mixes: Sequence[Mix]) -> float:
        """Seconds of the slowest rank, without a warm-up."""
        return self._timed(self.batch(mixes))

    def run(self, tokens: int, degree: int = 1) -> None:
        """Forward and backward of rows of so many tokens a rank, in sequences of `ROW_LENGTH`, at a degree."""
        row = Point(degree, short_sequences(tokens * degree))
        self._timed(self.batch(row.mixes(self.world_size)))

    def _timed(self, batch: PlannedBatch) -> float:
        seconds, kernels = _step(self.model, batch, self.groups)
        self.kernels |= kernels
        return seconds

    def largest(self, own: float) -> float:
        """The largest of what the ranks say."""
        return largest_of_all(own, self.groups)

    def batch(self, mixes: Sequence[Mix]) -> PlannedBatch:
        vocab_size = self.model.config.get_text_config().vocab_size
        return batch_of(mixes, self.world_size, vocab_size, self.layouts)

    def optimizer_s(self) -> float:
        """Seconds of clipping and one AdamW step. At a learning rate of 0 the weights stay as they are."""
        optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, weight_decay=0.0)
        forward_backward(self.model, self.batch(Point(1, (1,)).mixes(self.world_size)), self.groups)
        taken = []
        for _ in range(ALONE_REPEATS + 1):
            dist.barrier(group=self.groups.control)
            began = time.perf_counter()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            _synchronize(self.device)
            taken.append(time.perf_counter() - began)
        self.model.zero_grad()
        return largest_of_all(statistics.median(taken[1:]), self.groups)  # the first makes the states

    def exchange_s(self, degree: int, tokens: int, columns: tuple[int, int], dtype: torch.dtype) -> dict[str, float]:
        """Seconds of one layer's exchanges, forward and backward, by placement: ranks "0-3" and so on.

        All groups of the degree exchange at once, as they do in a step.

        Args:
            degree: above 1.
            tokens: of a rank.
            columns: of queries, keys and values as they are sent, and of the attention's output.
            dtype: what is sent.
        """
        self.groups.prepare([self.batch([[(degree, (1,))] * (self.world_size // degree)]).plan])
        rank = dist.get_rank()
        start = rank - rank % degree
        served = start + degree <= self.world_size  # else one of the ranks left over, which only keep step
        channel = self.groups.channel(tuple(range(start, start + degree))) if served else None
        shares = share_sizes(tokens * degree, degree)
        there, back = (
            torch.zeros(tokens * degree, width // degree, dtype=dtype, device=self.device) for width in columns
        )
        times = []
        for _ in range(ALONE_REPEATS + 1):
            dist.barrier(group=self.groups.control)
            began = time.perf_counter()
            if channel is not None:
                for rows in (there, back, back, there):
                    channel.all_to_all(rows, shares, shares)
            _synchronize(self.device)
            times.append(time.perf_counter() - began)
        taken = statistics.median(times[1:])
        everyone: list[Any] = [None] * self.world_size
        dist.all_gather_object(everyone, taken, group=self.groups.control)
        return {
            f"{first}-{first + degree - 1}": max(everyone[first : first + degree])
            for first in range(0, self.world_size - degree + 1, degree)
        }


def short_sequences(tokens: int) -> tuple[int, ...]:
    """The sequences of a row whose memory is measured."""
    whole, rest = divmod(tokens, ROW_LENGTH)
    return (ROW_LENGTH,) * whole + ((rest,) if rest else ())


def but_the_slowest(taken: Sequence[float]) -> list[float]:
    """Those that count, ascending."""
    return sorted(taken)[: max(1, len(taken) - 1)]


def more_repeats(taken: Sequence[float]) -> bool:
    """Whether a point is to be timed once more in a round, after these seconds of it."""
    if len(taken) < LEAST_REPEATS:
        return not taken or sum(taken) < LONG_S
    return len(taken) < MOST_REPEATS and sum(taken) < ENOUGH_S


def timed_step(model: PreTrainedModel, batch: PlannedBatch, groups: GroupPool) -> float:
    """Seconds of a batch's micro-batches, of the slowest rank; gradients are cleared, weights untouched.

    Of the micro-batches alone, as predictions and the correction have it: what a step takes before, once for all of
    them (tokens that are made or read, the agreement of the ranks), is no part of a micro-batch's cost.
    """
    return _step(model, batch, groups)[0]


def _step(model: PreTrainedModel, batch: PlannedBatch, groups: GroupPool) -> tuple[float, frozenset[str]]:
    """The same, and the attention kernels that this rank used."""
    model.zero_grad()
    result = forward_backward(model, batch, groups)
    model.zero_grad()
    return largest_of_all(sum(each.elapsed_s for each in result.times), groups), result.kernels


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
