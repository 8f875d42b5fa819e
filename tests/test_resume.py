"""Runs that are killed, stopped and started again: the same losses, every sequence once."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fault_runs import Launcher
from flexsp.batches import global_batch
from flexsp.train.records import SEQUENCES
from flexsp.watch.rows import METRICS, last_rows
from profiles import profile_json

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from kills_proof import read_log, trained_once

pytestmark = pytest.mark.alone

STEPS, BATCH = 36, 8
CONFIG = f"""
[model]
config = {{ model_type = "llama", vocab_size = 256, hidden_size = 32, intermediate_size = 64, num_hidden_layers = 2, num_attention_heads = 4, num_key_value_heads = 2, max_position_embeddings = 1024 }}
[data]
cache_dir = "data"
source = "rows.jsonl"
max_length = "1K"
[planner]
profile = "profile.json"
correct = false
[train]
steps = {STEPS}
batch_size = {BATCH}
lr = 1e-2
[checkpoint]
every = 2
[run]
dir = "out"
save_model = false
"""  # noqa: E501
EPOCH = STEPS * BATCH


def start(folder: Path, world_size: int, *flags: str) -> subprocess.Popen[str]:
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(world_size), "-m", "flexsp", "train"]
    return subprocess.Popen(
        [sys.executable, *command, "config.toml", *flags], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, text=True, start_new_session=True,
    )  # fmt: skip


def run(folder: Path, world_size: int, *flags: str) -> str:
    """What a run that ends well prints."""
    child = start(folder, world_size, *flags)
    out, err = child.communicate(timeout=200)
    assert child.returncode == 0, err[-3000:]
    return out


def rows_done(folder: Path) -> int:
    path = folder / METRICS
    return len(path.read_text().splitlines()) if path.exists() else 0


def wait_for(child: subprocess.Popen[str], folder: Path, rows: int) -> None:
    """Until the log of `folder` has so many rows, or the run ends."""
    deadline = time.monotonic() + 250
    while rows_done(folder) < rows and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    return [int(text) for task in Path(f"/proc/{pid}/task").glob("*/children") for text in task.read_text().split()]


def kill_all_of(child: subprocess.Popen[str]) -> str:
    """SIGKILL to torchrun and to every process that descends from it, workers of their own sessions included.

    Returns what they had said.
    """
    found, rest = [], [child.pid]
    while rest:
        pid = rest.pop()
        found.append(pid)
        rest += children(pid)
    for pid in found:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    return child.communicate()[0]


def losses(folder: Path) -> list[float]:
    rows = last_rows(folder / METRICS)
    assert sorted(rows) == list(range(STEPS))
    return [rows[step]["loss"] for step in range(STEPS)]


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """Starts runs in the folder of `unbroken` without torchrun's start, where that is not what is tested."""
    made = Launcher(tmp_path_factory.mktemp("resume"))
    yield made
    made.close()


def ran(launcher: Launcher, *flags: str) -> str:
    """What a run of two ranks that ends well prints."""
    ended = launcher.run("none", "--run.dir", "out", *flags)
    assert ended.statuses == [0, 0], ended.err[-3000:]
    return ended.out


