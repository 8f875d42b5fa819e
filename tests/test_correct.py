"""Correction while training: a wrong profile becomes the right one from what steps took, whatever noise there is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import flexsp
from flexsp import Profile
from flexsp.plans import Plan
from flexsp.profile import Table
from flexsp.profiler.correct import BOUNDS, LEAST, WINDOW, Correction, StepTimes, corrected, times_of
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


def never(step: int) -> float:
    """By what a step is stalled."""
    return 1.0


def after(correction: Correction, truth: Profile, steps: int, stall=never, first: int = 0) -> Profile:
    """The profile that a run of so many steps ends with."""
    profile = correction.profile()
    for step in range(first, first + steps):
        lengths = lengths_of(step)
        plan = flexsp.plan(lengths, profile)
        times = measured(truth, plan, lengths, step, stall(step))
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


@pytest.mark.parametrize("stall", [never, lambda step: 10.0 if step % 7 == 3 else 1.0], ids=["steady", "stalls"])
def test_plans_of_a_profile_with_thrice_the_attention_cost_become_those_of_the_right_one(stall):
    wrong = scaled(RIGHT, attention=3.0)
    correction = Correction(wrong)
    learned = after(correction, RIGHT, 20, stall)
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


@pytest.mark.parametrize(
    "stalls",
    [
        {0: 10.0},
        {0: 10.0, 1: 10.0, 2: 10.0},
        {5: 10.0, 6: 10.0, 7: 10.0},  # just when ratios are first taken
        {10: 10.0, 11: 10.0, 12: 10.0},
        {0: 3.0},
        {0: 0.01},
        {9: 0.1, 10: 0.1, 11: 0.1},
        {step: 10.0 for step in range(1, 20, 2)},
    ],
    ids=["first", "first three", "three at first ratios", "three later", "thrice", "fast", "three fast", "every other"],
)
def test_held_up_or_rushed_steps_change_nothing(stalls):
    correction, profile = Correction(RIGHT), RIGHT
    for step in range(20):
        profile = after(correction, RIGHT, 1, lambda step: stalls.get(step, 1.0), first=step)
        for name, ratio in correction.ratios.items():  # at no step, so that no plan suffers
            assert ratio == pytest.approx(1.0, abs=0.08 if name in ("attention", "linear") else 0.35), (step, name)
    assert regret(profile, range(100, 102)) < 0.01


def test_a_machine_that_has_become_slower_is_believed_after_a_few_steps():
    correction = Correction(RIGHT)
    after(correction, RIGHT, 14)
    before = correction.ratios["attention"]
    slower = scaled(RIGHT, attention=2.0, linear=2.0, fixed=2.0, exchange=2.0)
    after(correction, slower, 3, first=14)
    assert correction.ratios["attention"] == pytest.approx(before, rel=0.02)  # so far it may be a stall
    after(correction, slower, 11, first=17)
    for name in ("attention", "linear", "exchange 16"):
        assert correction.ratios[name] == pytest.approx(2.0, rel=0.1), name
    after(correction, RIGHT, 14, first=28)
    for name in ("attention", "linear", "exchange 16"):
        assert correction.ratios[name] == pytest.approx(1.0, rel=0.1), name


def test_a_term_that_plans_no_longer_exercise_goes_back_to_what_was_measured_before():
    correction = Correction(RIGHT)
    truth = scaled(RIGHT, exchange=3.0)
    found = []
    for degree, steps in ((16, LEAST), (8, WINDOW)):
        for step in range(steps):
            lengths = np.minimum(lengths_of(step), 40_000)  # what a group of 8 can hold
            plan = flexsp.plan(lengths, RIGHT, "static", sp_degree=degree)
            correction.observe(plan, lengths, measured(truth, plan, lengths, step))
        found.append(correction.ratios["exchange 16"])
    assert found[0] > 1.5  # part of it is taken for other terms, which one degree does not tell apart
    assert found[1] == pytest.approx(1.0, abs=0.01)


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


def test_what_a_large_step_leaves_in_memory_is_bounded():
    correction = Correction(small_profile(64, capacity=4096))
    lengths = np.full(10_000, 100)
    plan = flexsp.plan(lengths, correction.base, "static", sp_degree=1)
    assert len(plan.micro_batches) > 3
    groups = tuple(tuple(1.0 for _ in m.groups) for m in plan.micro_batches)
    for _ in range(WINDOW + 10):
        correction.observe(plan, lengths, StepTimes(elapsed_s=tuple(1.0 for _ in groups), group_s=groups))
    assert len(correction._steps) == WINDOW


def test_a_corrected_profile_multiplies_each_term_and_each_table_by_its_own_ratio():
    document = RIGHT.to_json()
    document["tables"] = {d: {"lengths": [100, 1000], "seconds_per_token": [3e-4, 2e-4]} for d in ("1", "8")}
    base = Profile.from_json(document)
    ratios = {"attention": 2.0, "linear": 3.0, "fixed": 0.5, **{f"exchange {d}": 4.0 for d in base.sp_degrees if d > 1}}
    new = corrected(base, {**ratios, "table 8": 1.5})
    compute, d, s = base.compute, 8, 5000
    by_hand = (2 * compute.quadratic_s * s * s + 3 * compute.linear_s * s) / d + 4 * s * base.exchange_s_per_token(d)
    assert new.group_s(d, [s]) == pytest.approx(by_hand)
    assert new.compute.fixed_s == pytest.approx(0.5 * compute.fixed_s)
    assert new.group_table_s(8, [100]) == pytest.approx(1.5 * base.group_table_s(8, [100]))
    assert new.tables[1] == base.tables[1]
    assert corrected(base, {}) == base


def with_tables(profile: Profile, times: float) -> Profile:
    """`profile` with tables that say twice its seconds for sequences below 2K, `times` as much throughout."""
    grid = (64, 256, 1024, 1999, 2001, 4096, 16384, 65536)
    return replace(
        profile,
        tables={
            d: Table(
                lengths=grid,
                seconds_per_token=tuple(times * profile.group_s(d, [s]) / s * (2.0 if s < 2000 else 1.0) for s in grid),
            )
            for d in profile.sp_degrees
        },
    )


@pytest.mark.parametrize("times", [1.0, 2.0], ids=["tables right", "machine twice as slow"])
def test_tables_that_are_right_stay_so_though_the_formula_is_not_and_others_follow_the_machine(times):
    base, truth = with_tables(RIGHT, 1.0), with_tables(RIGHT, times)
    fixed_s = RIGHT.compute.fixed_s

    def steps(first: int, number: int):
        for step in range(first, first + number):
            lengths = np.clip(lengths_of(step), 64, 1500)
            plan = flexsp.plan(lengths, profile)
            rng = np.random.default_rng([3, step])
            by_table = [[truth.group_table_s(g.sp_degree, lengths[list(g.sequences)].tolist()) for g in m.groups]
                        for m in plan.micro_batches]  # fmt: skip
            groups = tuple(tuple(s * rng.lognormal(0, 0.02) + OWN * fixed_s for s in row) for row in by_table)
            elapsed = tuple(max(row) + (1 - OWN) * fixed_s for row in groups)
            yield plan, lengths, StepTimes(elapsed_s=elapsed, group_s=groups)

    correction, profile = Correction(base), base
    for plan, lengths, taken in steps(0, 15):
        profile = correction.observe(plan, lengths, taken) or profile
    for degree in {d for plan, _, _ in steps(0, 3) for m in plan.micro_batches for d in m.sp_degrees}:
        assert correction.ratios[f"table {degree}"] == pytest.approx(times, rel=0.03)
    for plan, _, taken in steps(100, 3):
        assert plan.predicted_table_s == pytest.approx(sum(taken.elapsed_s), rel=0.03)


def test_ratios_of_an_earlier_start_hold_until_new_steps_say_more():
    correction = Correction(RIGHT, {"attention": 3.0, "linear": 100.0, "a term of another version": 2.0})
    assert correction.ratios["attention"] == 3.0
    assert correction.ratios["linear"] == BOUNDS[1]  # of the whole, whatever was restored
    assert set(correction.ratios) == set(correction.names)
    assert correction.profile().compute.quadratic_s == 3.0 * RIGHT.compute.quadratic_s
    after(correction, RIGHT, LEAST - 1)
    assert correction.ratios["attention"] == 3.0
    after(correction, RIGHT, 1, first=LEAST)
    assert correction.ratios["attention"] == pytest.approx(1.0, rel=0.1)


def test_a_groups_time_is_its_slowest_ranks_and_a_micro_batchs_that_of_all():
    plan = flexsp.plan([20, 10, 5, 5], small_profile(4), "static", sp_degree=2)
    (micro_batch,) = plan.micro_batches
    times = times_of(plan, [[1.0], [2.0], [3.0], [4.0]], [[0.1], [0.2], [0.4], [0.3]])
    assert times.elapsed_s == (4.0,)
    assert times.group_s == (tuple({(0, 1): 0.2, (2, 3): 0.4}[group.ranks] for group in micro_batch.groups),)
