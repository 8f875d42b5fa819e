"""From lengths to the figures of a simulation: cases, parallel planning, and what the figures mean."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import flexsp
from flexsp.batches import Overlong, global_batch
from flexsp.planner.policies import under_policy
from flexsp.profile import Policy
from flexsp.simulate.cases import make_case
from flexsp.simulate.figures import StepFigures, planner_figures, step_figures
from flexsp.simulate.runs import Done, case_figures, simulate
from profiles import profile

DOCUMENTS = np.array([300, 5, 5, 90, 20, 40, 5, 60, 10, 150, 7, 33])
FOUR = profile(4)


def case(**changes):
    return make_case("docs", **{"lengths": DOCUMENTS, "profile": FOUR, "batch_size": 6, **changes})


# ---- cases


def test_batches_are_those_that_training_forms():
    made = case(seed=3)
    ids = [global_batch(12, 6, 3, step) for step in range(2)]
    assert [made.batch(step).tolist() for step in range(2)] == [DOCUMENTS[i].tolist() for i in ids]
    assert sorted(np.concatenate([made.batch(0), made.batch(1)]).tolist()) == sorted(DOCUMENTS.tolist())


def test_without_a_batch_size_the_lengths_are_one_batch_in_their_order():
    assert case(batch_size=None).batch(0).tolist() == DOCUMENTS.tolist()


def test_context_limit_decides_the_baselines_degree():
    assert case().static_sp_degree == 4  # 300 tokens; a rank holds 100
    dropped = case(max_length=200, overlong=Overlong.DROP)
    assert dropped.static_sp_degree == 2 and dropped.touched.lost_tokens == 300 and 300 not in dropped.lengths
    split = case(max_length=200, overlong=Overlong.SPLIT)
    assert split.lengths.sum() == DOCUMENTS.sum() and split.lengths.max() == 200
    assert case(max_length=350).static_sp_degree == 4  # the limit counts, not the longest there is
    assert case(static_sp_degree=4, max_length=200, overlong=Overlong.DROP).static_sp_degree == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 200}, r"docs\[0\]: length=300 exceeds max_length=200, as do 1 of 12"),
        ({"max_length": 4, "overlong": Overlong.DROP}, r"docs: all 12 documents exceed max_length=4"),
        ({"max_length": 401}, r"max_length=401 tokens fit into no group"),
        ({"batch_size": 13}, r"batch_size=13 is above the 12 sequences of docs"),
        ({"static_sp_degree": 3}, r"sp_degree=3 must be one of sp_degrees=\[1, 2, 4\]"),
        ({"static_sp_degree": 2}, r"sp_degree=2 holds 200 tokens, below the context limit of 300"),
    ],
)
def test_a_case_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        case(**changes)


def test_a_policy_holds_for_every_micro_batch():
    memory = replace(FOUR.memory, policies={"recompute": Policy(activation_bytes_per_token=5, compute_factor=1.5)})
    with_policies = replace(FOUR, memory=memory)
    plain, recompute = under_policy(with_policies, None), under_policy(with_policies, "recompute")
    assert not plain.memory.policies and plain.group_s(2, [50]) == with_policies.group_s(2, [50])
    assert recompute.group_s(2, [50]) == pytest.approx(with_policies.group_s(2, [50], "recompute"), rel=1e-15)
    assert recompute.group_bytes(2, 50) == with_policies.group_bytes(2, 50, "recompute")
    with pytest.raises(ValueError, match=r"policy='offload' is not in the profile's policies \(recompute\)"):
        under_policy(with_policies, "offload")


# ---- runs


def test_every_planner_plans_every_batch_of_every_case_and_the_baseline_is_among_them():
    cases = [case(), case(seed=1, max_length=200, overlong=Overlong.DROP)]
    done = list(simulate(cases, ["flex", "batch-adaptive"], 2, workers=2))
    wanted = {(c, name, step) for c in (0, 1) for name in ("flex", "batch-adaptive", "static") for step in (0, 1)}
    assert {(one.case, one.planner, one.step) for one in done} == wanted and len(done) == len(wanted)
    for one in done:
        lengths = cases[one.case].batch(one.step)
        again = flexsp.plan(lengths, FOUR, one.planner, **(
            {"sp_degree": cases[one.case].static_sp_degree} if one.planner == "static" else {}
        ))  # fmt: skip
        assert one.plan.micro_batches == again.micro_batches
        assert one.figures.step_s == again.predicted_s


def test_a_planner_that_fails_is_refused_with_the_reason_and_the_others_go_on():
    planners = ["flex", "slow_planners:raises", "slow_planners:illegal"]
    figures = case_figures(case(), list(simulate([case()], planners, 1, workers=1)), planners)
    assert list(figures.planners) == ["flex", "static"]
    assert figures.refused["slow_planners:raises"] == (
        "step 0: planner='slow_planners:raises' failed (ArithmeticError: no plan today); correct it"
    )
    assert "sequences are in no group" in figures.refused["slow_planners:illegal"]


@pytest.mark.parametrize(
    ("planner", "reason"),
    [
        ("slow_planners:exits", "it raised SystemExit: 3"),
        (
            "slow_planners:nothing",
            "planner='slow_planners:nothing' returned NoneType instead of a flexsp.Plan",
        ),
        ("slow_planners:writes", "plan: lengths_sha256 is not that of these lengths"),
    ],
)
def test_a_planner_of_the_users_own_that_misbehaves_is_refused(planner, reason):
    figures = case_figures(case(), list(simulate([case()], [planner], 1, workers=1)), [planner])
    assert list(figures.planners) == ["static"] and figures.refused[planner].startswith(f"step 0: {reason}")


def test_a_bound_that_a_planner_claims_is_not_believed():
    lengths = np.array([300, 5, 90, 8])
    plan = flexsp.plan(lengths, FOUR)
    assert step_figures(0, replace(plan, lower_bound_s=1e9), lengths, FOUR).lower_bound_s == plan.lower_bound_s


def test_a_profile_in_which_nothing_takes_time_is_refused():
    free = profile(4, compute={"quadratic_s": 0, "linear_s": 0, "fixed_s": 0})
    with pytest.raises(ValueError, match=r"test: quadratic_s, linear_s and fixed_s are all 0; give a profile with"):
        next(simulate([replace(case(), profile=free)], ["flex"], 1))


def test_a_dying_planner_is_an_error_not_a_hang():
    with pytest.raises(ValueError, match=r"a planner's process ended by itself"):
        list(simulate([case()], ["slow_planners:dies"], 1, workers=1))


def test_closing_early_ends_the_workers():
    before = set(multiprocessing.active_children())  # ranks of other tests
    with closing(simulate([case()], ["slow_planners:slow"], 50, workers=2)) as running:
        next(running)
    assert set(multiprocessing.active_children()) <= before


STALLS = "slow_planners:tells_in_a_folder_and_stalls"
PARENT = """
import sys
from flexsp.simulate.runs import simulate
from test_simulate import STALLS, case
if __name__ == "__main__":
    list(simulate([case()], [STALLS], 8, options={STALLS: {"path": sys.argv[1]}}, workers=1))
