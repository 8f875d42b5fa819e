"""The planned loader: order, planning ahead, and what happens when the planner fails."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
import torch.distributed as dist

from channel_pools import pool
from flexsp.batches import global_batch
from flexsp.data import PlannedBatch, PlannedLoader, Sequences
from flexsp.data.read_ahead import Reader
from flexsp.planner.service import PlannerError
from flexsp.plans import Plan
from profiles import profile

pytestmark = pytest.mark.alone


def test_every_epoch_has_every_sequence_once_in_another_order():
    ids = np.concatenate([global_batch(10, 4, seed=3, step=step) for step in range(5)])
    assert sorted(ids[:10]) == sorted(ids[10:]) == list(range(10))
    assert ids[:10].tolist() != ids[10:].tolist()
    assert global_batch(10, 4, 3, 2).tolist() == ids[8:12].tolist()
    assert global_batch(10, 4, 4, 2).tolist() != ids[8:12].tolist()


class Corpus:
    name, num_empty = "test", 0
    lengths = np.random.default_rng(0).integers(1, 150, 50)

    def describe(self, document):
        return f"document {document}"

    def read(self, document, start, stop):
        tokens = (np.arange(start, stop) * 7 + document) % 251
        return tokens, tokens


def sequences() -> Sequences:
    lengths = Corpus.lengths
    return Sequences(corpus=Corpus(), documents=np.arange(50), offsets=np.zeros(50, int), lengths=lengths)


def loader(planner="flex", **options) -> PlannedLoader:
    arguments = {"batch_size": 8, "steps": 5, "planner": planner, **options}
    return PlannedLoader(sequences(), profile(dist.get_world_size()), pool().control, **arguments)


def batches_of_a_run(planner: str) -> list[tuple]:
    with loader(planner) as batches:
        return [(b.step, b.sequence_ids.tolist(), b.lengths.tolist(), str(b.plan.micro_batches)) for b in batches]


@pytest.mark.parametrize("planner", ["flex", "static", "slow_planners:noisy", "slow_planners:prints_in_c"])
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
        (
            "slow_planners:raises",
            "PlannerError: step 0: the planner failed: planner='slow_planners:raises' failed (ArithmeticError: no plan",
        ),
        ("slow_planners:dies", "PlannerError: step 0: the planner's process ended with status 3"),
        ("slow_planners:stalls", "PlannerError: step 0: the planner gave no plan within timeout_s=2.0; use a faster"),
        ("slow_planners:illegal", "ValueError: step 0: the plan is illegal in 1 ways, the first is: 1 of 8 sequences"),
    ],
)
def test_a_planner_that_fails_is_an_error_on_all_ranks(ranks, planner, message):
    for said in ranks(4).run(error_of, planner):
        assert said.startswith(message)


def planners_with_a_fallback(planner: str, timeout_s: float) -> tuple[list[str], int]:
    """Of each step, who planned it; every plan is legal, or the loader would say so."""
    options = {"steps": 8, "plan_ahead": 2, "fallback": "batch-adaptive", "plan_timeout_s": timeout_s}
    with loader(f"slow_planners:{planner}", **options) as batches:
        found = [(b.plan.planner, b.fallback) for b in batches]
        assert all(fallback == (name == "batch-adaptive") for name, fallback in found)
        return [str(name) for name, _ in found], batches.fallbacks


@pytest.mark.parametrize("planner", ["raises", "dies", "illegal", "nothing", "stalls"])
def test_with_a_fallback_a_planner_that_always_fails_costs_no_step(ranks, planner):
    """One that dies or stalls is started again three times and then given up."""
    timeout_s = 0.5 if planner == "stalls" else 300.0
    for found in ranks(2).run(planners_with_a_fallback, planner, timeout_s):
        assert found == (["batch-adaptive"] * 8, 8)


@pytest.mark.parametrize(
    ("planner", "fails_at"),
    [("raises", [2]), ("illegal", [2]), ("dies", [2, 5]), pytest.param("stalls", [2, 5], marks=pytest.mark.slow)],
)
def test_with_a_fallback_the_queued_batches_are_planned_by_the_planner_once_it_is_there_again(ranks, planner, fails_at):
    """A new process fails at its third batch again."""
    timeout_s = 25.0 if planner == "stalls" else 300.0  # importing on busy cores takes a while
    expected = ["batch-adaptive" if step in fails_at else "flex" for step in range(8)]
    for found in ranks(2).run(planners_with_a_fallback, f"{planner}_at_the_third", timeout_s, timeout_s=120.0):
        assert found == (expected, len(fails_at))


PARENT = """
import time, numpy as np
from flexsp.planner.service import PlanService
from profiles import profile
service = PlanService(profile(2), "slow_planners:tells_and_stalls", {"path": PATH})
service.submit(np.array([3, 4]))
time.sleep(1000)
"""


def test_a_planner_whose_parent_is_killed_ends_in_the_midst_of_a_plan(tmp_path):
    told = tmp_path / "pid"
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT.replace("PATH", repr(str(told)))],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
        },
    )
    until = time.monotonic() + 100.0
    try:
        while not (told.exists() and told.read_text()) and time.monotonic() < until and parent.poll() is None:
            time.sleep(0.05)
        planner = Path(f"/proc/{told.read_text()}/cmdline")
        assert "flexsp.planner.service" in planner.read_text()
    finally:
        parent.kill()
        parent.wait()
    while time.monotonic() < until and planner.exists() and planner.read_text():  # a zombie's is empty
        time.sleep(0.05)
    assert not planner.exists() or not planner.read_text()


def rank_batches(read_ahead: int) -> list[list]:
    """What each step gives this rank, as lists; between steps the planner is waited for, so that it is ahead."""
    found = []
    with loader(steps=8, plan_ahead=3, read_ahead=read_ahead) as batches:
        for batch in batches:
            assert (batch.ahead is None) == (read_ahead < 0)
            parts = batch.for_rank(dist.get_rank())
            found.append(
                [(p.ranks, p.input_ids.tolist(), p.shift_labels.tolist(), p.position_ids.tolist()) for p in parts]
            )
            if batch.step == 3:
                batches.update_profile(replace(profile(dist.get_world_size()), name="another"), replan=True)
            ahead, until = batches._planner, time.monotonic() + 20.0
            while ahead is not None and ahead._steps and not ahead._service.ready() and time.monotonic() < until:
                time.sleep(0.01)
    return found


def test_what_is_read_ahead_is_what_would_be_read_in_the_step(ranks):
    assert ranks(2).run(rank_batches, 2) == ranks(2).run(rank_batches, 0) == ranks(2).run(rank_batches, -1)


def read_before_their_turn() -> int:
    """Steps of which a token was read while an earlier one was at its turn."""
    read: set[int] = set()
    honest = Corpus.read
    early = 0
    with patch.object(Corpus, "read", lambda self, document, *at: (read.add(document), honest(self, document, *at))[1]):
        with loader(steps=6, plan_ahead=3, batch_size=8) as batches:
            for batch in batches:
                batch.for_rank(dist.get_rank())
                following = batches._reading.get(batch.step + 1)
                if following is not None:
                    following.result()
                    early += bool(read & set(batches.sequence_ids(batch.step + 1).tolist()) - set(batch.sequence_ids))
                time.sleep(0.3)
    return early


def test_tokens_are_read_before_their_step(ranks):
    assert all(early >= 1 for early in ranks(2).run(read_before_their_turn))


def test_another_plan_of_a_batch_is_not_served_what_was_read_for_the_first():
    whole = Plan.from_json({"format": "flexsp-plan/1", "num_devices": 2, "micro_batches": [
        {"groups": [{"ranks": [0, 1], "sequences": [0, 1]}]}]})  # fmt: skip
    apart = Plan.from_json({"format": "flexsp-plan/1", "num_devices": 2, "micro_batches": [
        {"groups": [{"ranks": [0], "sequences": [0]}, {"ranks": [1], "sequences": [1]}]}]})  # fmt: skip
    ids = np.array([3, 4])
    batch = PlannedBatch(step=0, sequence_ids=ids, lengths=sequences().lengths[ids], plan=whole, source=sequences())
    reader = Reader(0, 10.0)
    ahead = replace(batch, ahead=reader.begin(batch))
    other = replace(ahead, plan=apart)
    assert ahead.for_rank(0) is ahead.for_rank(0)  # read once
    assert torch.equal(other.for_rank(0)[0].input_ids, replace(batch, plan=apart).for_rank(0)[0].input_ids)
    assert torch.equal(ahead.for_rank(1)[0].input_ids, batch.for_rank(1)[0].input_ids)
    reader.close()


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
