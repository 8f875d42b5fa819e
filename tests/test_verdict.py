"""What the simulator says in words must follow from the figures."""

from __future__ import annotations

import numpy as np
import pytest

import flexsp
from flexsp.profile import Profile
from flexsp.simulate.cases import make_case
from flexsp.simulate.figures import step_figures
from flexsp.simulate.runs import Done, case_figures
from planner_cases import profile_of

MIXED = np.array([3500] * 2 + [60] * 60 + [500] * 10)
"""Two long sequences among many short ones."""


def sentences(profile: Profile, lengths: np.ndarray, planners: list[str], solve_s: float | None = None) -> str:
    case = make_case("docs", lengths, profile, batch_size=None)
    done = []
    for name in dict.fromkeys([*planners, "static"]):
        plan = flexsp.plan(lengths, profile, name)
        figures = step_figures(0, plan, lengths, profile)
        if solve_s is not None:
            figures = figures.__class__(**{**{f: getattr(figures, f) for f in figures.__slots__}, "solve_s": solve_s})
        done.append(Done(case=0, planner=name, step=0, plan=plan, figures=figures))
    figures = case_figures(case, done, planners)
    assert figures is not None
    return " ".join(figures.sentences)


def test_the_gain_is_that_of_the_figures():
    profile = profile_of(8, 2, exchange_s=1e-4, between_nodes=20.0)
    flex, static = (flexsp.plan(MIXED, profile, name) for name in ("flex", "static"))
    said = sentences(profile, MIXED, ["flex", "batch-adaptive"])
    ratio = static.predicted_s / flex.predicted_s
    assert ratio > 1.5  # else this test shows nothing
    assert f"flex is {ratio:.2f} times as fast as static degree 4" in said
    assert "gain little" not in said
    assert f"No plan could be more than {flex.predicted_s / flex.lower_bound_s - 1:.1%} faster" in said


@pytest.mark.parametrize(
    ("profile", "lengths", "reason"),
    [
        # everything fits one device
        (profile_of(8, 8, room_tokens=4000.0), np.array([60] * 80), "one device holds every sequence"),
        # one node with fast links
        (profile_of(8, 8, exchange_s=1e-9), MIXED, "static exchanges inside a node for 0% of its time"),
        # all sequences are long
        (profile_of(8, 8, exchange_s=1e-4), np.array([3500] * 8), "100% of the tokens run at degree 4 or above"),
        # launches and gathers outweigh everything
        (profile_of(8, 8, fixed_s=100.0), MIXED, "of the time is the fixed cost of micro-batches"),
    ],
)
def test_where_mixed_degrees_gain_little_it_says_so_and_why(profile, lengths, reason):
    said = sentences(profile, lengths, ["flex"])
    assert "Mixed degrees gain little here" in said and reason in said


def test_where_one_degree_a_batch_is_as_good_it_says_so():
    # short batches: static must hold a context limit that this batch does not reach
    profile = profile_of(8, 2, exchange_s=1e-4, between_nodes=20.0)
    lengths = np.array([60] * 80)
    case = make_case("docs", lengths, profile, batch_size=None, max_length=4000)
    options = {"static": {"sp_degree": case.static_sp_degree}}
    done = []
    for name in ("flex", "batch-adaptive", "static"):
        plan = flexsp.plan(lengths, profile, name, **options.get(name, {}))
        done.append(Done(case=0, planner=name, step=0, plan=plan, figures=step_figures(0, plan, lengths, profile)))
    figures = case_figures(case, done, ["flex", "batch-adaptive"])
    assert figures is not None and figures.planners["flex"].speedup > 1.5
    assert any("Most of it one degree per batch gains too" in sentence for sentence in figures.sentences)


def test_a_planner_slower_than_its_step_is_said():
    assert "Planning a batch takes longer (1e+03 s) than its step" in sentences(
        profile_of(8, 8), MIXED, ["flex"], solve_s=1000.0
    )


def test_without_a_mixed_planner_the_bound_says_what_could_be_gained():
    profile = profile_of(8, 2, exchange_s=1e-4, between_nodes=20.0)
    static = flexsp.plan(MIXED, profile, "static")
    said = sentences(profile, MIXED, ["batch-adaptive"])
    assert f"No plan could be more than {static.predicted_s / static.lower_bound_s:.2f} times as fast as static" in said
    assert "batch-adaptive is" in said
