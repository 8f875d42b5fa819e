"""Inputs at the edges: each must give a legal plan, or a plan that says why there is none."""

from __future__ import annotations

import numpy as np
import pytest

import flexsp
from flexsp import Plan, Profile, Status
from flexsp.profile import Policy
from planner_cases import profile_of

WITH_PLAN = ["flex", "batch-adaptive", "static"]


def planned(lengths: list[int], profile: Profile, planner: str = "flex") -> Plan:
    plan = flexsp.plan(lengths, profile, planner)
    assert flexsp.violations(plan, lengths, profile) == []
    assert plan.predicted_s is not None and plan.lower_bound_s is not None
    assert plan.lower_bound_s <= plan.predicted_s
    return plan


@pytest.mark.parametrize("planner", WITH_PLAN)
@pytest.mark.parametrize(
    "lengths",
    [
        pytest.param([1], id="one token"),
        pytest.param([700], id="one sequence"),
        pytest.param([500] * 40, id="all equal"),
        pytest.param([1] * 3000, id="one-token sequences"),
        pytest.param([8000], id="one sequence fills the cluster"),
        pytest.param([8000] * 5, id="each fills the cluster"),
        pytest.param([8000, *[1] * 50], id="one fills the cluster, others are tiny"),
        pytest.param([1000] * 16, id="exactly one device's capacity"),
        pytest.param([1000, 2000, 4000, 1000, 8000], id="exactly each degree's capacity"),
        pytest.param([1001, 2001, 4001], id="one token above each capacity"),
        pytest.param([300, 200, 100], id="fewer sequences than devices"),
    ],
)
def test_edges_of_lengths(lengths: list[int], planner: str) -> None:
    planned(lengths, profile_of(), planner)


@pytest.mark.parametrize(
    "profile",
    [
        pytest.param(profile_of(8, 8, (2, 4, 8)), id="no degree 1"),
        pytest.param(profile_of(8, 8, (8,)), id="only the whole cluster"),
        pytest.param(profile_of(12, 4, (1, 2, 4, 8)), id="devices no power of two"),
        pytest.param(profile_of(12, 6, (1, 2, 4, 8)), id="nodes of 6 with powers of two"),
        pytest.param(profile_of(12, 6, (1, 2, 3, 6, 12)), id="nodes of 6"),
        pytest.param(profile_of(18, 6, (3, 6, 12, 18)), id="nodes of 6 without 1"),
        pytest.param(profile_of(7, 8, (1, 2, 4)), id="less than a node"),
        pytest.param(profile_of(24, 8, (1, 3, 5, 6, 12, 24)), id="degrees that leave gaps in nodes"),
        pytest.param(profile_of(latency_s=10.0), id="latency-dominated"),
        pytest.param(profile_of(between_nodes=1.0, devices_per_node=2), id="bandwidth-flat"),
        pytest.param(profile_of(exchange_s=0.0, devices_per_node=2), id="exchange costs nothing"),
        pytest.param(profile_of(fixed_s=0.0), id="micro-batches cost nothing"),
        pytest.param(profile_of(fixed_s=100.0), id="micro-batches cost everything"),
        pytest.param(profile_of(quadratic_s=0.0), id="attention costs nothing"),
        pytest.param(profile_of(quadratic_s=0.0, linear_s=0.0, exchange_s=0.0), id="nothing costs anything"),
        pytest.param(profile_of(1, 1, (1,), room_tokens=4000), id="one device"),
    ],
)
def test_edges_of_profiles(profile: Profile) -> None:
    random = np.random.default_rng(0)
    planned(random.integers(1, 3000, 60).tolist(), profile)
    planned([3000], profile)


def test_one_sequence_runs_at_its_fastest_degree_and_is_proven_optimal() -> None:
    plan = planned([800], profile_of())
    assert plan.status is Status.OPTIMAL
    assert [micro_batch.sp_degrees for micro_batch in plan.micro_batches] == [[8]]


def test_with_latency_above_all_work_nothing_is_exchanged() -> None:
    plan = planned([500] * 8, profile_of(latency_s=10.0))
    assert [micro_batch.sp_degrees for micro_batch in plan.micro_batches] == [[1] * 8]


def test_too_long_a_sequence_is_a_reason_with_what_would_make_it_fit() -> None:
    plan = flexsp.plan([5, 8001, 7], profile_of())
    assert plan.status is Status.INFEASIBLE
    assert plan.reason is not None
    assert "lengths[1]=8001 tokens" in plan.reason  # which
    assert "sp_degree=8 holds at most 8000 tokens" in plan.reason
    assert "memory_bytes=1.01e+05" in plan.reason  # what it needs
    assert "a degree of 9" in plan.reason  # what would make it fit
    assert "\n" not in plan.reason


def test_a_policy_that_makes_the_longest_fit_is_chosen_and_the_reason_knows_it() -> None:
    policies = {"recompute": Policy(activation_bytes_per_token=50, compute_factor=1.3)}
    profile = profile_of(policies=policies)
    plan = planned([16000, *[100] * 20], profile)
    assert "recompute" in [micro_batch.policy for micro_batch in plan.micro_batches]
    reason = flexsp.plan([16001], profile).reason
    assert reason is not None and "under policy 'recompute' holds at most 16000 tokens" in reason


def test_no_degree_with_a_legal_place_is_a_reason() -> None:
    plan = flexsp.plan([5], profile_of(6, 3, (4,)))
    assert plan.status is Status.FEASIBLE  # 4 is larger than a node of 3 but starts at one
    plan = flexsp.plan([5], profile_of(5, 3, (4,)))
    assert plan.has_plan or "no degree" in str(plan.reason)


@pytest.mark.parametrize("time_limit_s", [-1.0, float("nan")])
def test_a_senseless_time_limit_is_refused(time_limit_s: float) -> None:
    with pytest.raises(ValueError, match=r"time_limit_s=.* must be at least 0"):
        flexsp.plan([5], profile_of(), time_limit_s=time_limit_s)


def test_a_profile_in_which_nothing_takes_time_is_refused() -> None:
    with pytest.raises(ValueError, match="quadratic_s, linear_s and fixed_s are all 0; give a profile with costs"):
        flexsp.plan([5, 6, 7], profile_of(quadratic_s=0.0, linear_s=0.0, fixed_s=0.0))


def test_exact_refuses_what_it_cannot_look_at() -> None:
    with pytest.raises(ValueError, match=r"num_sequences=9 must be at most 8"):
        flexsp.plan([1] * 9, profile_of(), "exact")
    with pytest.raises(ValueError, match=r"num_devices=16 must be at most 8"):
        flexsp.plan([1], profile_of(16), "exact")
