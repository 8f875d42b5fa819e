"""Whatever breaks on one rank, every rank ends, and one line says what it was.

Most runs are started by `fault_launcher`, which forks ranks that have their imports behind them and treats them as
torchrun does; those marked slow, and SIGTERM, by torchrun itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from fault_runs import ANSWER_S, one_line
from flexsp.train.failures import Guard
from flexsp.train.ranks import StopSignal

pytestmark = pytest.mark.alone

CAUSES = {
    "raises_in_forward": r"step 2, rank 1, forward and backward: RuntimeError: the fan has stopped",
    "raises_value_error_in_forward": r"step 2, rank 1, forward and backward: ValueError: an odd shape",
    "raises_in_backward": r"step 2, rank 1, forward and backward: ArithmeticError: no gradient today",
    "raises_in_optimizer": r"step 2, rank 1, the optimizer's step: RuntimeError: no step today",
    "raises_value_error_early": r"rank 1, building the model: ValueError: a tensor of this rank is odd",
    "raises_early": r"rank 1, building the model: OSError: the shelf is empty",
}


SLOW = pytest.mark.slow
QUICK = ("raises_in_forward", "raises_in_backward", "raises_value_error_early", "raises_early")


@pytest.mark.parametrize("fault", [each if each in QUICK else pytest.param(each, marks=SLOW) for each in CAUSES])
def test_an_exception_of_one_rank_is_said_once_and_its_traceback_kept(launcher, fault):
    ended = launcher.run(fault)
    assert ended.statuses == [1, 1]
    kept = f"out-{fault}/error-rank-1.txt"
    one_line(ended, re.escape(f"{CAUSES[fault]} (traceback in {kept})"))
    text = (launcher.folder / kept).read_text()
    assert "Traceback (most recent call last)" in text and "fault_cases.py" in text


def test_a_learned_profile_that_finds_a_full_disk_is_no_bad_input(launcher):
    """With corrections on, the default, it is what meets a full disk first."""
    ended = launcher.run("profile_on_a_full_disk", "--planner.correct", "true", "--train.steps", "20")
    assert ended.statuses == [1, 1]
    one_line(
        ended,
        r"step \d+, rank 0, saving the profile: out-.*/profile\.json: cannot be written \(No space left on device\); "
        r"give a path in a writable folder",
    )


def test_out_of_memory_is_said_though_the_raised_estimate_finds_no_room(launcher):
    ended = launcher.run("out_of_memory_on_a_full_disk")
    assert ended.statuses == [1, 1]
    one_line(
        ended,
        r"step 2: out of memory on rank 1.*; the estimate raised to [\d,]+ bytes a token is lost "
        r"\(out-.*/profile\.json: cannot be written \(No space left on device\); .*\)",
    )


def test_bad_input_that_all_ranks_find_is_said_without_a_rank_and_with_status_2(launcher):
    """Each finds it by itself, one of them seconds later."""
    ended = launcher.run("finds_bad_input_late", "--model.config.hidden_act", "frown")
    assert ended.statuses == [2, 2]
    one_line(ended, r"model\.config=.*: transformers cannot make this model \(.*frown.*\); correct it")
    assert list((launcher.folder / "out-finds_bad_input_late").glob("error-*")) == []


def test_a_configuration_that_one_rank_cannot_read_ends_the_others_without_another_line(launcher):
    ended = launcher.run("has_no_config")
    other, own = ended.statuses
    assert own == 2 and other in (2, -signal.SIGTERM)  # the launcher's signal may come before the other stands guard
    one_line(ended, r"none\.toml: cannot be read \(No such file or directory\); give a TOML file")


LOST = (
    r"step 2, rank {rank}, .*: a collective failed, and torchrun's store on MASTER_ADDR=127\.0\.0\.1 {how} "
    r"\(is that node lost, or stopped\?\)"
)
FOUND = r"; found by rank [023] \(step 2, forward and backward.*\)"


@pytest.mark.slow
@pytest.mark.parametrize(("fault", "status"), [("killed", -9), ("exits_with_0", 0)])
def test_a_rank_that_dies_in_a_step_without_a_word_is_named(launcher, fault, status):
    ended = launcher.run(fault)
    assert ended.statuses == [1, status]
    one_line(ended, r"step 2: rank 1 ended without a word \(killed, or out of memory\?\)" + FOUND)


def test_one_of_four_ranks_that_dies_is_named_once(launcher):
    ended = launcher.run("killed", "--planner.profile", "profile4.json", world_size=4)
    assert ended.statuses == [1, -9, 1, 1]
    one_line(ended, r"step 2: rank 1 ended without a word \(killed, or out of memory\?\)" + FOUND)


@pytest.mark.slow
def test_a_rank_that_dies_before_the_first_step_is_named(launcher):
    """The others are told to end at once, as torchrun does, and find out nevertheless."""
    ended = launcher.run("killed_early")
    assert ended.statuses == [1, -9]
    one_line(ended, r"building the model: rank 1 ended without a word .*; found by rank 0 \(building the model\)")


@pytest.mark.slow
def test_a_rank_that_computes_while_another_dies_learns_of_it_by_sigterm(launcher):
    """No collective of it fails, as none does on NCCL: it finds out before SIGKILL comes."""
    ended = launcher.run("killed_while_another_computes")
    assert ended.statuses == [1, -9]
    one_line(ended, r"step 2: rank 1 ended without a word .*; found by rank 0 \(step 2, forward and backward.*\)")


@pytest.mark.slow
def test_the_planner_of_a_killed_rank_ends_in_the_midst_of_a_plan(launcher):
    """`run` looks for processes that are left."""
    ended = launcher.run("first_killed_while_planning", "--planner.name", "slow_planners:stalls_at_the_third")
    assert ended.statuses == [-9, 1]
    one_line(ended, r"step 1: rank 0 ended without a word .*; found by rank 1 \(step 1, forward and backward.*\)")


@pytest.mark.slow
def test_a_rank_that_is_stopped_is_named_with_what_the_others_wait_in(launcher):
    """It ends by SIGKILL alone, which is the launcher's."""
    ended = launcher.run("stopped", "--run.timeout_s", "25", "--planner.profile", "profile4.json", world_size=4,
                         kill_after_s=15)  # fmt: skip
    assert ended.statuses == [1, -9, 1, 1]
    one_line(ended, r"step 2: rank 1 gives no sign \(stopped, or cut off\?\), last seen: rank 1 \(.*\); "
             r"waited for by ranks? .*\(step 2, forward and backward.*\)")  # fmt: skip


