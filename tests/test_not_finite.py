"""Steps whose loss or gradients are not finite never reach the weights: the run ends, or leaves them out."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from flexsp.train.not_finite import MOST_IN_A_ROW, NotFinite, NotFiniteError
from flexsp.watch.rows import METRICS, last_rows

SKIP = ("--train.on_not_finite", "skip")


def test_it_ends_the_run_unchanged_and_the_same_command_goes_on_leaving_such_steps_out(folder, launcher):
    flags = ("--run.dir", "nan", "--checkpoint.every", "1", "--run.save_model", "true")
    ended = launcher.run("has_no_finite_gradient", *flags)
    assert ended.statuses == [1, 1] and len(ended.said) == 1, ended.err[-3000:]
    assert ended.said[0].startswith("step 2: loss=5.")
    assert "and grad_norm=nan must be finite; it has changed no weight" in ended.said[0]
    assert sorted(last_rows(folder / "nan" / METRICS)) == [0, 1]
    assert [path.name for path in sorted((folder / "nan/checkpoints").iterdir())] == ["step-00000001", "step-00000002"]

    again = launcher.run("has_no_finite_gradient", *flags, *SKIP)
    assert again.statuses == [0, 0], again.err[-3000:]
    assert "going on after step 2 of 5" in again.out
    assert again.err == "" and "step 2: loss=5." in again.out  # the warning comes once
    assert "left out: train.on_not_finite='skip'" in again.out
    assert "summary: left out: 1 of the steps: loss or gradients were not finite" in again.out
    rows = last_rows(folder / "nan" / METRICS)
    assert [row.get("skipped", False) for _, row in sorted(rows.items())] == [False, False, True, False, False]
    assert rows[2]["grad_norm"] is None  # JSON has no NaN
    assert "NaN" not in (folder / "nan" / METRICS).read_text()
    weights = load_file(folder / "nan/model/model.safetensors")
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    assert json.loads((folder / "nan/summary.json").read_text())["skipped"] == 1


def test_a_run_that_leaves_every_step_out_ends(folder, launcher):
    ended = launcher.run("never_has_a_finite_gradient", *SKIP, "--train.steps", "20", "--run.dir", "inf")
    assert ended.statuses == [1, 1] and len(ended.said) == 1, ended.err[-3000:]
    assert ended.said[0].startswith(f"step {MOST_IN_A_ROW - 1}: loss=")
    assert f"nor were those of the {MOST_IN_A_ROW - 1} steps before it" in ended.said[0]
    assert sorted(last_rows(folder / "inf" / METRICS)) == list(range(MOST_IN_A_ROW - 1))
    assert "lr_scheduler" not in ended.err + ended.out


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (1.0, math.nan), (1.0, -math.inf)])
def test_either_of_both_is_enough(loss, norm):
    assert not NotFinite("error").why_left_out(0, 1.0, 0.0)
    with pytest.raises(NotFiniteError, match="step 3: loss="):
        NotFinite("error").why_left_out(3, loss, norm)
    assert NotFinite("skip").why_left_out(3, loss, norm)


def test_only_steps_in_a_row_count():
    not_finite = NotFinite("skip")
    for step in range(10 * MOST_IN_A_ROW):
        bad = step % MOST_IN_A_ROW != 0
        assert bool(not_finite.why_left_out(step, math.nan if bad else 1.0, 1.0)) == bad
