"""The end of a process does not wait for who reads what it says."""

from __future__ import annotations

import fcntl
import os
import pty
import subprocess
import sys
import termios
import threading

import pytest

from flexsp.train.leaving import within

pytestmark = pytest.mark.alone

NOBODY_READS = """
import sys, threading, time
from pathlib import Path
from flexsp.train import failures

failures.PATIENCE_S = 1.0

def say(text, status):
    print(text, flush=True)

with failures.Guard(Path(sys.argv[1]), 60.0, say) as guard, guard.explaining():
    guard.place.at("measuring the profile")
    print("in the run", file=sys.stderr, flush=True)
    while True:
        print("x" * 1023, flush=True)  # a pipe is full of them to the last byte
"""


def test_sigterm_ends_a_rank_whose_output_nobody_reads(tmp_path):
    """Its main thread is in the midst of a write, and so holds the stream's lock."""
    rank = subprocess.Popen(
        [sys.executable, "-c", NOBODY_READS, str(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert rank.stderr is not None and rank.stderr.readline() == b"in the run\n"
        with pytest.raises(subprocess.TimeoutExpired):
            rank.wait(2.0)  # the pipe is full by then
        rank.terminate()
        assert rank.wait(30.0) == 0
    finally:
        rank.kill()
        rank.communicate()


HELD_UNTIL_THE_END = """
import fcntl, sys
from pathlib import Path
from flexsp.train.run import run_from_config
from flexsp.train.run_dir import LOCK

def say(text, status):
    with open(Path(sys.argv[1]).parent / "out" / LOCK, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            print("free:", text)
        except BlockingIOError:
            print("held:", text)

run_from_config(sys.argv[1], [], say)
"""


def test_a_run_that_fails_holds_its_folder_until_it_has_ended(tmp_path):
    """What its checkpoint's thread writes meanwhile must not meet another start."""
    config = tmp_path / "config.toml"
    config.write_text(
        f"""
[model.config]
model_type = "llama"
[data]
source = "{tmp_path / "none.jsonl"}"
max_length = 64
[run]
dir = "{tmp_path / "out"}"
"""
    )
    ended = subprocess.run(
        [sys.executable, "-c", HELD_UNTIL_THE_END, str(config)], capture_output=True, text=True, timeout=100
    )
    assert ended.stdout.startswith("held: ") and "none.jsonl" in ended.stdout, ended


@pytest.mark.slow
def test_a_run_whose_terminal_is_lost_saves_and_ends_well(folder):
    """The kernel sends SIGHUP, and whatever is written to the terminal from then on, bar and lines, fails."""
    ours, its = pty.openpty()
    command = ["-m", "flexsp", "train", "config.toml", "--run.dir", "lost", "--train.steps", "100000"]
    flags = ["--checkpoint.every", "100000", "--run.timeout_s", "200", "--planner.timeout_s", "100"]
    run = subprocess.Popen(
        [sys.executable, *command, *flags], stdin=its, stdout=its, stderr=its, cwd=folder, start_new_session=True,
        env={**os.environ, "TERM": "xterm"}, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )  # fmt: skip
    os.close(its)
    rows, said = folder / "lost/metrics.jsonl", b""
    try:
        while not (rows.exists() and rows.read_text().count("\n") > 2):
            said += os.read(ours, 65536)
        os.close(ours)
        assert run.wait(60.0) == 0
    finally:
        run.kill()
        run.wait()
    assert "training" in said.decode()
    steps = rows.read_text().count("\n")
    assert (folder / f"lost/checkpoints/step-{steps:08d}/state.json").exists()
    log = (folder / "lost/logs/rank-0000.log").read_text()
    assert f"stopped by SIGHUP after step {steps} of 100000, saved; the same command goes on" in log


def test_where_no_thread_can_be_started_it_is_written_all_the_same(monkeypatch):
    """Memory that has run out is no reason to end without a word."""

    def refused(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refused)
    said: list[str] = []
    within(1.0, lambda: said.append("out of memory"))
    assert said == ["out of memory"]
