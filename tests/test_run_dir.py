"""One run at a time in a folder, and what the same command does there the second time."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fault_runs import Launcher
from flexsp.train.run_dir import LOCK
from flexsp.watch.rows import METRICS, last_rows

ROWS = ("--checkpoint.every", "2")


def wait_until(there: Callable[[], bool], seconds: float = 100) -> None:
    until = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < until
        time.sleep(0.05)


def steps_of(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()] if path.exists() else []


def test_a_second_start_waits_then_ends_in_one_line_and_one_after_a_kill_goes_on(folder, launcher):
    other, flags = Launcher(folder), ("--run.dir", "held", *ROWS, "--train.steps", "24")
    rows, lock = folder / "held" / METRICS, folder / "held" / LOCK
    try:
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(other.run, "slow", *flags)
            wait_until(lambda: len(steps_of(rows)) >= 3)
            second = launcher.run("none", *flags)
            assert second.statuses == [2, 2] and len(second.said) == 1 and "Traceback" not in second.err
            holder = lock.read_text().strip()
            assert second.said[0].startswith(f"run.dir='held' is in use by another run ({holder}); wait until it has")
            assert not first.done()
            os.kill(int(holder.split()[1]), signal.SIGKILL)  # rank 0; the other one is still ending
            third = launcher.run("none", *flags)
            assert third.statuses == [0, 0] and "checkpoint: going on after step" in third.out, third.err
            assert first.result().statuses[0] == -signal.SIGKILL
    finally:
        other.close()
    assert sorted(last_rows(rows)) == list(range(24))
    again = [step for step, next_step in zip(steps_of(rows), steps_of(rows)[1:], strict=False) if next_step <= step]
    assert len(again) <= 1  # where it went on


def test_a_folder_that_not_all_ranks_see_is_refused_before_anything_is_trained(folder, launcher):
    patience = ("--planner.timeout_s", "3", "--run.timeout_s", "8")
    ended = launcher.run("sees_another_folder", "--run.dir", "apart", *patience)
    assert ended.statuses == [2, 2] and ended.said == [
        "run.dir='apart' is another folder on rank 1: checkpoints need one that all nodes see; give a folder on a file "
        "system that they share"
    ]
    assert [path.name for path in (folder / "apart").iterdir()] == [LOCK]


def test_without_locks_a_run_goes_on_with_a_warning(launcher):
    ended = launcher.run("no_locks")
    assert ended.statuses == [0, 0], ended.err
    assert "run.dir: out-no_locks cannot be locked (No locks available): start no other run in it" in ended.out


def test_another_learning_rate_for_another_run_s_checkpoint_then_sigterm_and_the_same_command(folder, launcher):
    first = launcher.run("none", "--run.dir", "first", *ROWS, "--train.steps", "4", "--train.lr", "0.001")
    assert first.statuses == [0, 0], first.err
    flags = (
        "--run.dir", "second", "--checkpoint.resume", "first/checkpoints/step-00000002", "--checkpoint.every", "50",
        "--train.steps", "8", "--train.lr", "0.5", "--train.lr_schedule", "linear", "--train.seed", "7",
    )  # fmt: skip
    stopped = launcher.run("sigterm_in_step", *flags)
    assert stopped.statuses == [0, 0], stopped.err
    assert "stopped by SIGTERM after step 3 of 8, saved; the same command goes on" in stopped.out
    assert "(now train.seed=7 instead of 0); its step 2 is taken over, so that the first " in stopped.out
    ended = launcher.run("none", *flags)
    assert ended.statuses == [0, 0], ended.err
    assert "going on after step 3 of 8, from second/checkpoints/step-00000003" in ended.out
    assert "the run in second began from " in ended.out
    assert "is taken over" not in ended.out
    rates = {step: row["lr"] for step, row in last_rows(folder / "second" / METRICS).items()}
    assert rates == {step: pytest.approx(0.5 * (8 - step) / 8) for step in range(2, 8)}


def test_the_line_after_sigterm_does_not_promise_that_never_goes_on(launcher):
    flags = ("--run.dir", "never", "--checkpoint.resume", "never", "--checkpoint.every", "50")
    stopped = launcher.run("sigterm_in_step", *flags)
    assert stopped.statuses == [0, 0]
    assert "after step 3 of 5, saved; with checkpoint.resume='auto' it goes on" in stopped.out
    assert launcher.run("none", *flags).statuses == [2, 2]
    assert launcher.run("none", *flags, "--checkpoint.resume", "auto").statuses == [0, 0]


def test_another_configuration_where_no_checkpoint_was_saved_leaves_the_logs_alone(folder, launcher):
    flags = ("--run.dir", "logs", "--train.steps", "3")
    assert launcher.run("none", *flags).statuses == [0, 0]
    before = (folder / "logs" / METRICS).read_text()
    ended = launcher.run("none", *flags, "--train.lr", "0.5")
    assert ended.statuses == [2, 2] and (folder / "logs" / METRICS).read_text() == before
    assert ended.said == [
        "train.lr=0.5 is not 0.001, with which the run in logs began, of which no checkpoint was saved; restore it, "
        "remove logs, or give another run.dir"
    ]


@pytest.mark.slow
def test_half_a_model_has_no_name_and_all_ranks_hear_of_it(folder, launcher):
    flags = ("--run.dir", "model", *ROWS, "--run.save_model", "true")
    ended = launcher.run("killed_saving_model", *flags)
    assert ended.statuses == [-signal.SIGKILL, 1]
    assert len(ended.said) == 1 and ended.said[0].startswith("saving the model: rank 0 ended without a word")
    assert not (folder / "model/model").exists()
    for _ in range(2):  # the second takes the place of the first
        assert launcher.run("none", *flags).statuses == [0, 0]
        assert [path.name for path in (folder / "model").glob("model*")] == ["model"]
    assert (folder / "model/model/config.json").exists()


def test_an_error_in_the_comparison_does_not_cost_the_model(folder, launcher):
    ended = launcher.run("raises_in_comparison", "--run.save_model", "true", "--run.compare_batches", "1")
    assert ended.statuses == [1, 1] and len(ended.said) == 1 and "comparing planners" in ended.said[0]
    assert (folder / "out-raises_in_comparison/model/config.json").exists()