"""


def test_a_worker_ends_with_a_parent_that_is_killed(tmp_path):
    here = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path)], env={**os.environ, "PYTHONPATH": here})
    until = time.monotonic() + 100.0
    try:
        while not list(tmp_path.iterdir()) and parent.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.wait()
    (worker,) = [Path("/proc", each.name, "cmdline") for each in tmp_path.iterdir()]
    while worker.exists() and worker.read_text():  # a zombie's is empty
        assert time.monotonic() < until
        time.sleep(0.05)


# ---- figures


def steps_of(planner: str, count: int) -> list[StepFigures]:
    made = case(seed=5)
    options = {"sp_degree": 4} if planner == "static" else {}
    return [
        step_figures(step, flexsp.plan(made.batch(step), FOUR, planner, **options), made.batch(step), FOUR)
        for step in range(count)
    ]


def test_figures_of_a_step_count_what_is_there():
    lengths = np.array([300, 5, 90, 8])
    plan = flexsp.plan(lengths, FOUR)
    figures = step_figures(7, plan, lengths, FOUR)
    assert (figures.step, figures.sequences, figures.tokens) == (7, 4, 403)
    assert figures.step_s == plan.predicted_s and figures.lower_bound_s == plan.lower_bound_s
    assert sum(figures.tokens_by_degree.values()) == 403
    bands = {band for counts in figures.sequences_by_degree.values() for band in counts}
    assert bands == {2, 3, 6, 8}  # 5, 8, 90 and 300 lie from 4, 8, 64 and 256 on
    assert sum(n for counts in figures.sequences_by_degree.values() for n in counts.values()) == 4
    used = {(g.ranks[0], g.sp_degree) for m in plan.micro_batches for g in m.groups if g.sp_degree > 1}
    assert set(figures.process_groups) == used


def test_figures_by_the_measured_tables_are_those_that_a_plan_is_chosen_by():
    document = profile(4).to_json()
    document["tables"] = {"1": {"lengths": [10, 100], "seconds_per_token": [0.002, 0.004]}}
    with_tables = flexsp.Profile.from_json(document)
    lengths = np.array([60, 30, 20, 10, 90])
    plan = flexsp.plan(lengths, with_tables)
    assert plan.predicted_table_s is not None and plan.predicted_table_s != plan.predicted_s
    figures = step_figures(0, plan, lengths, with_tables)
    assert figures.table_s == pytest.approx(plan.predicted_table_s) and figures.step_s == pytest.approx(
        plan.predicted_s
    )
    static = step_figures(0, flexsp.plan(lengths, with_tables, "static"), lengths, with_tables)
    assert planner_figures("flex", [figures], [static]).table_speedup == pytest.approx(static.table_s / figures.table_s)
    assert step_figures(0, flexsp.plan(lengths, profile(4)), lengths, profile(4)).table_s is None


def test_figures_of_all_steps_are_those_of_the_whole():
    flex, static = steps_of("flex", 5), steps_of("static", 5)
    figures = planner_figures("flex", flex, static)
    total_s, static_s = sum(s.step_s for s in flex), sum(s.step_s for s in static)
    assert figures.median_step_s == statistics.median(s.step_s for s in flex)
    assert figures.speedup == static_s / total_s
    assert figures.step_speedups == tuple(b.step_s / s.step_s for b, s in zip(static, flex, strict=True))
    # device-seconds of idleness over device-seconds, not the mean of shares
    assert figures.idle_share == pytest.approx(sum(s.idle_share * s.step_s for s in flex) / total_s)
    parts = (figures.compute_share, figures.exchange_share, figures.fixed_share, figures.idle_share)
    assert sum(parts) == pytest.approx(1)
    assert sum(figures.tokens_by_degree.values()) == pytest.approx(1)
    assert figures.tokens_per_s == pytest.approx(sum(s.tokens for s in flex) / total_s)
    assert planner_figures("static", static, static).speedup == 1


def test_only_steps_that_all_planners_have_done_count():
    made = case(seed=5)
    done = [
        Done(case=0, planner=planner, step=one.step, figures=one)
        for planner, count in (("flex", 3), ("static", 4))
        for one in steps_of(planner, count)
    ]
    done.remove(next(one for one in done if one.planner == "static" and one.step == 1))
    figures = case_figures(made, done, ["flex"])
    assert [s.step for s in figures.planners["flex"].steps] == [0, 2]
    assert [s.step for s in figures.planners["static"].steps] == [0, 2]
    assert case_figures(made, [one for one in done if one.planner == "flex"], ["flex"]) is None