@pytest.fixture(scope="module")
def unbroken(launcher: Launcher) -> Path:
    """A folder with the corpus, one epoch of the run, and a run of two ranks that nothing disturbed."""
    folder = launcher.folder
    draw = random.Random(0)
    lengths = [min(1024, max(8, int(draw.lognormvariate(4.3, 1.2)))) for _ in range(EPOCH)]
    text = [[draw.choice(b"abcdefgh ") for _ in range(length)] for length in lengths]
    (folder / "rows.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in text))
    (folder / "config.toml").write_text(CONFIG)
    provenance = {"source": "estimated", "max_tokens_per_rank": 700}
    (folder / "profile.json").write_text(json.dumps(profile_json(4, 700, provenance=provenance)))
    ran(launcher)
    return folder


def proven_once(folder: Path) -> None:
    """The rows that count trained every sequence of the epoch exactly once, in the order of the seed."""
    rows = last_rows(folder / SEQUENCES)
    ids = [rows[step]["ids"] for step in range(STEPS)]
    assert ids == [global_batch(EPOCH, BATCH, 0, step).tolist() for step in range(STEPS)]
    assert trained_once(read_log(folder / SEQUENCES), STEPS, EPOCH).epochs == 1


def test_the_loss_falls_and_every_sequence_is_trained_once(unbroken):
    assert losses(unbroken / "out")[-1] < losses(unbroken / "out")[0] - 1
    proven_once(unbroken / "out")


@pytest.mark.timeout(400)
def test_a_killed_run_goes_on_bit_for_bit(unbroken, launcher):
    child = start(unbroken, 2, "--run.dir", "killed")
    wait_for(child, unbroken / "killed", 6)
    kill_all_of(child)
    before = rows_done(unbroken / "killed")
    assert 6 <= before < STEPS
    said = ran(launcher, "--run.dir", "killed")
    assert "checkpoint: going on after step" in said
    assert losses(unbroken / "killed") == losses(unbroken / "out")
    norms = [last_rows(unbroken / name / METRICS)[STEPS - 1]["grad_norm"] for name in ("killed", "out")]
    assert norms[0] == norms[1]
    proven_once(unbroken / "killed")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_five_kills_and_other_numbers_of_ranks_train_every_sequence_once(unbroken):
    """4 -> 2 -> 3 -> ... ranks, each killed at a random moment; the losses stay those of the unbroken run."""
    draw, folder = random.Random(3), unbroken / "chaos"
    for kill, world_size in enumerate((4, 2, 3, 2, 2)):
        child = start(unbroken, world_size, "--run.dir", "chaos")
        wait_for(child, folder, rows_done(folder) + (2 + kill % 2 if kill else 5))  # 5: a checkpoint stands
        time.sleep(draw.random() * 0.2)
        said = kill_all_of(child)
        assert child.returncode == -signal.SIGKILL, said[-3000:]  # it had not ended by itself
        assert f"training {STEPS}/{STEPS}" not in said
        assert ("checkpoint: going on after step" in said) == (kill > 0), said[-3000:]
    assert rows_done(folder) >= 5 * 2 and sorted(last_rows(folder / METRICS))[-1] < STEPS - 1
    assert "checkpoint: going on after step" in run(unbroken, 3, "--run.dir", "chaos")
    assert losses(folder) == pytest.approx(losses(unbroken / "out"), abs=1e-5)
    proven_once(folder)


@pytest.mark.slow  # without torchrun test_run_dir.py has it
@pytest.mark.timeout(400)
def test_sigterm_finishes_the_step_saves_and_says_so(unbroken):
    child = start(unbroken, 2, "--run.dir", "stopped", "--checkpoint.every", "100")
    wait_for(child, unbroken / "stopped", 3)
    for worker in children(child.pid):  # as a scheduler does; torchrun, which then ends well, says how they ended
        os.kill(worker, signal.SIGTERM)
    out, err = child.communicate(timeout=100)
    assert child.returncode == 0, err[-2000:]
    done = rows_done(unbroken / "stopped")
    assert f"stopped by SIGTERM after step {done} of {STEPS}, saved; the same command goes on" in out, err[-2000:]
    assert f"summary: steps: {done} of {STEPS}\n" in out
    assert "flexsp/" not in err  # no traceback of ours
    assert [path.name for path in (unbroken / "stopped/checkpoints").iterdir()] == [f"step-{done:08d}"]
    said = run(unbroken, 2, "--run.dir", "stopped", "--checkpoint.every", "100")
    assert f"summary: steps: {STEPS} of {STEPS}, {done} of them before it was started again\n" in said
    assert losses(unbroken / "stopped") == losses(unbroken / "out")
    assert rows_done(unbroken / "stopped") == STEPS


def test_a_finished_run_started_again_trains_nothing(unbroken, launcher):
    before = rows_done(unbroken / "out")
    said = ran(launcher)
    assert f"going on after step {STEPS} of {STEPS}" in said and rows_done(unbroken / "out") == before


def test_another_configuration_in_the_same_folder_is_one_line(unbroken, launcher):
    ended = launcher.run("none", "--run.dir", "out", "--train.lr", "0.5")
    assert ended.statuses == [2, 2] and len(ended.said) == 1
    assert "train.lr=0.5 is not 0.01, with which out/checkpoints/step-00000036 was made" in ended.said[0]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_the_plan_log_replayed_gives_the_same_losses_though_corrections_change_plans(unbroken):
    flags = ("--planner.correct", "true", "--checkpoint.every", "0", "--train.steps", "6")
    run(unbroken, 2, "--run.dir", "corrected", *flags)
    run(unbroken, 2, "--run.dir", "replayed", "--planner.replay", "corrected", *flags, "--planner.name", "static")
    first, second = (last_rows(unbroken / name / METRICS) for name in ("corrected", "replayed"))
    assert sorted(first) == sorted(second) == list(range(6))
    for step, row in first.items():
        for key in ("loss", "grad_norm", "micro_batches"):
            assert second[step][key] == row[key], (step, key)


def test_a_log_whose_rows_are_of_no_step_is_named(tmp_path):
    path = tmp_path / METRICS
    path.write_bytes(b'{"step": 0, "loss": 1}\n{"step": 1, "lo\xc3\n{"step": 1, "loss": 2}\n')
    assert sorted(last_rows(path)) == [0, 1]  # a kill tore a row
    for row in ('{"loss": 1}', '{"step": null}', '{"step": 1e400}', "[]"):
        path.write_text(row + "\n")
        with pytest.raises(ValueError, match=r"metrics.jsonl:1"):
            last_rows(path)
