"""Deliberate faults of the kind that train a little worse and tell nobody: the equality check catches each."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import equality_ranks
from equality_ranks import make_batch, worst_difference
from reference import small_config
from test_equality import plan

LENGTHS = [40, 3, 17, 9, 60, 2]
PLAN = plan(4, [([0, 1, 2, 3], [4])], [([0, 1], [0, 5]), ([2], [1, 3]), ([3], [2])])
SHORT_ROW = plan(4, [([0, 1, 2, 3], [5])], [([0, 1], [0, 1]), ([2], [2, 3]), ([3], [4])])


def leaked_boundary() -> None:
    """Packed sequences see one another: the row is one long sequence."""
    import flexsp.parallel.attention as attention

    honest = attention.varlen_attention

    def leaky(q, k, v, cu_seqlens, max_seqlen, *rest):
        ends = cu_seqlens[[0, -1]]
        return honest(q, k, v, ends, int(ends[-1]), *rest)

    attention.varlen_attention = leaky


def positions_run_on() -> None:
    """position_ids do not restart at a sequence's first token."""
    import flexsp.data.batch as batch

    honest = batch._from_runs

    def running(runs, **rest):
        made = honest(runs, **rest)
        made.position_ids.copy_(torch.arange(made.position_ids.shape[1])[None])
        return made

    batch._from_runs = running


def missing_label_shift() -> None:
    """Every token is its own label."""
    equality_ranks.Tokens.read = lambda self, sequence, start, stop: (
        np.array(self.sequences[sequence][start:stop]),
        np.array(self.labels[sequence][start:stop]),
    )


def loss_averaged_per_rank() -> None:
    """Each rank divides by its own labels, not by those of the global batch."""
    import flexsp.parallel.step as step

    agree = step.agree
    step.agree = lambda batch, num_labels, error, control: (
        agree(batch, num_labels, error, control) and max(1, num_labels) * torch.distributed.get_world_size()
    )


def dropped_sequence() -> None:
    """A group forgets its last sequence where it holds several."""
    import flexsp.data.batch as batch

    honest = batch.PlannedBatch._share

    def forgetful(self, group, group_rank):
        kept = group.sequences[:-1] if len(group.sequences) > 1 else group.sequences
        return honest(self, replace(group, sequences=kept), group_rank)

    batch.PlannedBatch._share = forgetful


def filler_counts() -> None:
    """The filler token has a label."""
    import flexsp.data.batch as batch

    honest = batch._from_runs

    def counting(runs, **rest):
        made = honest(runs, **rest)
        if made.num_tokens == 0:
            made.shift_labels.fill_(1)
        return made

    batch._from_runs = counting


def difference_with_fault(fault: str, short_row: bool) -> float:
    globals()[fault]()
    batch = make_batch(LENGTHS, SHORT_ROW if short_row else PLAN, seed=3, masked=0.1)
    loss, gradient, _ = worst_difference(small_config(), torch.float64, batch)
    return max(loss, gradient)


@pytest.mark.parametrize("short_row", [False, True])
def test_without_a_fault_there_is_no_difference(ranks, short_row):
    assert max(ranks(4).run(difference_with_fault, "no_fault", short_row)) <= 1e-9


def no_fault() -> None:
    pass


FAULTS = {
    leaked_boundary: False,
    positions_run_on: False,
    missing_label_shift: False,
    loss_averaged_per_rank: False,
    dropped_sequence: False,
    filler_counts: True,
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda f: f.__name__)
def test_fault_is_caught(broken_ranks, fault):
    """The difference is far above the tolerance, not near it."""
    found = broken_ranks(4).run(difference_with_fault, fault.__name__, FAULTS[fault])
    assert min(found) > 1e-4