def test_of_ranks_whose_store_is_lost_with_its_node_one_of_each_node_says_so(launcher):
    """And blames no other rank, of which it cannot know."""
    flags = ("--planner.profile", "profile4.json")
    ended = launcher.run("first_node_is_lost", *flags, world_size=4, node_size=2)
    assert ended.statuses == [-9, -9, 1, 1]
    one_line(ended, LOST.format(rank=2, how="has ended"))


def test_a_store_that_is_frozen_keeps_no_rank(launcher):
    ended = launcher.run("first_rank_dies_and_the_store_is_frozen", node_size=1)
    assert ended.statuses == [-9, 1]
    one_line(ended, LOST.format(rank=1, how="gives no answer"))


@pytest.mark.slow
def test_a_node_that_is_frozen_with_its_store_keeps_no_rank(launcher):
    flags = ("--planner.profile", "profile4.json", "--run.timeout_s", "10", "--planner.timeout_s", "9")
    ended = launcher.run("first_node_is_frozen", *flags, world_size=4, node_size=2, kill_after_s=5)
    assert ended.statuses == [-9, -9, 1, 1]
    one_line(ended, LOST.format(rank=2, how="gives no answer"))


@pytest.mark.slow
def test_a_rank_that_loops_is_named_with_the_line_that_it_is_at(launcher):
    ended = launcher.run("loops", "--run.timeout_s", "25")
    assert ended.statuses == [1, 1]
    one_line(ended, r"step 2: rank 1 \(step 2, forward and backward, micro-batch 0, 2 layers forward, at "
             r"fault_cases.py:\d+ strike\) has not moved for \d+ s; waited for by rank 0 \(step 2, .*\)")  # fmt: skip
    assert "in strike" in (launcher.folder / "out-loops/error-rank-1.txt").read_text()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("reader_raises", r"step \d, rank 1: OSError: \[Errno 5\] Input/output error: 'shard-7.parquet'"),
        pytest.param(
            "reader_dies",
            r"step \d, rank 1: RuntimeError: reading its tokens ended with SystemExit: no more",
            marks=SLOW,
        ),
    ],
)
def test_what_goes_wrong_in_the_reading_thread_is_an_error_of_its_step_on_all_ranks(launcher, fault, said):
    ended = launcher.run(fault)
    assert ended.statuses == [1, 1]
    one_line(ended, said)
    assert "in read" in (launcher.folder / f"out-{fault}/error-rank-1.txt").read_text()


