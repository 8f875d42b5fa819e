"""The log of a run's plans, read back."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings

import flexsp
from flexsp.planner.replay import FILE, predicted_anew, read_plan_log
from planner_cases import lengths, profiles
from profiles import profile

LENGTHS = np.array([300, 5, 90, 8])
PLAN = flexsp.plan(LENGTHS, profile(4))


def log(folder, *rows):
    path = folder / FILE
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def test_the_last_row_of_a_step_counts_and_a_torn_one_does_not(tmp_path):
    other = flexsp.plan(LENGTHS, profile(4), "static")
    path = log(
        tmp_path,
        {"step": 0, "plan": other.to_json()},
        {"step": 1, "plan": other.to_json()},
        '{"step": 1, "plan": {"form',  # a kill, and the run went on
        "\n",
        {"step": 1, "plan": PLAN.to_json()},
        '{"step": 2, "pl',
    )
    plans = read_plan_log(path)
    assert plans == {0: other, 1: PLAN} == read_plan_log(tmp_path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"step": -1, "plan": PLAN.to_json()}, r"plans.jsonl:1: must be an object of 'step' and 'plan'"),
        ({"step": 0}, r"plans.jsonl:1: must be an object of 'step' and 'plan'"),
        ([], r"plans.jsonl:1: must be an object"),
        ({"step": 0, "plan": {"format": "x"}}, r"plans.jsonl:1: format='x' must be 'flexsp-plan/1'"),
    ],
)
def test_a_wrong_row_is_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        read_plan_log(log(tmp_path, row))


def test_a_missing_log_is_said(tmp_path):
    with pytest.raises(ValueError, match=r"plans.jsonl: cannot be read \(.*\); give the plans.jsonl of a run"):
        read_plan_log(tmp_path)


@settings(derandomize=True, deadline=None)
@given(tokens=lengths(), cost=profiles())
def test_predictions_made_anew_are_those_of_planning(tokens, cost):
    plan = flexsp.plan(tokens, cost)
    if plan.has_plan:
        anew = predicted_anew(plan, np.array(tokens), cost)
        assert anew.micro_batches == plan.micro_batches and anew.predicted_s == plan.predicted_s
        assert flexsp.violations(anew, tokens, cost) == []


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"step": 2**70, "plan": PLAN.to_json()}, r"plans.jsonl:1: step=.* must be at most"),
        ('{"step": 1, "step": 2, "plan": {}}\n', r"plans.jsonl:1: is not JSON \(the field 'step' is there twice"),
        ('{"a": ' + "[" * 5000 + "]" * 5000 + "}\n", r"plans.jsonl:1: is nested more than 64 deep"),
    ],
)
def test_a_row_that_is_no_plain_json_is_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=message):
        read_plan_log(log(tmp_path, row, {"step": 3, "plan": PLAN.to_json()}))


def test_a_row_torn_within_a_character_does_not_count(tmp_path):
    path = log(tmp_path, {"step": 0, "plan": PLAN.to_json()})
    path.write_bytes(path.read_bytes() + b'{"step": 1, "plan": {"planner": "\xc3')
    assert read_plan_log(path) == {0: PLAN}
