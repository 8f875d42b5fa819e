"""Groups are halved where that costs no time, and only there."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import flexsp
from flexsp import violations
from flexsp.planner.assemble import MicroBatchChoice, assemble
from flexsp.planner.loosen import loosened
from flexsp.planner.static import plan_static
from profiles import profile


def choice_of(plan):
    return [
        MicroBatchChoice(
            groups=[(g.sp_degree, list(g.sequences)) for g in mb.groups], starts=[g.ranks[0] for g in mb.groups]
        )
        for mb in plan.micro_batches
    ]


@settings(derandomize=True, deadline=None, max_examples=80)
@given(st.lists(st.integers(1, 400), min_size=1, max_size=30), st.sampled_from([4, 8, 16]))
def test_loosened_plans_are_legal_and_none_of_their_micro_batches_is_slower(lengths, num_devices):
    p, array = profile(num_devices), np.array(lengths)
    before = plan_static(array, p)
    after = assemble("test", array, p, loosened(choice_of(before), array, p), 0.0)
    assert violations(after, lengths, p) == []
    for old, new in zip(before.micro_batches, after.micro_batches, strict=True):
        assert new.predicted_s <= old.predicted_s * (1 + 1e-12)


def test_a_group_with_time_to_spare_is_halved_and_the_slowest_is_not():
    p = profile(8)
    lengths = np.array([390, 60, 60, 60, 60])  # the first alone needs all of degree 4's time and memory
    choice = MicroBatchChoice(groups=[(4, [0]), (4, [1, 2, 3, 4])])
    (after,) = loosened([choice], lengths, p)
    assert sorted(degree for degree, _ in after.groups) == [1, 1, 1, 1, 4]
    assert dict((tuple(held), degree) for degree, held in after.groups)[(0,)] == 4


def test_memory_keeps_a_group_whole():
    p = profile(8)
    lengths = np.array([390, 150, 40])  # 150 tokens fit no single rank
    (after,) = loosened([MicroBatchChoice(groups=[(4, [0]), (4, [1, 2])])], lengths, p)
    assert {tuple(held): degree for degree, held in after.groups}[(1,)] == 2


def test_flex_leaves_no_group_that_could_be_halved():
    lengths = np.random.default_rng(5).integers(1, 300, 40)
    p = profile(8)
    plan = flexsp.plan(lengths, p)
    again = loosened(choice_of(plan), lengths, p)
    assert [sorted(d for d, _ in c.groups) for c in again] == [sorted(mb.sp_degrees) for mb in plan.micro_batches]
