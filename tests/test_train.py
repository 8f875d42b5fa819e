"""A run from the command line, on real text, as `torchrun` starts it."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fault_runs import Launcher

pytestmark = pytest.mark.alone

CONFIG = """
[model]
config = { model_type = "llama", vocab_size = 256, hidden_size = 32, intermediate_size = 64, num_hidden_layers = 2, num_attention_heads = 4, num_key_value_heads = 2, max_position_embeddings = 4096 }
[data]
cache_dir = "data"
max_length = "2K"
overlong = "drop"
[planner]
profile_dir = "profiles"
max_tokens_per_rank = 800
[train]
steps = 12
batch_size = 16
lr = 1e-2
[checkpoint]
every = 0
[run]
dir = "out"
compare_batches = 2
[watch]
tensorboard = true
peak_tflops = 0.1
"""  # noqa: E501


def train(folder: Path, *flags: str, world_size: int = 4, timeout_s: float = 200) -> subprocess.CompletedProcess[str]:
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(world_size)]
    return subprocess.run(
        [sys.executable, *command, "-m", "flexsp", "train", "config.toml", *flags],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=timeout_s,
        check=False,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """One run on four ranks, looked at by several tests."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.toml").write_text(CONFIG)
    done = train(folder)
    assert done.returncode == 0, done.stderr[-3000:]
    (saved,) = (folder / "profiles").iterdir()
    (folder / "four.json").write_text(saved.read_text())
    return folder, done.stdout


@pytest.fixture(scope="module")
def launcher(run: tuple[Path, str]) -> Iterator[Launcher]:
    """Starts further runs in the folder of the first one, without torchrun's start."""
    made = Launcher(run[0])
    yield made
    made.close()


def test_metrics_have_a_line_a_step_and_the_loss_falls(run):
    rows = rows_of(run[0] / "out")
    assert [row["step"] for row in rows] == list(range(12))
    assert set(rows[0]) == {
        "step", "loss", "grad_norm", "num_sequences", "tokens", "micro_batches", "predicted_s", "step_s", "plan_s",
        "plan_wait_s", "tokens_per_s", "micro_batch_s", "predicted_micro_batch_s", "group_s", "predicted_group_s",
        "peak_bytes", "predicted_peak_bytes", "lr", "model_flops", "tflops_per_s", "mfu", "communicators", "idle_share",
        "unused_share", "gather_share", "exchange_share", "predicted_exchange_share", "micro_batch_idle_share",
        "data_wait_s",
    }  # fmt: skip
    assert all(set(row) == set(rows[0]) | {"ratios"} for row in rows[1:])
    for row in rows:
        assert [len(groups) for groups in row["group_s"]] == [len(degrees) for degrees in row["micro_batches"]]
        assert sum(row["predicted_micro_batch_s"]) == pytest.approx(row["predicted_s"])
        assert all(0 < max(groups) <= s for groups, s in zip(row["group_s"], row["micro_batch_s"], strict=True))
    assert all(row["num_sequences"] == 16 for row in rows)
    assert all(sum(degrees) <= 4 for row in rows for degrees in row["micro_batches"])
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5


