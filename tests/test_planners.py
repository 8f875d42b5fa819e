"""What all planners promise, and what static and batch-adaptive are."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flexsp
from flexsp import Status, violations
from flexsp.planner.best_fit import pack_one_degree
from flexsp.planner.placement import legal_starts, most_groups, place
from profiles import profile

PLANNERS = ["flex", "batch-adaptive", "static"]
batches = st.lists(st.one_of(st.integers(1, 400), st.integers(1, 40)), min_size=1, max_size=40)


@pytest.mark.parametrize("planner", PLANNERS)
@settings(derandomize=True, deadline=None, max_examples=60)
@given(lengths=batches, num_devices=st.sampled_from([4, 8, 16]))
def test_plans_are_legal_and_within_their_bound(planner, lengths, num_devices):
    p = profile(num_devices)
    plan = flexsp.plan(lengths, p, planner)
    assert plan.has_plan
    assert violations(plan, lengths, p) == []
    assert plan.lower_bound_s <= plan.predicted_s
    assert plan.planner == planner


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("num_devices", [3, 6, 7, 12])
def test_devices_that_are_no_power_of_two(planner, num_devices):
    p = profile(num_devices, devices_per_node=min(6, num_devices))
    lengths = [150, 80, 40, 40, 20, 10, 5, 1]
    plan = flexsp.plan(lengths, p, planner)
    assert violations(plan, lengths, p) == []


@pytest.mark.parametrize("planner", PLANNERS)
def test_planning_twice_gives_the_same(planner):
    lengths = np.random.default_rng(1).integers(1, 300, 60)
    first, second = (flexsp.plan(lengths, profile(8), planner) for _ in range(2))
    assert first.micro_batches == second.micro_batches


@pytest.mark.parametrize("planner", PLANNERS)
def test_a_sequence_that_nothing_holds_is_named(planner):
    plan = flexsp.plan([5, 401, 7], profile(), planner)
    assert plan.status is Status.INFEASIBLE
    assert plan.micro_batches == ()
    assert "lengths[1]=401 tokens fit into no group: sp_degree=4 holds at most 400 tokens" in plan.reason
    assert "drop or split" in plan.reason


def test_static_takes_the_least_degree_that_holds_the_context_limit():
    def degrees(**options):
        plan = flexsp.plan([50, 40], profile(), "static", **options)
        return {g.sp_degree for mb in plan.micro_batches for g in mb.groups}

    assert degrees() == {1}
    assert degrees(max_length=150) == {2}
    assert degrees(max_length=400) == {4}
    assert degrees(sp_degree=2) == {2}
    with pytest.raises(ValueError, match=r"max_length=401 tokens fit into no group: the most .* holds is 400"):
        degrees(max_length=401)
    with pytest.raises(ValueError, match=r"sp_degree=3 is not among the profile's usable degrees \[1, 2, 4\]"):
        degrees(sp_degree=3)


def test_batch_adaptive_is_the_best_static():
    lengths = [90, 80, 70, 60, 50, 40, 30, 20]
    best = min(flexsp.plan(lengths, profile(), "static", sp_degree=d).predicted_s for d in (1, 2, 4))
    assert flexsp.plan(lengths, profile(), "batch-adaptive").predicted_s == pytest.approx(best)


def test_best_fit_fills_groups_before_it_opens_another():
    """Four of 60 and four of 40 are four full groups of 100: one micro-batch, where first come would need two."""
    lengths = np.array([40, 60] * 4)
    _, micro_batches = pack_one_degree(lengths, profile(), 1)
    assert [[sum(lengths[held]) for _, held in groups] for groups in micro_batches] == [[100, 100, 100, 100]]


def test_flex_mixes_degrees_where_that_is_faster():
    """One sequence that needs four ranks beside many short ones."""
    lengths = [390] + [20] * 200
    p = profile(8)
    flex, adaptive = (flexsp.plan(lengths, p, name) for name in ("flex", "batch-adaptive"))
    assert len({degree for mb in flex.micro_batches for degree in mb.sp_degrees}) > 1
    assert flex.predicted_s < adaptive.predicted_s


def test_unknown_planners_and_options_are_named():
    with pytest.raises(ValueError, match=r"planner='best' is unknown; choose one of flex"):
        flexsp.plan([5], profile(), "best")
    with pytest.raises(ValueError, match=r"planner='flex' has no option 'sp_degree'"):
        flexsp.plan([5], profile(), "flex", sp_degree=2)
    with pytest.raises(ValueError, match=r"planner='nowhere:plan' cannot be imported"):
        flexsp.plan([5], profile(), "nowhere:plan")


def test_placement_packs_aligned_groups():
    assert place([4, 2, 1, 1], 8, 8) == [0, 4, 6, 7]
    assert place([1, 4, 1, 2], 8, 8) == [6, 0, 7, 4]
    assert place([8, 1], 8, 8) is None
    assert place([3, 3, 2], 8, 8) == [0, 3, 6]
    assert place([3, 3, 3], 8, 8) is None
    assert legal_starts(16, 32, 8) == (0, 16)
    assert legal_starts(12, 32, 8) == (0, 8, 16)
    assert most_groups(4, 12, 6) == 2


def test_planning_imports_no_torch():
    code = "import sys, flexsp, flexsp.planner, flexsp.cli.main; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
