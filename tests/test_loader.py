"""The planned loader: order, planning ahead, and what happens when the planner fails."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
import torch.distributed as dist

from equality_ranks import pool
from flexsp.batches import global_batch
from flexsp.data import PlannedLoader, Sequences
from flexsp.planner.service import PlannerError
from profiles import profile


def test_every_epoch_has_every_sequence_once_in_another_order():
    ids = np.concatenate([global_batch(10, 4, seed=3, step=step) for step in range(5)])
    assert sorted(ids[:10]) == sorted(ids[10:]) == list(range(10))
    assert ids[:10].tolist() != ids[10:].tolist()
    assert global_batch(10, 4, 3, 2).tolist() == ids[8:12].tolist()
    assert global_batch(10, 4, 4, 2).tolist() != ids[8:12].tolist()


class Corpus:
    name, num_empty, max_token = "test", 0, 5
    lengths = np.random.default_rng(0).integers(1, 150, 50)

    def describe(self, document):
        return f"document {document}"


def sequences() -> Sequences:
    lengths = Corpus.lengths
    return Sequences(corpus=Corpus(), documents=np.arange(50), offsets=np.zeros(50, int), lengths=lengths)


def loader(planner="flex", **options) -> PlannedLoader:
    arguments = {"batch_size": 8, "steps": 5, "planner": planner, **options}
    return PlannedLoader(sequences(), profile(dist.get_world_size()), pool().control, **arguments)


def batches_of_a_run(planner: str) -> list[tuple]:
    with loader(planner) as batches:
        return [(b.step, b.sequence_ids.tolist(), b.lengths.tolist(), str(b.plan.micro_batches)) for b in batches]


@pytest.mark.parametrize("planner", ["flex", "static", "slow_planners:noisy"])
def test_all_ranks_get_the_same_batches_and_plans(ranks, planner):
    results = ranks(4).run(batches_of_a_run, planner)
    assert results[0] == results[1] == results[2] == results[3]
    assert [step for step, *_ in results[0]] == [0, 1, 2, 3, 4]


def predictions_with_a_profile_update(replan: bool) -> list[float]:
    """By step, whether it was planned with the second profile, by whose fixed cost one knows it."""
    first = profile(dist.get_world_size())
    second = replace(first, compute=replace(first.compute, quadratic_s=0.0, linear_s=1e-6, fixed_s=100.0))
    found = []
    with loader(steps=6, plan_ahead=2) as batches:
        for batch in batches:
            found.append(batch.plan.predicted_s >= 100.0)
            if batch.step == 1:
                batches.update_profile(second, replan=replan)
    return found


@pytest.mark.parametrize("replan", [False, True])
def test_another_profile_holds_for_batches_not_yet_planned_or_for_all_to_come(ranks, replan):
    """Two batches are planned ahead of the running one: after step 1 those of steps 2 and 3."""
    until = 2 if replan else 4
    for found in ranks(2).run(predictions_with_a_profile_update, replan):
        assert found == [step >= until for step in range(6)]


def waits_with_a_slow_planner() -> list[float]:
    waits = []
    with loader("slow_planners:slow", steps=6, plan_ahead=2) as batches:
        for batch in batches:
            waits.append(batch.plan_wait_s)
            time.sleep(1.0)  # the step, longer than planning even on busy cores
    return waits


def test_steps_do_not_wait_for_a_planner_that_is_faster_than_they_are(ranks):
    for waits in ranks(2).run(waits_with_a_slow_planner):
        assert waits[0] > 0.0  # nothing is planned before the run begins
        assert waits[1:] == [0.0] * 5


def error_of(planner: str) -> str:
    try:
        with loader(planner, plan_timeout_s=2.0 if planner.endswith("stalls") else 300.0) as batches:
            list(batches)
    except (PlannerError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


@pytest.mark.parametrize(
    ("planner", "message"),
    [
        ("slow_planners:raises", "PlannerError: step 0: the planner failed: ArithmeticError: no plan today"),
        ("slow_planners:dies", "PlannerError: step 0: the planner's process ended with status 3"),
        ("slow_planners:stalls", "PlannerError: step 0: the planner gave no plan within timeout_s=2.0; use a faster"),
        ("slow_planners:illegal", "ValueError: step 0: the plan is illegal in 1 ways, the first is: 1 of 8 sequences"),
    ],
)
def test_a_planner_that_fails_is_an_error_on_all_ranks(ranks, planner, message):
    for said in ranks(4).run(error_of, planner):
        assert said.startswith(message)


def infeasible_is_refused() -> None:
    small = profile(dist.get_world_size(), capacity=10)
    with PlannedLoader(sequences(), small, pool().control, batch_size=8, steps=1) as batches:
        with pytest.raises(ValueError, match=r"step 0: no plan: lengths\[\d\]=\d+ tokens fit into no group"):
            list(batches)


def test_a_batch_that_fits_nowhere_is_an_error_on_all_ranks(ranks):
    ranks(2).run(infeasible_is_refused)


def other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match=r"profile num_devices=8 is not world_size=2; measure a profile"):
        PlannedLoader(sequences(), profile(8), pool().control, batch_size=8, steps=1)


def test_a_profile_of_another_number_of_devices_is_refused(ranks):
    ranks(2).run(other_devices_are_refused)
