"""`flexsp plan` says what a plan does, and `--explain` what would happen were one sequence elsewhere."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings

import flexsp
from flexsp import Group, MicroBatch, Plan, Profile
from flexsp.cli.main import main
from flexsp.lengths import as_lengths
from flexsp.planner.explain import explain
from flexsp.profile import Policy
from planner_cases import lengths, profile_of, profiles


@settings(derandomize=True, deadline=None, max_examples=60)
@given(profile=profiles(), batch=lengths(8))
def test_every_move_is_legal_and_changes_the_plan_by_what_is_said(profile: Profile, batch: list[int]) -> None:
    plan = flexsp.plan(batch, profile, "batch-adaptive")
    if plan.predicted_s is None:
        return
    for index in range(len(batch)):
        for row in explain(plan, as_lengths(batch), profile, index).by_degree:
            if row.move is not None:
                moved = _moved(plan, index, row.move.group, row.move.micro_batch)
                said = replace(moved, predicted_s=plan.predicted_s + row.move.change_s)
                assert flexsp.violations(said, batch, profile) == []


def _moved(plan: Plan, index: int, target: Group, at: int) -> Plan:
    """The plan with one sequence in another group; groups and micro-batches without any are left out."""
    micro_batches = []
    for b, micro_batch in enumerate(plan.micro_batches):
        groups = []
        for group in micro_batch.groups:
            members = tuple(i for i in group.sequences if i != index)
            members += (index,) if b == at and group == target else ()
            if members:
                groups.append(Group(ranks=group.ranks, sequences=members))
        if groups:
            micro_batches.append(MicroBatch(groups=tuple(groups), policy=micro_batch.policy))
    return Plan(num_devices=plan.num_devices, micro_batches=tuple(micro_batches))


def test_a_sequence_that_is_not_there_is_refused() -> None:
    plan = flexsp.plan([5, 6], profile_of())
    with pytest.raises(ValueError, match="sequence=2 must be between 0 and 1"):
        explain(plan, np.array([5, 6]), profile_of(), 2)


def test_a_group_that_takes_no_time_is_explained_too() -> None:
    profile = profile_of(2, 2, (1, 2), quadratic_s=0.0, linear_s=0.0, fixed_s=1.0)
    plan = flexsp.plan([5, 6], profile, "static")
    assert plan.micro_batches[0].groups[0].predicted_s == 0
    assert explain(plan, np.array([5, 6]), profile, 0).share == 0


class TestCommand:
    @pytest.fixture
    def files(self, tmp_path: Path) -> list[str]:
        (tmp_path / "lengths.txt").write_text("6000\n900\n900\n40\n", encoding="utf-8")
        policies = {"recompute": Policy(activation_bytes_per_token=50, compute_factor=1.01)}
        profile_of(policies=policies, room_tokens=800).save(tmp_path / "profile.json")
        return [str(tmp_path / "lengths.txt"), "--profile", str(tmp_path / "profile.json")]

    def test_prints_groups_time_idle_memory_bound_and_gap(
        self, files: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["plan", *files]) == 0
        shown = capsys.readouterr().out
        for word in ("degree", "lengths", "seconds", "idle", "memory", "bound", "above the optimum", "6,000"):
            assert word in shown
        assert all(len(line) <= 80 for line in shown.splitlines()[:4])

    def test_prints_every_group_where_asked(self, files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["plan", *files, "--groups"]) == 0
        assert "0-7" in capsys.readouterr().out

    def test_explains_one_sequence(self, files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["plan", *files, "--explain", "0"]) == 0
        shown = capsys.readouterr().out
        assert "sequence 0: 6,000 tokens, in micro-batch 0 on ranks 0-7" in shown
        assert "8 (here)" in shown
        assert "does not fit" in shown  # at degree 1

    def test_a_sequence_that_is_not_there_is_one_line(
        self, files: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["plan", *files, "--explain", "9"]) == 2
        assert "sequence=9 must be between 0 and 3" in capsys.readouterr().err

    def test_passes_the_time_limit_on(self, files: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["plan", *files, "--time-limit-s", "-1"]) == 2
        assert "time_limit_s=-1.0 must be at least 0" in capsys.readouterr().err
        assert main(["plan", *files, "--time-limit-s", "0.01"]) == 0
