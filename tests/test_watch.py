"""What a run says of itself: shares of its time, its sinks, logs, summary and documentation."""

from __future__ import annotations

import numpy as np
import pytest

from flexsp.plans import Group, MicroBatch, Plan
from flexsp.watch.shares import predicted_exchange_share, time_shares
from profiles import profile


def plan(num_devices: int, *micro_batches: list[tuple[list[int], list[int]]]) -> Plan:
    """Of ranks and sequences."""
    return Plan(
        num_devices=num_devices,
        micro_batches=tuple(
            MicroBatch(groups=tuple(Group(ranks=tuple(ranks), sequences=tuple(own)) for ranks, own in groups))
            for groups in micro_batches
        ),
    )


MIXED = plan(4, [([0, 1], [0]), ([2], [1])], [([0, 1, 2, 3], [2])])
"""Rank 3 is unused in the first micro-batch."""


def test_shares_are_rank_seconds_by_hand():
    # micro-batch 0: groups busy 6 and 4, of 10; micro-batch 1: all busy 7 of 8
    elapsed = [[10.0, 8.0], [9.9, 8.0], [10.0, 7.9], [10.0, 8.0]]
    busy = [[5.5, 7.0], [6.0, 7.0], [4.0, 6.5], [0.25, 7.0]]
    exchange = [[1.0, 2.0], [1.5, 2.0], [0.0, 1.0], [0.0, 1.0]]
    shares = time_shares(MIXED, elapsed, busy, exchange)
    idle_s = 2 * 0 + 1 * (6 - 4) + 6  # the group of rank 2, and rank 3 for as long as the slowest
    assert shares["micro_batch_idle_share"] == pytest.approx([idle_s / 40, 0.0])
    assert shares["idle_share"] == pytest.approx(idle_s / 72)
    assert shares["unused_share"] == pytest.approx(6 / 72)
    assert shares["gather_share"] == pytest.approx((40 - 4 * 6 + 32 - 4 * 7) / 72)
    assert shares["exchange_share"] == pytest.approx(8.5 / (5.5 + 6 + 4 + 7 + 7 + 6.5 + 7))  # unused ranks do not count
    # the groups' own seconds are what is left
    assert shares["idle_share"] + shares["gather_share"] == pytest.approx(1 - (2 * 6 + 4 + 4 * 7) / 72)


def test_even_groups_are_not_idle_and_nothing_is_divided_by_nothing():
    even = plan(2, [([0], [0]), ([1], [1])])
    assert time_shares(even, [[3.0], [3.0]], [[2.0], [2.0]], [[0.0], [0.0]])["idle_share"] == 0.0
    nothing = time_shares(even, [[0.0], [0.0]], [[0.0], [0.0]], [[0.0], [0.0]])
    assert nothing.pop("micro_batch_idle_share") == [0.0]
    assert set(nothing.values()) == {0.0}


def test_the_predicted_exchange_share_is_the_profiles():
    base = profile(4)
    lengths = np.array([50, 40, 90])
    exchange = busy = 0.0
    for degree, tokens in ((2, 50), (1, 40), (4, 90)):
        with_exchange = base.group_s(degree, [tokens])
        compute = (base.compute.quadratic_s * tokens**2 + base.compute.linear_s * tokens) / degree
        busy += degree * with_exchange
        exchange += degree * (with_exchange - compute)
    assert predicted_exchange_share(MIXED, lengths, base) == pytest.approx(exchange / busy)
    assert 0 < exchange / busy < 1
