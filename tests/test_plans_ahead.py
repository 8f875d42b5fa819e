"""Plans made ahead: what a planner prints, whose step an error is, and what the fallback can plan."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

import flexsp
from flexsp import violations
from flexsp.data.plans_ahead import PlansAhead
from flexsp.planner.service import PlannerError, PlannerGoneError, PlanService
from flexsp.profile import Policy, Profile
from profiles import profile

pytestmark = pytest.mark.alone

LENGTHS = np.array([30, 4])


@contextmanager
def ahead(planner: str, steps: int, given: Profile | None = None, fallback: str = "") -> Iterator[PlansAhead]:
    """The steps submitted, and answered."""
    plans = PlansAhead(given or profile(2), f"slow_planners:{planner}", {}, 300.0, fallback)
    try:
        for step in range(steps):
            plans.submit(step, LENGTHS)
        yield plans
    finally:
        plans.close()


def test_a_planner_may_print_any_bytes_and_as_many_as_it_likes():
    service = PlanService(profile(2), "slow_planners:latin1", {})
    try:
        for _ in range(3):
            service.submit(LENGTHS)
            assert service.result(300.0)[0].has_plan
        assert len(service._process._last_said) <= 4096
    finally:
        service.close()


def test_the_last_words_of_a_planner_that_ends_are_told():
    service = PlanService(profile(2), "slow_planners:latin1_and_dies", {})
    try:
        service.submit(LENGTHS)
        with pytest.raises(PlannerGoneError, match=r"ended with status 3: x+ r\N{REPLACEMENT CHARACTER}sum") as raised:
            service.result(300.0)
        assert len(str(raised.value)) < 500
    finally:
        service.close()


def test_an_error_of_a_later_step_is_told_when_it_asks():
    with ahead("nan_at_the_third", 4) as plans:
        assert plans.take(0).keys() >= {0}
        until = time.monotonic() + 300.0
        while plans._service._process._answers.qsize() + len(plans._service._process._peeked) < 3:
            assert time.monotonic() < until
            time.sleep(0.02)
        assert sorted(plans.take(1)) == [1, 3]
        with pytest.raises(PlannerError, match="predicted_s"):
            plans.take(2)
        assert plans.take(3) == {}


def test_a_later_steps_error_is_forgotten_with_its_plan():
    with ahead("nan_at_the_third", 3) as plans:
        plans.take(1)
        plans.forget()
        plans.submit(2, LENGTHS)
        assert plans.take(2)[2].plan.has_plan


def test_the_fallback_plans_under_a_policy_where_only_that_holds_the_longest():
    base = profile(2)
    policies = {
        "selective": Policy(activation_bytes_per_token=5.0, compute_factor=1.1),
        "full": Policy(activation_bytes_per_token=2.0, compute_factor=1.3),
    }
    given = replace(base, memory=replace(base.memory, policies=policies))
    lengths = np.array([600, 50, 40, 30])
    assert flexsp.plan(lengths, given).has_plan and not flexsp.plan(lengths, given, "batch-adaptive").has_plan
    with ahead("raises", 0, given, "batch-adaptive") as plans:
        for step, each in enumerate((lengths, LENGTHS, np.array([1001]))):
            plans.submit(step, each)
        made = [plans.take(step)[step] for step in range(3)]
    assert [each.fallback for each in made] == [True] * 3
    assert violations(made[0].plan, lengths, given) == []
    assert {micro_batch.policy for micro_batch in made[0].plan.micro_batches} == {"full"}
    assert {micro_batch.policy for micro_batch in made[1].plan.micro_batches} == {None}
    assert not made[2].plan.has_plan and "1001 tokens fit into no group" in made[2].plan.reason
