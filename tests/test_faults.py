"""Deliberate faults of the kind that train a little worse and tell nobody: the equality check catches each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import pytest
import torch

import equality_ranks
import flexsp.data.batch as batches
from equality_ranks import make_batch, worst_difference
from flexsp.parallel import ring, step
from flexsp.parallel.row import Row
from flexsp.plans import Plan
from flexsp.profile import Layout
from reference import small_config
from test_equality import plan

LENGTHS = [40, 3, 17, 9, 60, 2]
PLAN = plan(4, [([0, 1, 2, 3], [4])], [([0, 1], [0, 5]), ([2], [1, 3]), ([3], [2])])
SHORT_ROW = plan(4, [([0, 1, 2, 3], [5])], [([0, 1], [0, 1]), ([2], [2, 3]), ([3], [4])])


@contextmanager
def no_fault() -> Iterator[None]:
    yield


@contextmanager
def leaked_boundary() -> Iterator[None]:
    """Packed sequences see one another: the row is one long sequence."""
    with patch.object(step, "Row", lambda lengths, *rest: Row((sum(lengths),), *rest)):
        yield


@contextmanager
def positions_run_on() -> Iterator[None]:
    """position_ids do not restart at a sequence's first token."""
    honest = batches._from_runs

    def running(runs, **rest):
        made = honest(runs, **rest)
        made.position_ids.copy_(torch.arange(made.position_ids.shape[1])[None])
        return made

    with patch.object(batches, "_from_runs", running):
        yield


@contextmanager
def missing_label_shift() -> Iterator[None]:
    """Every token is its own label."""

    def unshifted(self, sequence, start, stop):
        return np.array(self.sequences[sequence][start:stop]), np.array(self.labels[sequence][start:stop])

    with patch.object(equality_ranks.Tokens, "read", unshifted):
        yield


@contextmanager
def loss_averaged_per_rank() -> Iterator[None]:
    """Each rank divides by its own labels, not by those of the global batch."""
    agree = step.agree

    def own_labels(batch, num_labels, error, control):
        return agree(batch, num_labels, error, control) and max(1, num_labels) * torch.distributed.get_world_size()

    with patch.object(step, "agree", own_labels):
        yield


@contextmanager
def dropped_sequence() -> Iterator[None]:
    """A group forgets its last sequence where it holds several."""
    honest = batches.PlannedBatch._share

    def forgetful(self, group, *rest):
        kept = group.sequences[:-1] if len(group.sequences) > 1 else group.sequences
        return honest(self, replace(group, sequences=kept), *rest)

    with patch.object(batches.PlannedBatch, "_share", forgetful):
        yield


@contextmanager
def filler_counts() -> Iterator[None]:
    """The filler token has a label."""
    honest = batches._from_runs

    def counting(runs, **rest):
        made = honest(runs, **rest)
        if made.num_tokens == 0:
            made.shift_labels.fill_(1)
        return made

    with patch.object(batches, "_from_runs", counting):
        yield


@contextmanager
def keys_of_others_unseen() -> Iterator[None]:
    """Keys and values do not go around the ring."""
    with patch.object(ring, "_around", lambda held, row, channel: [(row.ring_rank, list(held))]):
        yield


@contextmanager
def parts_merged_without_their_weights() -> Iterator[None]:
    """The outputs over parts of the keys are averaged, whatever their log-sums."""

    def averaged(out, lse, part, part_lse):
        first = lse.isinf()[..., None]
        out.copy_(torch.where(first, part, (out + part) / 2))
        lse.copy_(torch.logaddexp(lse, part_lse))

    with patch.object(ring, "_merge", averaged):
        yield


@contextmanager
def second_pieces_in_the_order_of_ranks() -> Iterator[None]:
    """A rank takes its second pieces for later than those of the ranks before it: no zigzag."""
    with patch.object(Row, "_chunk", lambda self, ring_rank, piece: self.ring * piece + ring_rank):
        yield


def difference_with_fault(fault: str, plan: Plan, layouts: dict[int, Layout]) -> float:
    batch = make_batch(LENGTHS, plan, seed=3, masked=0.1, layouts=layouts)
    with globals()[fault]():
        loss, gradient, _ = worst_difference(small_config(), torch.float64, batch)
    return max(loss, gradient)


RING = {2: Layout(ulysses=1, ring=2), 4: Layout(ulysses=2, ring=2)}
CASES = {"Ulysses": (PLAN, {}), "a short row": (SHORT_ROW, {}), "a ring": (PLAN, RING)}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_without_a_fault_there_is_no_difference(ranks, case):
    assert max(ranks(4).run(difference_with_fault, "no_fault", *case)) <= 1e-9


FAULTS = {
    leaked_boundary: "Ulysses",
    positions_run_on: "Ulysses",
    missing_label_shift: "Ulysses",
    loss_averaged_per_rank: "Ulysses",
    dropped_sequence: "Ulysses",
    filler_counts: "a short row",
    keys_of_others_unseen: "a ring",
    parts_merged_without_their_weights: "a ring",
    second_pieces_in_the_order_of_ranks: "a ring",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_fault_is_caught(ranks, fault):
    """The difference is far above the tolerance, not near it."""
    found = ranks(4).run(difference_with_fault, fault.__name__, *CASES[FAULTS[fault]])
    assert min(found) > 1e-4
