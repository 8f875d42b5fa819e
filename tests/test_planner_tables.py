"""Plans under measured tables: they choose, and what is said of time, bound and legality stays the formula's."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import flexsp
from flexsp import Profile, violations
from flexsp.planner.by_tables import localized
from profiles import profile, profile_json

LENGTHS = np.random.default_rng(0).integers(4, 150, 40)


def table_of(source: Profile, factor) -> dict[str, dict[str, list]]:
    """Tables that say what `source` says times `factor(degree, length)`."""
    lengths = [4, 8, 16, 32, 64, 128, 256]
    return {
        str(d): {
            "lengths": lengths,
            "seconds_per_token": [source.group_s(d, [s]) / s * factor(d, s) for s in lengths],
        }
        for d in source.sp_degrees
    }


def with_tables(factor) -> Profile:
    return Profile.from_json(profile_json(tables=table_of(profile(), factor)))


def test_tables_that_say_what_the_formula_says_give_its_coefficients():
    plain = Profile.from_json(profile_json())
    free = replace(plain, all_to_all=replace(plain.all_to_all, latency_s={}))
    base = replace(free, tables=Profile.from_json(profile_json(tables=table_of(free, lambda d, s: 1.0))).tables)
    found = localized(base, np.array([4, 8, 16, 32, 64, 128, 256]))  # where the tables are exact
    assert found.compute.quadratic_s == pytest.approx(base.compute.quadratic_s)
    assert found.compute.linear_s == pytest.approx(base.compute.linear_s)
    assert found.all_to_all.bandwidth_bytes_per_s == pytest.approx(base.all_to_all.bandwidth_bytes_per_s)
    assert found.tables == {}
    assert found.memory == base.memory


def test_where_tables_make_a_degree_dear_plans_by_tables_avoid_it():
    """By the formula degree 2 is as cheap as ever; measured, it takes five times as long."""
    base = with_tables(lambda d, s: 5.0 if d == 2 else 1.0)
    by_formula = flexsp.plan(LENGTHS, replace(base, tables={}))
    chosen = flexsp.plan(LENGTHS, base)

    def table_s(plan):
        return sum(
            base.compute.fixed_s
            + max(base.group_table_s(g.sp_degree, LENGTHS[list(g.sequences)].tolist()) for g in m.groups)
            for m in plan.micro_batches
        )

    assert chosen.predicted_table_s == pytest.approx(table_s(chosen))
    assert table_s(chosen) < 0.9 * table_s(by_formula)
    assert violations(chosen, LENGTHS, base) == []  # predicted_s is the formula's
    assert by_formula.predicted_s <= chosen.predicted_s
    assert chosen.lower_bound_s <= by_formula.predicted_s


def test_a_search_with_tables_is_deterministic_and_keeps_a_time_limit():
    base = with_tables(lambda d, s: 1.0 + 20.0 / s)
    first, second = (replace(flexsp.plan(LENGTHS, base), solve_s=None) for _ in range(2))
    assert first == second
    assert flexsp.plan(LENGTHS, base, time_limit_s=0.2).has_plan


@pytest.mark.parametrize("spt", [[3e-3, 2e-3, 1e-3], [1e-6, 1e-3, 4e-3]], ids=["falling", "steep"])
def test_fitted_terms_are_never_below_zero(spt):
    tables = {"1": {"lengths": [4, 64, 256], "seconds_per_token": spt}}
    found = localized(Profile.from_json(profile_json(tables=tables)), LENGTHS)
    assert found.compute.quadratic_s >= 0.0
    assert found.compute.linear_s >= 0.0
    assert found.compute.quadratic_s + found.compute.linear_s > 0.0