@pytest.mark.slow
def test_storage_that_does_not_answer_is_an_error_that_names_the_rank(launcher):
    ended = launcher.run("reader_stalls", "--run.timeout_s", "25")
    assert ended.statuses == [1, 1]
    one_line(ended, r"step \d, rank 1: DataTimeoutError: its tokens were not read within 20 s; .*")


def test_a_folder_that_hangs_keeps_no_traceback_and_no_rank(launcher):
    ended = launcher.run("raises_where_the_folder_hangs")
    assert ended.statuses == [1, 1]
    file = "out-raises_where_the_folder_hangs/error-rank-1.txt"
    said = rf"{CAUSES['raises_in_forward']} \(no traceback: {file} cannot be written within 1 s\)"
    one_line(ended, said)
    assert ended.seconds < 20


def test_a_full_disk_under_the_records_is_named(launcher):
    (launcher.folder / "out-full").mkdir()
    (launcher.folder / "out-full/metrics.jsonl").symlink_to("/dev/full")
    ended = launcher.run("none", "--run.dir", "out-full")
    assert ended.statuses == [1, 1]
    one_line(ended, r"step 0, rank 0, writing the records in run.dir: OSError: \[Errno 28\] No space left on device .*")


def test_a_full_disk_under_the_logs_costs_a_line_of_each_rank(launcher):
    """logging would print a traceback for whatever is said: 1,215 lines of this run."""
    logs = launcher.folder / "out-full-logs/logs"
    logs.mkdir(parents=True)
    for rank in (0, 1):
        (logs / f"rank-{rank:04d}.log").symlink_to("/dev/full")
    ended = launcher.run("none", "--run.dir", "out-full-logs")
    assert ended.statuses == [0, 0]
    assert sorted(ended.err.splitlines()) == [
        f"out-full-logs/logs/rank-{rank:04d}.log: cannot be written (No space left on device) and gets no more"
        for rank in (0, 1)
    ]
    assert "summary: steps: 5 of 5" in ended.out


def test_a_full_disk_under_standard_output_or_error_costs_a_line(launcher):
    cause = "flexsp train: step 2, rank 1, forward and backward: RuntimeError: the fan has stopped"
    ended = launcher.run("first_has_a_full_output")
    assert ended.statuses == [1, 1]
    full, said = ended.err.splitlines()
    assert full == "standard output: cannot be written (No space left on device) and gets no more"
    assert said.startswith(cause)
    ended = launcher.run("has_a_full_error")
    assert (ended.statuses, ended.err) == ([1, 1], "")


def test_a_name_that_is_no_utf8_is_logged_and_not_a_traceback(launcher):
    source = os.fsdecode(b"caf\xe9.jsonl")
    (launcher.folder / source).write_bytes((launcher.folder / "rows.jsonl").read_bytes())
    ended = launcher.run("none", "--data.source", source, "--run.dir", "out-latin")
    assert (ended.statuses, ended.err) == ([0, 0], "")
    assert "data: caf\\udce9.jsonl: 200 documents" in (launcher.folder / "out-latin/logs/rank-0000.log").read_text()


def test_a_run_that_diverges_is_one_line_or_ends_with_its_summary(launcher):
    flags = ("--train.lr", "1e20", "--train.grad_clip", "0")
    ended = launcher.run("none", *flags, "--run.dir", "out-diverges")
    assert ended.statuses == [1, 1]
    one_line(ended, r"step 1: loss=(nan|inf) and grad_norm=(nan|inf) must be finite; it has changed no weight: .*")
    flags = (*flags, "--run.dir", "out-goes-on", "--train.on_not_finite", "skip")
    ended = launcher.run("none", *flags)
    assert ended.statuses == [0, 0]
    assert "summary: left out: 4 of the steps" in ended.out, ended.out
    found = json.loads((launcher.folder / "out-goes-on/summary.json").read_text(), parse_constant=pytest.fail)
    assert found["loss_last"] == found["loss_first"] > 5


def test_memory_that_runs_out_in_building_is_no_fault_of_the_model(launcher):
    ended = launcher.run("out_of_memory_in_building")
    assert ended.statuses == [1, 1]
    one_line(ended, r"rank 1, building the model: MemoryError: Unable to allocate 4\.00 GiB \(traceback in .*\)")


def test_memory_that_runs_out_in_an_evaluation_raises_the_estimate(launcher):
    flags = ("--eval.every", "2", "--data.held_out", "20", "--run.dir", "out-evaluation")
    ended = launcher.run("out_of_memory_in_evaluation", *flags)
    assert ended.statuses == [1, 1]
    learned = "out-evaluation/profile.json"
    one_line(ended, r"step 1: out of memory on rank 1 in the evaluation after it; the estimate is raised to [\d,]+ "
             rf"bytes a token and saved in {learned}: start the same command again to plan within it")  # fmt: skip
    ended = launcher.run("none", *flags)
    assert (ended.statuses, ended.err) == ([0, 0], "")
    assert f"profile: going on from what the last run in this folder learned, {learned}" in ended.out


