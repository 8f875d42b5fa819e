"""What must hold for every batch and every profile. A failure names a profile and lengths to plan by hand.

`exact` looks at every plan there is and shares nothing with `flex` and its bound but the formulas of the profile.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flexsp
from flexsp.planner.bound import lower_bound_s
from flexsp.profile import Profile
from planner_cases import lengths, profiles

ROUNDING = 1e-9  # sums of a few dozen doubles in another order

few = settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
fewer = settings(few, max_examples=60)


@few
@given(profile=profiles(), batch=lengths())
def test_the_bound_is_below_the_optimum_and_flex_within_5_per_cent_above_it(profile: Profile, batch: list[int]) -> None:
    exact, flex = flexsp.plan(batch, profile, "exact"), flexsp.plan(batch, profile)
    assert exact.has_plan == flex.has_plan
    if not exact.has_plan:
        return
    assert flexsp.violations(exact, batch, profile) == []
    assert flexsp.violations(flex, batch, profile) == []
    assert exact.predicted_s is not None and flex.predicted_s is not None and flex.lower_bound_s is not None
    assert flex.lower_bound_s <= exact.predicted_s * (1 + ROUNDING)
    assert exact.predicted_s <= flex.predicted_s * (1 + ROUNDING)
    assert flex.predicted_s <= exact.predicted_s * 1.05


@fewer
@given(profile=profiles(most_devices=4), batch=lengths(5), memory=st.sampled_from([1.05, 1.5, 4.0]))
def test_with_more_memory_the_optimum_never_rises(profile: Profile, batch: list[int], memory: float) -> None:
    roomy = replace(profile, memory=replace(profile.memory, memory_bytes=profile.memory.memory_bytes * memory))
    _never_worse(profile, roomy, batch)


@fewer
@given(profile=profiles(most_devices=4), batch=lengths(5))
def test_with_a_node_more_the_optimum_never_rises(profile: Profile, batch: list[int]) -> None:
    nodes = -(-profile.num_devices // profile.devices_per_node)
    larger = replace(profile, num_devices=(nodes + 1) * profile.devices_per_node)
    if larger.num_devices <= 8:
        _never_worse(profile, larger, batch)


def _never_worse(profile: Profile, richer: Profile, batch: list[int]) -> None:
    before, after = flexsp.plan(batch, profile, "exact"), flexsp.plan(batch, richer, "exact")
    if before.predicted_s is None:
        return
    assert after.predicted_s is not None
    assert after.predicted_s <= before.predicted_s * (1 + ROUNDING)
    assert lower_bound_s(np.array(batch), richer) <= after.predicted_s * (1 + ROUNDING)


@fewer
@given(profile=profiles(), batch=lengths(12), data=st.data())
def test_the_order_of_the_lengths_changes_neither_time_nor_bound(
    profile: Profile, batch: list[int], data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(batch))
    one, other = flexsp.plan(batch, profile), flexsp.plan(shuffled, profile)
    assert one.status == other.status
    if one.predicted_s is not None and other.predicted_s is not None:
        assert abs(one.predicted_s - other.predicted_s) <= ROUNDING * one.predicted_s
        assert one.lower_bound_s == other.lower_bound_s


@fewer
@given(profile=profiles(), batch=lengths(40), time_limit_s=st.sampled_from([0.0, 1e-4, 0.003]))
def test_a_time_limit_leaves_plans_legal(profile: Profile, batch: list[int], time_limit_s: float) -> None:
    plan = flexsp.plan(batch, profile, time_limit_s=time_limit_s)
    if plan.has_plan:
        assert flexsp.violations(plan, batch, profile) == []


@few
@given(profile=profiles(most_devices=24), batch=lengths(60))
def test_plans_of_larger_batches_are_legal_and_above_their_bound(profile: Profile, batch: list[int]) -> None:
    plan = flexsp.plan(batch, profile)
    if plan.has_plan:
        assert flexsp.violations(plan, batch, profile) == []
        assert plan.predicted_s is not None and plan.lower_bound_s is not None
        assert lower_bound_s(np.array(batch), profile) <= plan.predicted_s * (1 + ROUNDING)
