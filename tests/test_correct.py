"""Correction while training: a wrong profile becomes the right one from what steps took, whatever noise there is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import flexsp
from flexsp import Profile
from flexsp.plans import Plan
from flexsp.profiler.correct import BOUNDS, PATIENCE, Correction, StepTimes, corrected, times_of
from profiles import profile as small_profile

RIGHT = Profile.load(Path(__file__).parents[1] / "examples/profiles/gpt-7b-64xa100.json").for_devices(32)
OWN = 0.2
"""Share of the fixed cost that ranks spend inside their layers."""


def scaled(profile: Profile, attention=1.0, linear=1.0, fixed=1.0, exchange=1.0) -> Profile:
    compute, bandwidth = profile.compute, profile.all_to_all.bandwidth_bytes_per_s
    return replace(
        profile,
        compute=replace(
            compute,
            quadratic_s=attention * compute.quadratic_s,
            linear_s=linear * compute.linear_s,
            fixed_s=fixed * compute.fixed_s,
        ),
        all_to_all=replace(
            profile.all_to_all, bandwidth_bytes_per_s={d: v / exchange for d, v in bandwidth.items()}
        ),
    )  # fmt: skip


def lengths_of(step: int) -> np.ndarray:
    rng = np.random.default_rng([1, step])
    return np.clip(np.exp(rng.normal(7.5, 1.6, 128)).astype(np.int64), 64, 60_000)


def group_s(profile: Profile, plan: Plan, lengths) -> list[list[float]]:
    return [[profile.group_s(g.sp_degree, lengths[list(g.sequences)]) for g in m.groups] for m in plan.micro_batches]


def seconds(profile: Profile, plan: Plan, lengths) -> float:
    """What a plan takes where `profile` is the truth."""
    return sum(profile.compute.fixed_s + max(groups) for groups in group_s(profile, plan, lengths))


def measured(truth: Profile, plan: Plan, lengths, step: int, stall: float = 1.0) -> StepTimes:
    """What ranks would measure: noise of 3 % a group and, in a stalled step, everything `stall` times as long."""
    rng = np.random.default_rng([2, step])
    fixed_s = truth.compute.fixed_s
    groups = tuple(
        tuple(stall * (s * rng.lognormal(0, 0.03) + OWN * fixed_s) for s in row)
        for row in group_s(truth, plan, lengths)
    )
    elapsed = tuple(max(row) + (1 - OWN) * fixed_s * rng.lognormal(0, 0.1) for row in groups)
    return StepTimes(elapsed_s=elapsed, group_s=groups)


def after(correction: Correction, truth: Profile, steps: int, stalled=lambda step: False, first: int = 0) -> Profile:
    """The profile that a run of so many steps ends with."""
    profile = correction.base
    for step in range(first, first + steps):
        lengths = lengths_of(step)
        plan = flexsp.plan(lengths, profile)
        times = measured(truth, plan, lengths, step, 10.0 if stalled(step) else 1.0)
        profile = correction.observe(plan, lengths, times) or profile
    return profile


def regret(profile: Profile, steps: range) -> float:
    """How much longer plans made with `profile` take than those made with the right one."""
    taken = best = 0.0
    for step in steps:
        lengths = lengths_of(step)
        taken += seconds(RIGHT, flexsp.plan(lengths, profile), lengths)
        best += seconds(RIGHT, flexsp.plan(lengths, RIGHT), lengths)
    return taken / best - 1


def bias(profile: Profile, steps: range) -> float:
    """What `profile` predicts of its plans' steps over what they take, noise included, less 1."""
    predicted = taken = 0.0
    for step in steps:
        plan = flexsp.plan(lengths_of(step), profile)
        predicted += plan.predicted_s
        taken += sum(measured(RIGHT, plan, lengths_of(step), step).elapsed_s)
    return predicted / taken - 1


@pytest.mark.parametrize("stalled", [lambda step: False, lambda step: step % 7 == 3], ids=["steady", "stalls"])
def test_plans_of_a_profile_with_thrice_the_attention_cost_become_those_of_the_right_one(stalled):
    wrong = scaled(RIGHT, attention=3.0)
    correction = Correction(wrong)
    learned = after(correction, RIGHT, 20, stalled)
    assert correction.ratios["attention"] == pytest.approx(1 / 3, rel=0.05)
    assert correction.ratios["linear"] == pytest.approx(1.0, rel=0.1)
    # the slowest of many groups is late by more than one group is on average: a micro-batch's own cost
    assert 0.95 < correction.ratios["fixed"] < 1.4
    later = range(100, 106)
    assert regret(wrong, later) > 0.02  # so there is something to learn
    assert regret(learned, later) < 0.01
    assert abs(bias(wrong, later)) > 0.2
    assert abs(bias(learned, later)) < 0.02