def test_a_planner_that_dies_costs_a_warning_where_there_is_a_fallback(launcher):
    flags = ("--planner.name", "slow_planners:dies_at_the_third", "--run.dir", "out-fallback")
    ended = launcher.run("none", *flags)
    assert ended.statuses == [1, 1]
    one_line(ended, r"step 2: the planner's process ended with status 3: no word")
    ended = launcher.run("none", *flags, "--planner.fallback", "batch-adaptive")
    assert ended.statuses == [0, 0] and ended.err == ""
    warnings = [line for line in ended.out.splitlines() if "planned by batch-adaptive instead" in line]
    assert warnings == ["step 2: the planner's process ended with status 3: no word; planned by batch-adaptive instead"]
    rows = [json.loads(line) for line in (launcher.folder / "out-fallback/metrics.jsonl").read_text().splitlines()]
    assert [row.get("fallback") for row in rows] == [None, None, True, None, None]


@pytest.mark.parametrize("fault", ["all_asked_early", pytest.param("asked_early", marks=SLOW)])
def test_sigterm_before_the_first_step_ends_the_run_with_a_message_and_0(launcher, fault):
    """Though another rank is busy for a minute, or waits in a collective."""
    ended = launcher.run(fault)
    assert ended.statuses == [0, 0] and ended.err == ""
    said = [line for line in ended.out.splitlines() if line.startswith("flexsp train:")]
    assert len(said) == 1
    assert said[0].startswith("flexsp train: stopped by SIGTERM while ") and said[0].endswith(
        "the same command begins at step 0"
    )


def test_sighup_is_a_request_to_stop_as_sigterm_is(launcher):
    ended = launcher.run("sighup_in_step", "--checkpoint.every", "100")
    assert (ended.statuses, ended.err) == ([0, 0], "")
    assert "stopped by SIGHUP after step 3 of 5, saved; the same command goes on\n" in ended.out


def test_sighup_that_nohup_ignores_stays_ignored_but_under_torchrun_which_hands_it_on(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        for torchrun, cause in ((False, ""), (True, "SIGHUP")):
            if torchrun:
                monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
            else:
                monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
            with StopSignal() as stop:
                os.kill(os.getpid(), signal.SIGHUP)
                assert stop.cause == cause
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize(
    ("flags", "again"),
    [
        (("--checkpoint.every", "0"), "the same command begins at step 0"),
        (("--checkpoint.every", "4"), "the same command goes on"),
        (("--checkpoint.every", "4", "--checkpoint.resume", "never"), "with checkpoint.resume='auto' it goes on"),
    ],
    ids=["not saved", "saved", "saved for another"],
)
def test_sigterm_while_the_model_is_saved_says_what_the_same_command_does(launcher, flags, again):
    flags = (*flags, "--run.save_model", "true", "--run.dir", f"out-{again[-12:-1]}")
    ended = launcher.run("asked_saving_model", *flags, world_size=1)
    assert (ended.statuses, ended.err) == ([0], "")
    assert ended.out.splitlines()[-1] == f"flexsp train: stopped by SIGTERM while saving the model; {again}"


@pytest.mark.slow
def test_without_torchruns_store_each_rank_says_its_own_line(launcher):
    ended = launcher.run("raises_in_forward", agent=False)
    assert ended.statuses == [1, 1] and "Traceback" not in ended.err
    assert len(ended.said) == 2
    assert sum("RuntimeError: the fan has stopped" in line for line in ended.said) == 1
    assert all(line.startswith("step 2, rank ") for line in ended.said)


def torchrun(folder: Path, *flags: str, world_size: int = 2) -> subprocess.Popen[str]:
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(world_size), "-m", "flexsp", "train"]
    return subprocess.Popen(
        [sys.executable, *command, "config.toml", *flags], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, start_new_session=True,
    )  # fmt: skip


