"""Ranks that would run different plans end with an error that names the step, and never wait."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from channel_pools import pool
from equality_ranks import make_batch
from flexsp.parallel import PlanMismatchError, RankError, forward_backward, prepare_model
from rank_pool import RanksFailed
from reference import build, small_config
from test_equality import plan

LENGTHS = [12, 9, 7, 5]
PLAN = plan(4, [([0, 1], [0]), ([2], [1]), ([3], [2, 3])])
OTHER_LAYOUT = plan(4, [([0, 1], [1]), ([2], [0]), ([3], [2, 3])])


def batch_with(change: str):
    batch = replace(make_batch(LENGTHS, PLAN, seed=1, masked=0.0), step=7)
    if dist.get_rank() == 2:
        if change == "plan":
            batch = replace(batch, plan=OTHER_LAYOUT)
        elif change == "step":
            batch = replace(batch, step=8)
        elif change == "sequences":
            batch = replace(batch, sequence_ids=batch.sequence_ids[::-1].copy())
        elif change == "lengths":
            batch = replace(batch, lengths=batch.lengths[[0, 1, 3, 2]])
    return batch


def mismatch_is_an_error_on_all_ranks(change: str) -> None:
    model = prepare_model(build(small_config(), torch.float32))
    with pytest.raises(PlanMismatchError, match=r"ranks \[2\] hold another plan than the other 3 of 4 ranks"):
        forward_backward(model, batch_with(change), pool())
    forward_backward(model, batch_with("nothing"), pool())  # and the ranks can still talk


@pytest.mark.parametrize("change", ["plan", "step", "sequences", "lengths"])
def test_a_plan_changed_after_the_broadcast_ends_all_ranks(ranks, change):
    ranks(4).run(mismatch_is_an_error_on_all_ranks, change)


def failing_read_is_an_error_on_all_ranks() -> None:
    model = prepare_model(build(small_config(), torch.float32))
    batch = replace(make_batch(LENGTHS, PLAN, seed=1, masked=0.0), step=7)
    if dist.get_rank() == 1:
        batch.source.read = None  # what a broken row does
    with pytest.raises(RankError, match=r"step 7, rank 1: TypeError"):
        forward_backward(model, batch, pool())


def test_a_rank_that_cannot_read_its_tokens_ends_all_ranks(ranks):
    ranks(4).run(failing_read_is_an_error_on_all_ranks)


def wrong_batch_is_refused(lengths, wrong, masked, error, message) -> None:
    model = prepare_model(build(small_config(), torch.float32))
    with pytest.raises({"RankError": RankError, "ValueError": ValueError}[error], match=message):
        forward_backward(model, make_batch(lengths, wrong, seed=1, masked=masked), pool())


def test_a_plan_for_another_world_size_is_refused(ranks):
    wrong = plan(2, [([0, 1], [0])])
    ranks(4).run(wrong_batch_is_refused, [8], wrong, 0.0, "RankError", "num_devices=2 is not world_size=4")


def test_a_batch_without_a_label_is_refused(ranks):
    ranks(4).run(wrong_batch_is_refused, LENGTHS, PLAN, 1.0, "ValueError", "num_labels=0")


def hang() -> None:
    if dist.get_rank() == 1:
        dist.barrier()


def test_the_test_harness_itself_ends_a_hang(broken_ranks):
    with pytest.raises(RanksFailed, match="rank 1 did not answer within 2"):
        broken_ranks(2).run(hang, timeout_s=2.0)


def groups_are_reused() -> list[int]:
    model = prepare_model(build(small_config(), torch.float32))
    from flexsp.parallel import GroupPool

    groups, counts = GroupPool(), []
    for each in (PLAN, OTHER_LAYOUT, plan(4, [([0, 1, 2, 3], [0, 1, 2, 3])]), PLAN):
        forward_backward(model, make_batch(LENGTHS, each, seed=1, masked=0.0), groups)
        counts.append(groups.num_groups)
    return counts


def test_groups_are_made_at_first_need_and_reused(ranks):
    assert ranks(4).run(groups_are_reused) == [[1, 1, 2, 2]] * 4
