"""Every query meets every key that it may see exactly once, on whichever rank of the ring either lies."""

from __future__ import annotations

import itertools
from collections import Counter

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flexsp.data.packing import group_shares, rank_indices, ring_pieces
from flexsp.parallel.row import Row
from flexsp.profile import Layout

rows = st.lists(st.integers(1, 20), min_size=1, max_size=6)


def places(lengths: list[int]) -> list[tuple[int, int]]:
    """(sequence, position) of each token of a row."""
    return [(s, t) for s, length in enumerate(lengths) for t in range(length)]


@settings(derandomize=True, deadline=None)
@given(rows, st.integers(1, 4), st.integers(1, 3))
def test_ranks_hold_every_token_once_and_as_many_as_each_other(lengths, ring, ulysses):
    layout = Layout(ulysses=ulysses, ring=ring)
    held = [rank_indices(lengths, layout, rank).tolist() for rank in range(ring * ulysses)]
    assert sorted(itertools.chain(*held)) == list(range(sum(lengths)))
    shares = [len(each) for each in held]
    assert tuple(shares) == group_shares(lengths, layout)
    assert max(shares) - min(shares) <= 1


@settings(derandomize=True, deadline=None)
@given(rows, st.integers(1, 4), st.sampled_from([None, 1, 2, 5]))
def test_meetings_are_causal_attention_and_nothing_twice(lengths, ring, window):
    token = places(lengths)
    layout = Layout(ulysses=1, ring=ring)
    held = [[token[i] for i in rank_indices(lengths, layout, rank)] for rank in range(ring)]
    met: Counter[tuple[tuple[int, int], tuple[int, int]]] = Counter()
    for rank in range(ring):
        row = Row(lengths, ring, rank, torch.device("cpu"))
        assert row.tokens(rank) == len(held[rank])
        for source in range(ring):
            for meeting in row.meetings(source, window):
                met.update(pairs_of(meeting, held[rank], held[source], window))
    expected = {
        ((s, t), (s, u))
        for s, length in enumerate(lengths)
        for t in range(length)
        for u in range(t + 1)
        if window is None or t - u < window
    }
    assert set(met) == expected
    assert set(met.values()) == {1}


def pairs_of(meeting, queries, keys, window):
    """What a kernel computes of a meeting, by the words of `Block`."""
    block = meeting.block
    queries, keys = queries[meeting.queries], keys[meeting.keys]
    assert block.cu_seqlens_q.tolist() == [0, *itertools.accumulate(block.sizes_q)]
    assert block.cu_seqlens_k.tolist() == [0, *itertools.accumulate(block.sizes_k)]
    q_start = k_start = 0
    for q_size, k_size in zip(block.sizes_q, block.sizes_k, strict=True):
        for i, j in itertools.product(range(q_size), range(k_size)):
            at, to = i, j
            if block.positions_q is not None:
                at, to = block.positions_q[q_start + i].item(), block.positions_k[k_start + j].item()
                assert (at, to) == (queries[q_start + i][1], keys[k_start + j][1])
            hidden = (block.causal and to > at) or (window is not None and at - to >= window)
            if not hidden:
                yield queries[q_start + i], keys[k_start + j]
        q_start, k_start = q_start + q_size, k_start + k_size


def test_pieces_balance_causal_work():
    """Pairs of query and key that each of four ranks computes of one sequence of 64 tokens."""
    work = []
    for rank in range(4):
        row = Row([64], 4, rank, torch.device("cpu"))
        meetings = [m for source in range(4) for m in row.meetings(source, None)]
        sizes = [(m.block.sizes_q[0], m.block.sizes_k[0], m.block.causal) for m in meetings]
        work.append(sum(q * (q + 1) // 2 if causal else q * k for q, k, causal in sizes))
    assert sum(work) == 64 * 65 // 2
    assert max(work) == min(work)


def test_ranks_take_turns_with_what_does_not_divide():
    assert ring_pieces([1, 1, 1], 2).sum(axis=(1, 2)).tolist() == [2, 1]
    assert ring_pieces([5, 3, 2], 2).tolist() == [[[2, 1], [1, 0], [1, 0]], [[1, 1], [1, 1], [1, 0]]]
