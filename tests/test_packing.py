"""Which tokens of a row each rank holds, against plain lists."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexsp.data.batch import PlannedBatch
from flexsp.data.packing import cumulative_lengths, group_shares, rank_indices, runs_by_sequence, share_sizes
from flexsp.plans import Group, MicroBatch, Plan
from flexsp.profile import Layout

lengths_of_a_row = st.lists(st.integers(1, 30), min_size=1, max_size=8)


@settings(derandomize=True, deadline=None)
@given(lengths_of_a_row, st.integers(1, 9))
def test_ulysses_alone_holds_the_row_in_slices(lengths, sp_degree):
    layout = Layout(ulysses=sp_degree, ring=1)
    held = [rank_indices(lengths, layout, rank).tolist() for rank in range(sp_degree)]
    assert [place for each in held for place in each] == list(range(sum(lengths)))
    assert group_shares(lengths, layout) == share_sizes(sum(lengths), sp_degree) == tuple(map(len, held))


@settings(derandomize=True, deadline=None)
@given(lengths_of_a_row, st.data())
def test_runs_name_the_tokens_of_any_index_array(lengths, data):
    row = [(s, t) for s, length in enumerate(lengths) for t in range(length)]
    indices = data.draw(st.lists(st.integers(0, len(row) - 1), unique=True))
    runs = runs_by_sequence(np.array(indices, dtype=np.int64), cumulative_lengths(lengths))
    assert [(s, t) for s, start, stop in runs for t in range(start, stop)] == [row[i] for i in indices]


class Letters:
    """Sequence s has the tokens 100 * s + 0, 1, 2, ...; its labels are the next tokens."""

    def __init__(self, lengths):
        self.lengths = lengths
        self.tokens_read = 0

    def read(self, sequence, start, stop):
        self.tokens_read += stop - start
        tokens = 100 * sequence + np.arange(start, stop)
        return tokens, np.where(np.arange(start, stop) + 1 < self.lengths[sequence], tokens + 1, -100)


def batch_of(lengths, *groups):
    plan = Plan(
        num_devices=4,
        micro_batches=(MicroBatch(groups=tuple(Group(ranks=r, sequences=s) for r, s in groups)),),
    )
    return PlannedBatch(
        step=0, sequence_ids=np.arange(len(lengths)), lengths=np.array(lengths), plan=plan, source=Letters(lengths)
    )


@settings(derandomize=True, deadline=None)
@given(lengths_of_a_row, st.sampled_from([1, 2, 4]))
def test_ranks_together_hold_the_row(lengths, sp_degree):
    order = list(range(len(lengths)))[::-1]
    batch = batch_of(lengths, (tuple(range(sp_degree)), tuple(order)))
    own = [batch.for_rank(rank)[0] for rank in range(sp_degree)]
    held = [mb for mb in own if mb.num_tokens]
    ids = [t for mb in held for t in mb.input_ids[0].tolist()]
    positions = [p for mb in held for p in mb.position_ids[0].tolist()]
    labels = [t for mb in held for t in mb.shift_labels[0].tolist()]
    assert ids == [100 * s + t for s in order for t in range(lengths[s])]
    assert positions == [t for s in order for t in range(lengths[s])]
    assert labels == [100 * s + t + 1 if t + 1 < lengths[s] else -100 for s in order for t in range(lengths[s])]
    assert own[0].cu_seqlens.tolist() == [0, *np.cumsum([lengths[s] for s in order])]
    assert own[0].max_seqlen == max(lengths)
    assert batch.source.tokens_read == sum(lengths)  # each rank its own, nothing twice


def test_ranks_without_a_token_hold_one_filler_that_does_not_count():
    batch = batch_of([1], ((0, 1), (0,)))
    for rank in (1, 3):  # short of tokens, and idle
        micro_batch = batch.for_rank(rank)[0]
        assert (micro_batch.num_tokens, micro_batch.num_labels) == (0, 0)
        assert micro_batch.input_ids.shape == (1, 1)
    assert batch.for_rank(3)[0].ranks == (3,)


def test_a_row_beyond_int32_is_refused():
    with pytest.raises(ValueError, match=r"row=4294967296 tokens exceeds int32"):
        cumulative_lengths([2**31, 2**31])