def test_shares_and_rates_of_a_step_fit_its_own_numbers(run):
    for row in rows_of(run[0] / "out"):
        assert 0 <= row["unused_share"] <= row["idle_share"] < 1
        assert 0 < row["gather_share"] < 1 and row["idle_share"] + row["gather_share"] < 1
        assert 0 < row["exchange_share"] < 1 and 0 < row["predicted_exchange_share"] < 1
        assert len(row["micro_batch_idle_share"]) == len(row["micro_batches"])
        assert row["tflops_per_s"] == pytest.approx(row["model_flops"] / row["step_s"] / 4 / 1e12)
        assert row["mfu"] == pytest.approx(row["tflops_per_s"] / 0.1)
    # 6 a token and matrix parameter, and less than all s^2 of the context limit beside
    linear = 6 * (2 * (32 * 8 * 2 * (4 + 2) + 3 * 32 * 64) + 256 * 32)
    assert all(
        linear < row["model_flops"] / row["tokens"] < linear + 2 * 6 * 32 * 2048 for row in rows_of(run[0] / "out")
    )


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_tensorboard_shows_what_metrics_say(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run[0] / "out/tensorboard")).Reload()
    shown = {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
    rows = rows_of(run[0] / "out")
    assert {tag.split("/")[1] for tag in shown} >= {key for key, value in rows[1].items() if isinstance(value, float)}
    for tag in ("train/loss", "time/step_s", "share/idle_share", "memory/peak_bytes", "speed/mfu", "train/lr"):
        values = [row[tag.split("/")[1]] for row in rows]
        assert shown[tag] == {step: pytest.approx(value, rel=1e-6) for step, value in enumerate(values)}  # float32
    assert shown["plan/micro_batches"] == {step: len(row["micro_batches"]) for step, row in enumerate(rows)}
    assert shown["profile/ratios/fixed"] == {
        row["step"]: pytest.approx(row["ratios"]["fixed"], rel=1e-6) for row in rows[1:]
    }


def test_the_page_on_watching_has_the_keys_that_are_written_and_no_others(run):
    page = (Path(__file__).parents[1] / "docs/watching.md").read_text()
    documented = re.findall(r"^\| `(\w+)` \|", page.partition("## metrics.jsonl")[2].partition("\n## ")[0], re.M)
    assert len(documented) == len(set(documented))
    elsewhere = {"fallback", "eval_loss", "skipped"}  # written by runs of other tests alone
    assert set(documented) - elsewhere == {key for row in rows_of(run[0] / "out") for key in row}
    assert elsewhere <= set(documented)


def test_the_run_ends_with_a_summary_of_its_rows(run):
    rows, found = rows_of(run[0] / "out"), json.loads((run[0] / "out/summary.json").read_text())
    assert found["steps_done"] == 12 and found["steps_before"] == 0
    assert found["tokens"] == sum(row["tokens"] for row in rows)
    assert found["step_s_total"] == pytest.approx(sum(row["step_s"] for row in rows)) and found["wall_s"] > 0
    assert sum(each["count"] for each in found["mixes"]) == sum(len(row["micro_batches"]) for row in rows)
    said = [line for line in run[1].splitlines() if line.startswith("summary: ")]
    assert 10 <= len(said) <= 14
    assert f"summary: loss: {rows[0]['loss']:.3f} -> {rows[-1]['loss']:.3f}" in said
    assert "summary: written: out: metrics.jsonl, summary.json, tensorboard, logs" in said


def test_each_rank_has_a_log_of_its_own(run):
    for rank in range(4):
        text = (run[0] / f"out/logs/rank-{rank:04d}.log").read_text()
        assert f"INFO rank {rank} step -: model: LlamaForCausalLM" in text
        assert f"INFO rank {rank} step 11: training 12/12: loss " in text
        assert ("summary: " in text) == (rank == 0)


def test_what_happened_to_the_data_and_to_memory_is_said(run):
    said = run[1]
    assert "exceed max_length=2048: dropped" in said
    assert "artificial: planner.max_tokens_per_rank" in said
    assert "forces sp_degree 4" in said


def test_the_comparison_is_what_was_measured(run):
    report = json.loads((run[0] / "out/comparison.json").read_text())
    assert report["batches"] == 2
    assert report["static"]["sp_degree"] == 4
    for name in ("flex", "batch-adaptive", "static"):
        assert report[name]["median_step_s"] == pytest.approx(sum(report[name]["step_s"]) / 2)
    assert report["speedup"] == pytest.approx(report["static"]["median_step_s"] / report["flex"]["median_step_s"])
    assert f"flex is {report['speedup']:.2f} times as fast as static" in run[1]


def test_the_model_loads_and_has_learned(run):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(run[0] / "out/model")
    assert type(model).__name__ == "LlamaForCausalLM"
    text = torch.tensor([list(b"import os\nimport sys\n\ndef main():\n    return None\n")])
    loss = model(input_ids=text, labels=text).loss.item()
    assert loss < 4.5  # ln 256 = 5.5 is knowing nothing


@pytest.mark.slow
def test_a_run_starts_from_a_saved_model_on_another_number_of_ranks(run):
    folder, _ = run
    done = train(
        folder, "--model.path", "out/model", "--model.config", "{}", "--train.steps", "1", "--run.dir", "again",
        "--run.compare_batches", "0", "--planner.max_tokens_per_rank", "1K", "--model.dtype", "bfloat16",
        world_size=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    first = json.loads((folder / "out/metrics.jsonl").read_text().splitlines()[0])
    again = json.loads((folder / "again/metrics.jsonl").read_text())
    assert again["loss"] < first["loss"] - 0.3


@pytest.mark.slow
def test_a_profile_of_more_devices_with_policies_is_used_and_what_was_assumed_is_said(run):
    folder, _ = run
    document = json.loads((folder / "four.json").read_text())
    memory = document["memory"]
    room = 100 * memory["activation_bytes_per_token"]  # on two ranks too little for the limit without a policy
    whole = memory["unsharded_bytes"]
    memory["memory_bytes"] = 2 * (memory["model_state_bytes"] - whole) + whole + room
    memory["policies"] = {"full": {"activation_bytes_per_token": 1, "compute_factor": 1.3}}
    (folder / "more.json").write_text(json.dumps(document))
    done = train(
        folder, "--planner.profile", "more.json", "--train.steps", "2", "--run.dir", "more", "--run.compare_batches",
        "0", "--planner.correct", "false", world_size=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "more.json: for 2 devices from a profile of 4: model_state_bytes sharded evenly" in done.stdout
    assert f"but for unsharded_bytes={whole}, which each holds" in done.stdout
    plans = [json.loads(line) for line in (folder / "more" / "plans.jsonl").read_text().splitlines()]
    policies = {micro_batch["policy"] for row in plans for micro_batch in row["plan"]["micro_batches"]}
    assert "full" in policies
    assert "memory: a rank holds" in done.stdout and "under policy full" in done.stdout
    rows = [json.loads(line) for line in (folder / "more/metrics.jsonl").read_text().splitlines()]
    assert all("ratios" not in row for row in rows)
    assert all(set(degrees) <= {1, 2} for row in rows for degrees in row["micro_batches"])


def test_what_a_run_learned_is_saved_and_the_next_one_in_its_folder_goes_on_from_it(run, launcher):
    folder, _ = run
    learned = json.loads((folder / "out/profile.json").read_text())
    base = json.loads((folder / "four.json").read_text())
    ratio = learned["provenance"]["correction"]["linear"]
    assert learned["compute"]["linear_s"] == pytest.approx(ratio * base["compute"]["linear_s"])
    (folder / "next").mkdir()
    (folder / "next/profile.json").write_text((folder / "out/profile.json").read_text())
    ended = launcher.run(
        "none", "--run.dir", "next", "--train.steps", "1", "--run.compare_batches", "0", "--run.save_model", "false",
        world_size=4,
    )  # fmt: skip
    assert ended.statuses == [0] * 4, ended.err[-3000:]
    assert "going on from what the last run in this folder learned, next/profile.json" in ended.out


@pytest.mark.slow
def test_rows_with_masked_labels_train(run):
    """Prompts do not count: theirs is noise, which nobody learns; the ten sevens after it are learnt at once."""
    folder, _ = run
    draw = random.Random(0)
    prompts = [[draw.randrange(256) for _ in range(20)] for _ in range(36)]
    rows = [{"input_ids": prompt + [7] * 10, "labels": [-100] * 20 + [7] * 10} for prompt in prompts]
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    done = train(
        folder, "--data.source", "rows.jsonl", "--data.overlong", "error", "--train.batch_size", "6", "--train.steps",
        "6", "--run.dir", "rows", "--run.compare_batches", "0", "--planner.max_tokens_per_rank", "1K", "--train.lr",
        "3e-2", "--run.save_model", "false", world_size=2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = [json.loads(line) for line in (folder / "rows/metrics.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in metrics] == [180] * 6
    assert metrics[-1]["loss"] < 1.0  # with the prompts it would stay above 2/3 of ln 256
    assert not (folder / "rows/model").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--planner.profile", "none.json"], "none.json: cannot be read"),
        (["--train.stepz", "1"], "train.stepz is unknown"),
        (["--data.overlong", "error"], "exceeds max_length=2048, as do"),
        (["--data.max_length", "4K"], "data.max_length=4096 tokens fit into no group: the most that any degree"),
        (["--planner.sp_degrees", "[1, 3]"], "sp_degree=3 is not between 1 and world_size=2"),
        (["--model.config.attention_dropout", "0.1"], "dropout makes loss and gradients depend on the plan"),
        (["--model.config.vocab_size", "100"], "is beyond vocab_size=100"),
        (["--watch.wandb", "project"], "watch.wandb='project' needs wandb; pip install wandb"),
    ],
)
def test_bad_input_is_one_line_and_status_2(run, launcher, flags, message):
    base = ["--run.dir", "bad", "--run.compare_batches", "0", "--planner.max_tokens_per_rank", "1K"]
    ended = launcher.run("none", *base, *flags)
    assert len(ended.said) == 1 and message in ended.said[0], ended.err[-3000:]
    assert "Traceback" not in ended.err and ended.statuses == [2, 2]


def test_bad_input_under_torchrun_is_one_line_too(run):
    done = train(run[0], "--run.dir", "bad", "--planner.name", "best", world_size=2)
    ours = [line for line in done.stderr.splitlines() if line.startswith("flexsp train:")]
    assert len(ours) == 1 and "planner='best' is unknown" in ours[0], done.stderr[-3000:]
    assert "flexsp/" not in done.stderr  # torchrun adds a traceback of its own, we none
    assert "exitcode  : 2" in done.stderr
