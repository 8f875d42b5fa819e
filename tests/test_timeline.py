"""The simulator's time: by hand, by the formula of the cost model, and as the plan predicts."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings

import flexsp
from flexsp.plans import Group, MicroBatch, Plan
from flexsp.simulate.timeline import Timeline, replay
from planner_cases import lengths, profiles
from profiles import profile

# Powers of two throughout, so that every sum is exact in binary.
EXACT = profile(
    4,
    compute={"quadratic_s": 2**-12, "linear_s": 2**-6, "fixed_s": 0.5},
    all_to_all={
        "bytes_per_token": 64,
        "bandwidth_bytes_per_s": {"2": 1024, "4": 512},
        "latency_s": {"2": 0.125, "4": 0.25},
    },
)
LENGTHS = np.array([64, 16, 128, 32])
PLAN = Plan(
    num_devices=4,
    micro_batches=(
        MicroBatch(groups=(Group(ranks=(0, 1), sequences=(0, 3)), Group(ranks=(2,), sequences=(1,)))),
        MicroBatch(groups=(Group(ranks=(0, 1, 2, 3), sequences=(2,)),)),
    ),
)


def test_three_groups_by_hand_to_the_last_digit():
    timeline = replay(PLAN, LENGTHS, EXACT)
    two, one, four = timeline.spans
    # degree 2: ((64^2 + 32^2) / 4096 + 96 / 64) / 2 = 1.375; 64 * 96 / (2 * 1024) + 0.125 = 3.125
    assert (two.compute_s, two.exchange_s, two.seconds) == (1.375, 3.125, 4.5)
    # degree 1: 16^2 / 4096 + 16 / 64 = 0.3125, and it waits for the other
    assert (one.compute_s, one.exchange_s, one.seconds, one.idle_s) == (0.3125, 0.0, 0.3125, 4.1875)
    # degree 4: (128^2 / 4096 + 128 / 64) / 4 = 1.5; 64 * 128 / (4 * 512) + 0.25 = 4.25
    assert (four.compute_s, four.exchange_s, four.seconds, four.idle_s) == (1.5, 4.25, 5.75, 0.0)
    assert [span.begin_s for span in timeline.spans] == [0.5, 0.5, 5.5]  # after the fixed cost of their micro-batch
    assert [m.end_s for m in timeline.micro_batches] == [5.0, 11.25]
    assert timeline.step_s == 11.25
    assert [m.idle_ranks for m in timeline.micro_batches] == [(3,), ()]


def test_device_seconds_by_hand():
    shares = replay(PLAN, LENGTHS, EXACT).shares()
    whole = 4 * 11.25
    assert shares.compute == (2 * 1.375 + 0.3125 + 4 * 1.5) / whole
    assert shares.exchange == (2 * 3.125 + 4 * 4.25) / whole
    assert shares.fixed == 4 * 2 * 0.5 / whole
    assert shares.idle == (4.1875 + 4.5) / whole  # the degree-1 group waits, and rank 3 has none


def test_a_policy_changes_compute_and_memory():
    policies = {"recompute": {"activation_bytes_per_token": 5, "compute_factor": 2.0}}
    with_policy = profile(
        4, compute=EXACT.to_json()["compute"], all_to_all=EXACT.to_json()["all_to_all"],
        memory={**EXACT.to_json()["memory"], "policies": policies},
    )  # fmt: skip
    groups = PLAN.micro_batches[1].groups
    plan = Plan(num_devices=4, micro_batches=(PLAN.micro_batches[0], MicroBatch(groups=groups, policy="recompute")))
    four = replay(plan, LENGTHS, with_policy).spans[-1]
    assert (four.compute_s, four.exchange_s) == (3.0, 4.25)
    assert four.memory_bytes == 1000 + 5 * 128 / 4


def by_formula(plan: Plan, tokens: list[int], profile: flexsp.Profile) -> float:
    """Seconds of a plan as design and paper write it, from the profile's numbers alone."""
    compute, exchange, total_s = profile.compute, profile.all_to_all, 0.0
    for micro_batch in plan.micro_batches:
        slowest_s = 0.0
        factor = profile.memory.policies[micro_batch.policy].compute_factor if micro_batch.policy else 1.0
        for group in micro_batch.groups:
            d, held = len(group.ranks), [tokens[i] for i in group.sequences]
            group_s = factor * sum(compute.quadratic_s * s**2 + compute.linear_s * s for s in held) / d
            if d > 1:
                group_s += exchange.bytes_per_token * sum(held) / (d * exchange.bandwidth_bytes_per_s[d])
                group_s += exchange.latency_s.get(d, 0.0)
            slowest_s = max(slowest_s, group_s)
        total_s += compute.fixed_s + slowest_s
    return total_s


def idle_by_rank(timeline: Timeline) -> float:
    """Device-seconds of idleness, rank by rank."""
    idle_s = 0.0
    for micro_batch in timeline.micro_batches:
        for rank in range(timeline.num_devices):
            ends = [span.end_s for span in micro_batch.groups if rank in span.ranks]
            assert len(ends) <= 1
            idle_s += micro_batch.end_s - (ends[0] if ends else micro_batch.begin_s + micro_batch.fixed_s)
    return idle_s


@settings(derandomize=True, deadline=None)
@given(tokens=lengths(8), profile=profiles())
def test_step_time_is_the_plans_prediction_and_the_formulas(tokens, profile):
    plan = flexsp.plan(tokens, profile)
    if not plan.has_plan:
        return
    timeline = replay(plan, np.array(tokens), profile)
    assert timeline.step_s == plan.predicted_s
    assert timeline.step_s == pytest.approx(by_formula(plan, tokens, profile), rel=1e-12)
    shares = timeline.shares()
    assert shares.compute + shares.exchange + shares.fixed + shares.idle == pytest.approx(1.0)
    assert shares.idle * timeline.step_s * profile.num_devices == pytest.approx(idle_by_rank(timeline), abs=1e-9)
    assert sorted(i for span in timeline.spans for i in span.sequences) == list(range(len(tokens)))
    assert max(span.memory_bytes for span in timeline.spans) <= profile.memory.memory_bytes * (1 + 1e-12)


def test_an_illegal_plan_is_refused_with_its_first_fault():
    with pytest.raises(ValueError, match=r"1 of 5 sequences are in no group, the first is 4; correct it, or see all"):
        replay(PLAN, np.append(LENGTHS, 7), EXACT)