@pytest.mark.slow
def test_sigterm_to_torchrun_before_the_first_step(folder):
    child = torchrun(folder, "--planner.profile", "", "--planner.profile_dir", "none", "--run.dir", "out-measuring",
                     "--planner.max_tokens_per_rank", "800")  # fmt: skip
    assert child.stdout is not None
    before = ""
    while "model:" not in before:
        before += child.stdout.readline()
    time.sleep(0.5)
    os.kill(child.pid, signal.SIGTERM)
    out, err = child.communicate(timeout=ANSWER_S)
    phase = "(?:building the model|measuring the profile)"
    assert len(re.findall(f"flexsp train: stopped by SIGTERM while {phase}", out)) == 1, out + err[-2000:]
    assert "flexsp train:" not in err and "flexsp/" not in err  # torchrun's own traceback is not ours


@pytest.mark.slow
def test_a_rank_of_torchrun_that_is_killed_is_named_once(folder):
    child = torchrun(folder, "--run.dir", "out-torchrun", "--train.steps", "100000")
    until = time.monotonic() + ANSWER_S
    rows = folder / "out-torchrun/metrics.jsonl"
    while not (rows.exists() and rows.read_text().count("\n") > 2) and time.monotonic() < until:
        time.sleep(0.05)
    victim = next(pid for pid in _children(child.pid) if f"RANK={1}".encode() in _environment(pid))
    os.kill(victim, signal.SIGKILL)
    _, err = child.communicate(timeout=ANSWER_S)
    said = [line for line in err.splitlines() if "flexsp train:" in line]
    assert len(said) == 1, err[-3000:]
    assert re.search(r"step \d+: rank 1 ended without a word .*; found by rank 0 \(step \d+, .*\)", said[0])
    assert "flexsp/" not in err


@pytest.mark.slow
def test_ranks_whose_torchrun_is_killed_save_and_end(folder):
    """They would train on, watched by nobody, while the same command is started again in the same folder."""
    child = torchrun(folder, "--run.dir", "out-orphans", "--train.steps", "100000", "--checkpoint.every", "100000")
    started, out = folder / "out-orphans", ""
    try:
        until = time.monotonic() + ANSWER_S
        while not ((started / "metrics.jsonl").exists() and _steps(started) > 2) and time.monotonic() < until:
            time.sleep(0.05)
        ranks = [pid for pid in _children(child.pid) if any(b"RANK=" in entry for entry in _environment(pid))]
        os.kill(child.pid, signal.SIGKILL)
        out, err = child.communicate(timeout=60)  # which the ranks hold open as long as they live
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
    assert len(ranks) >= 2
    assert "flexsp train:" not in err, err[-3000:]
    stopped = re.search(r"stopped by the end of torchrun after step (\d+) of 100000, saved", out)
    assert stopped is not None, out[-2000:]
    assert int(stopped[1]) == _steps(started)
    assert (started / f"checkpoints/step-{int(stopped[1]):08d}/state.json").exists()


def _steps(folder: Path) -> int:
    return (folder / "metrics.jsonl").read_text().count("\n")


def _children(pid: int) -> list[int]:
    return [int(text) for task in Path(f"/proc/{pid}/task").glob("*/children") for text in task.read_text().split()]


def _environment(pid: int) -> list[bytes]:
    return Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


@pytest.mark.parametrize("error", [dist.DistNetworkError("Broken pipe"), RuntimeError("Connection closed by peer")])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_needs_the_store_of_a_torchrun_that_has_ended_blames_no_rank(tmp_path, monkeypatch, rank, error):
    """For a new communicator, say. The ranks are two objects here."""
    for name, value in (("RANK", rank), ("WORLD_SIZE", 2), ("TORCHELASTIC_RUN_ID", "x")):
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    said: list[tuple[str, int]] = []
    guard = Guard(tmp_path, 60.0, lambda text, status: said.append((text, status)))
    guard.place.at("forward and backward", 7)
    where = f"step 7, rank {rank}, forward and backward: {type(error).__name__}: {error}"
    with guard:
        assert guard._explain(error) == 1 and said.pop()[0].startswith(where)  # torchrun lives
        parent = os.getppid()
        monkeypatch.setattr(os, "getppid", lambda: parent + 1)
        assert guard._explain(error) == 1
    words = "stopped by the end of torchrun in step 7, forward and backward; start the same command again"
    assert said == ([(words, 1)] if rank == 0 else [])


@pytest.mark.slow
def test_a_checkpoint_whose_writing_stalls_names_the_rank(launcher):
    flags = ("--run.timeout_s", "10", "--planner.timeout_s", "9", "--checkpoint.every", "2")
    ended = launcher.run("writer_stalls", *flags)
    assert ended.statuses == [1, 1]
    one_line(ended, r"step \d: rank 1 \(step \d, saving a checkpoint, at .*\) has not moved for \d+ s; waited for by "
             r"rank 0 \(step \d, saving a checkpoint\)")  # fmt: skip
