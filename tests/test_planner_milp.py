"""The paper's planner: its chunks and buckets are optimal, and its plans are near the optimum where that is known."""

from __future__ import annotations

import sys
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import flexsp
from flexsp import Status
from flexsp.planner.blaster import balanced_chunks, buckets
from planner_cases import profile_of

rows = st.lists(st.integers(1, 50), min_size=1, max_size=9)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(tokens=rows, count=st.integers(1, 5))
def test_no_cut_of_the_row_has_a_smaller_largest_chunk(tokens: list[int], count: int) -> None:
    chunks = balanced_chunks(np.array(tokens), count)
    assert np.concatenate(chunks).tolist() == list(range(len(tokens)))
    count = min(count, len(tokens))
    assert len(chunks) == count
    least = min(
        max(sum(tokens[a:b]) for a, b in zip((0, *cuts), (*cuts, len(tokens)), strict=True))
        for cuts in combinations(range(1, len(tokens)), count - 1)
    )
    assert max(sum(tokens[i] for i in chunk) for chunk in chunks) == least


@settings(derandomize=True, deadline=None, max_examples=60)
@given(tokens=rows, count=st.integers(1, 4))
def test_no_buckets_add_fewer_tokens(tokens: list[int], count: int) -> None:
    represented = buckets(np.array(tokens), count, "dp")
    assert np.all(represented >= tokens)
    assert len(np.unique(represented)) <= count
    different = sorted(set(tokens))
    least = min(
        sum(min(top for top in (*tops, different[-1]) if top >= s) - s for s in tokens)
        for tops in combinations(different[:-1], min(count, len(different)) - 1)
    )
    assert (represented - tokens).sum() == least


def test_naive_buckets_are_equally_wide_and_none_are_exact() -> None:
    tokens = np.array([1, 10, 11, 99, 100])
    assert buckets(tokens, 10, "naive").tolist() == [10, 10, 20, 100, 100]
    assert buckets(tokens, 10, "none").tolist() == tokens.tolist()


class TestWithSolver:
    @pytest.fixture(autouse=True)
    def solver(self) -> None:
        pytest.importorskip("ortools", reason="pip install flexsp[milp]")

    @pytest.mark.parametrize("seed", range(6))
    def test_is_legal_and_near_the_optimum_of_small_cases(self, seed: int) -> None:
        """5 %: chunks are cut by tokens alone, which costs nothing or little on these seeds."""
        profile = profile_of(latency_s=0.002 * seed)
        lengths = np.random.default_rng(seed).integers(10, 2500, 8).tolist()
        exact = flexsp.plan(lengths, profile, "exact")
        plan = flexsp.plan(lengths, profile, "milp", bucketing="none", time_limit_s=10.0)
        assert flexsp.violations(plan, lengths, profile) == []
        assert plan.predicted_s is not None and exact.predicted_s is not None
        assert exact.predicted_s * (1 - 1e-9) <= plan.predicted_s <= exact.predicted_s * 1.05

    def test_a_solution_without_warm_start_is_the_same_time_when_proven(self) -> None:
        lengths, profile = [300, 200, 1500, 40, 700, 700], profile_of()
        warm = flexsp.plan(lengths, profile, "milp", time_limit_s=20.0)
        cold = flexsp.plan(lengths, profile, "milp", time_limit_s=20.0, warm_start=False)
        assert warm.extra["milp"]["proven"] == warm.extra["milp"]["solved"]
        assert warm.predicted_s == pytest.approx(cold.predicted_s, rel=1e-4)  # ticks of a microsecond

    def test_reports_the_token_error_of_each_bucketing(self) -> None:
        lengths = np.random.default_rng(0).integers(10, 900, 40).tolist()
        error = {
            bucketing: flexsp.plan(
                lengths, profile_of(), "milp", bucketing=bucketing, num_buckets=6, time_limit_s=1.0
            ).extra["milp"]["token_error"]
            for bucketing in ("dp", "naive", "none")
        }
        assert error["none"] == 0.0
        assert 0.0 < error["dp"] < error["naive"]

    def test_without_sorting_plans_are_legal(self) -> None:
        lengths = np.random.default_rng(1).integers(10, 2500, 30).tolist()
        plan = flexsp.plan(lengths, profile_of(), "milp", sort=False, time_limit_s=2.0)
        assert flexsp.violations(plan, lengths, profile_of()) == []

    def test_a_chunk_that_fits_nowhere_leaves_the_plan_to_more_chunks(self) -> None:
        lengths = [4500, 4500, 100]  # two of 8 ranks each, and memory alone would allow two micro-batches
        plan = flexsp.plan(lengths, profile_of(), "milp", time_limit_s=5.0)
        assert flexsp.violations(plan, lengths, profile_of()) == []

    def test_too_long_a_sequence_is_infeasible(self) -> None:
        assert flexsp.plan([8001], profile_of(), "milp").status is Status.INFEASIBLE


def test_a_missing_solver_is_one_line_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ortools.sat.python", None)
    with pytest.raises(ValueError, match=r"planner='milp' needs ortools.*pip install flexsp\[milp\]"):
        flexsp.plan([5, 6], profile_of(), "milp")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bucketing": "equal"}, "bucketing='equal' is unknown; choose one of dp, naive, none"),
        ({"num_buckets": 0}, "num_buckets=0 must be at least 1"),
        ({"time_limit_s": 0.0}, "time_limit_s=0.0 must be above 0"),
    ],
)
def test_senseless_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flexsp.plan([5, 6], profile_of(), "milp", **options)