def test_all_terms_are_learned_together():
    correction = Correction(scaled(RIGHT, attention=3.0, linear=0.7, fixed=2.0, exchange=0.5))
    after(correction, RIGHT, 30)
    assert correction.ratios["attention"] == pytest.approx(1 / 3, rel=0.1)
    assert correction.ratios["linear"] == pytest.approx(1 / 0.7, rel=0.1)
    assert correction.ratios["fixed"] == pytest.approx(0.55, rel=0.15)
    assert correction.ratios["exchange 16"] == pytest.approx(2.0, rel=0.15)


def test_a_right_profile_stays_as_it_is():
    correction = Correction(RIGHT)
    after(correction, RIGHT, 20)
    for name, ratio in correction.ratios.items():  # an exchange inside a node is a tenth of a group's time
        assert ratio == pytest.approx(1.0, abs=0.08 if name in ("attention", "linear") else 0.3), name


def test_a_machine_that_has_become_slower_is_believed_after_a_few_steps():
    correction = Correction(RIGHT)
    after(correction, RIGHT, 10)
    before = correction.ratios["attention"]
    slower = scaled(RIGHT, attention=2.0, linear=2.0, fixed=2.0, exchange=2.0)
    after(correction, slower, PATIENCE - 1, first=10)
    assert correction.ratios["attention"] == before  # so far it may be a stall
    after(correction, slower, 30, first=20)
    assert correction.ratios["attention"] == pytest.approx(2.0, rel=0.1)


def test_ratios_stay_within_bounds_whatever_is_measured():
    correction = Correction(RIGHT)
    for step, value in enumerate((1e6, 1e-9, 1e6, 1e6, 1e6, 1e6)):
        lengths = lengths_of(step)
        plan = flexsp.plan(lengths, RIGHT)
        groups = tuple(tuple(value for _ in m.groups) for m in plan.micro_batches)
        correction.observe(plan, lengths, StepTimes(elapsed_s=tuple(value for _ in groups), group_s=groups))
        for ratio in correction.ratios.values():
            assert BOUNDS[0] * 0.99 <= ratio <= BOUNDS[1] * 1.01


def test_a_step_that_measured_nothing_teaches_nothing():
    correction = Correction(RIGHT)
    lengths = lengths_of(0)
    plan = flexsp.plan(lengths, RIGHT)
    nothing = tuple(tuple(0.0 for _ in m.groups) for m in plan.micro_batches)
    assert correction.observe(plan, lengths, StepTimes(elapsed_s=(1.0,) * len(nothing), group_s=nothing)) is None
    assert set(correction.ratios.values()) == {1.0}


def test_a_corrected_profile_multiplies_each_term_and_its_tables():
    document = RIGHT.to_json()
    document["tables"] = {"1": {"lengths": [100, 1000], "seconds_per_token": [3e-4, 2e-4]}}
    base = Profile.from_json(document)
    ratios = {"attention": 2.0, "linear": 3.0, "fixed": 0.5, **{f"exchange {d}": 4.0 for d in base.sp_degrees if d > 1}}
    new = corrected(base, ratios)
    compute, d, s = base.compute, 8, 5000
    by_hand = (2 * compute.quadratic_s * s * s + 3 * compute.linear_s * s) / d + 4 * s * base.exchange_s_per_token(d)
    assert new.group_s(d, [s]) == pytest.approx(by_hand)
    assert new.compute.fixed_s == pytest.approx(0.5 * compute.fixed_s)
    assert new.group_table_s(1, [100]) == pytest.approx(
        base.group_table_s(1, [100]) * new.group_s(1, [100]) / base.group_s(1, [100])
    )
    assert new.provenance["correction"] == ratios


def test_a_groups_time_is_its_slowest_ranks_and_a_micro_batchs_that_of_all():
    plan = flexsp.plan([20, 10, 5, 5], small_profile(4), "static", sp_degree=2)
    (micro_batch,) = plan.micro_batches
    times = times_of(plan, [[1.0], [2.0], [3.0], [4.0]], [[0.1], [0.2], [0.4], [0.3]])
    assert times.elapsed_s == (4.0,)
    assert times.group_s == (tuple({(0, 1): 0.2, (2, 3): 0.4}[group.ranks] for group in micro_batch.groups),)
