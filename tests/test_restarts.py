"""Torchrun starts the ranks again by itself, as docs/nodes.md says, and the run goes on from its last checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flexsp.watch.rows import METRICS, last_rows

pytestmark = [pytest.mark.alone, pytest.mark.slow, pytest.mark.timeout(300)]

TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "--max-restarts", "1", "-m", "flexsp")
FLAGS = ("train", "config.toml", "--run.dir", "restarted", "--checkpoint.every", "2", "--train.steps", "30")


def rank_of(launcher: int, rank: int) -> int:
    """The process id of a rank that this torchrun has started."""
    for task in Path(f"/proc/{launcher}/task").iterdir():
        for child in (task / "children").read_text().split():
            if f"\0RANK={rank}\0".encode() in Path(f"/proc/{child}/environ").read_bytes():
                return int(child)
    raise AssertionError(f"torchrun has no rank {rank}")


def test_a_rank_that_is_killed_costs_the_steps_since_the_last_checkpoint(folder):
    torchrun = subprocess.Popen(
        [sys.executable, *TORCHRUN, *FLAGS], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )  # fmt: skip
    rows = folder / "restarted" / METRICS
    while torchrun.poll() is None and not (rows.exists() and 5 in last_rows(rows)):
        time.sleep(0.05)
    os.kill(rank_of(torchrun.pid, 1), signal.SIGKILL)
    said, _ = torchrun.communicate()
    assert torchrun.returncode == 0, said[-3000:]
    assert "checkpoint: going on after step" in said
    assert sorted(last_rows(rows)) == list(range(30))
