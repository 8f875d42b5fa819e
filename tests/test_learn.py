"""What a run learns: where it goes on from, what it raises when memory was underrated, and what the error says."""

from __future__ import annotations

import json
import logging
import os
import resource
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

import flexsp
from channel_pools import pool
from flexsp import Profile
from flexsp.data import PlannedBatch
from flexsp.parallel import GroupPool, RankError, StepResult
from flexsp.parallel.clock import BusyClock, MicroBatchTime
from flexsp.plans import Group, MicroBatch, Plan
from flexsp.profile import Policy
from flexsp.profiler.correct import BOUNDS, LEAST, corrected
from flexsp.train.learn import FILE, WARM_UP, Learner, go_on, profile_sha256
from flexsp.train.out_of_memory import HEADROOM, describe, is_out_of_memory, raised_activation_bytes
from flexsp.train.ranks import joined_ranks
from flexsp.watch.rows import METRICS, last_rows
from profiles import profile
from test_train import CONFIG

pytestmark = pytest.mark.alone


def learned_from(base: Profile, folder: Path) -> Profile:
    """What a run in `folder` that started from `base` has saved."""
    ratios = {"linear": 7.0}
    learned = replace(
        corrected(base, ratios),
        memory=replace(base.memory, activation_bytes_per_token=17),
        provenance={**base.provenance, "started_from_sha256": profile_sha256(base), "correction": ratios},
    )
    learned.save(folder / FILE)
    return learned


def test_a_run_goes_on_from_what_the_last_one_in_its_folder_learned(tmp_path):
    base = profile()
    assert go_on(base, tmp_path, correct=True) is base
    learned = learned_from(base, tmp_path)
    assert go_on(base, tmp_path, correct=True) == learned
    other = replace(base, name="another")
    assert go_on(other, tmp_path, correct=True) is other


def test_without_correction_it_takes_over_the_memory_estimate_alone(tmp_path):
    base = profile()
    learned_from(base, tmp_path)
    found = go_on(base, tmp_path, correct=False)
    assert found.memory.activation_bytes_per_token == 17
    assert found.compute == base.compute


@pytest.mark.parametrize("ratio, rule", [('"7"', "without quotes"), ("-1", "above 0"), ("0", "above 0")])
def test_a_learned_ratio_that_is_none_is_one_line_that_names_it(tmp_path, ratio, rule):
    base = profile()
    learned_from(base, tmp_path)
    path = tmp_path / FILE
    text = path.read_text()
    assert text.count('"linear": 7.0') == 1
    path.write_text(text.replace('"linear": 7.0', f'"linear": {ratio}'))
    with pytest.raises(ValueError, match=rf"profile\.json: provenance: correction: linear=.*{rule}"):
        go_on(base, tmp_path, correct=True)


@pytest.mark.parametrize("left", ["", "{", '{"format": "flexsp-profile/1"}'])
def test_a_learned_profile_that_a_loss_of_power_broke_is_the_checkpoint_s(tmp_path, caplog, left):
    base = profile()
    learned = learned_from(base, tmp_path)
    (tmp_path / FILE).write_text(left)
    logging.getLogger("flexsp").propagate = True
    assert go_on(base, tmp_path, correct=True, saved=learned) == learned
    (warned,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert f"{tmp_path / FILE}: " in warned and warned.endswith("; the checkpoint's is taken instead")
    with pytest.raises(ValueError, match=r"profile\.json: .*; or delete it: no more is lost than what the run learned"):
        go_on(base, tmp_path, correct=True)


def alike_s(profile: Profile) -> float:
    """What it says of the group that `started` trains: one batch does not tell its terms apart."""
    return profile.group_s(1, [40, 50, 10])


def started(base: Profile, folder: Path, slower: float, correct: bool = True) -> tuple[Profile, Profile]:
    """What a process of a run on one rank plans with at first and at last, on a machine so much slower than `base`."""
    plan = flexsp.plan([40, 50, 10], base, "static")
    first = go_on(base, folder, correct)
    with joined_ranks(10):
        learner = Learner(base, first, GroupPool(), torch.device("cpu"), folder, correct)
        for step in range(WARM_UP + LEAST):
            batch = PlannedBatch(
                step=step, sequence_ids=np.arange(3), lengths=np.array([40, 50, 10]), plan=plan, source=None
            )
            busy = [slower * micro_batch.groups[0].predicted_s for micro_batch in plan.micro_batches]
            times = tuple(MicroBatchTime(elapsed_s=s + slower * base.compute.fixed_s, busy_s=s) for s in busy)
            learner.learn(batch, StepResult(loss=1.0, num_labels=1, times=times, kernels=frozenset()))
    return first, learner.profile


def test_the_bound_is_of_the_run_however_often_it_is_started(tmp_path):
    base = profile(1, capacity=100)
    last = base
    for _ in range(3):
        first, learned = started(base, tmp_path, slower=1000.0)
        assert first == last  # from its first step on, what the one before it had learned
        assert learned.compute.linear_s == pytest.approx(BOUNDS[1] * base.compute.linear_s)
        assert learned.provenance["correction"]["linear"] == pytest.approx(BOUNDS[1])
        assert Profile.load(tmp_path / FILE) == learned
        last = learned
    _, learned = started(base, tmp_path, slower=1.0)
    assert alike_s(learned) == pytest.approx(alike_s(base), rel=0.01)


def test_memory_raised_meanwhile_and_times_corrected_are_both_kept(tmp_path):
    base = profile(1, capacity=100)
    _, learned = started(base, tmp_path, slower=4.0)
    with joined_ranks(10):
        learner = Learner(base, go_on(base, tmp_path, True), GroupPool(), torch.device("cpu"), tmp_path, correct=True)
        learner.save_raised(20)
    first, last = started(base, tmp_path, slower=2.0)
    assert first.compute == learned.compute
    assert alike_s(last) == pytest.approx(2.0 * alike_s(base), rel=0.03)
    assert first.memory.activation_bytes_per_token == last.memory.activation_bytes_per_token == 20
    uncorrected, _ = started(base, tmp_path, slower=2.0, correct=False)
    assert uncorrected == replace(base, memory=first.memory)


def test_a_rank_that_was_told_what_rank_0_learned_keeps_it_where_it_runs_out_of_memory(tmp_path):
    base = profile(1, capacity=100)
    _, learned = started(base, tmp_path / "first", slower=4.0)
    with joined_ranks(10):
        learner = Learner(base, base, GroupPool(), torch.device("cpu"), tmp_path, correct=True)
        learner.profile = learned  # as `learn` does on all ranks; the correction is rank 0's
        learner.save_raised(20)
    found = go_on(base, tmp_path, correct=True)
    assert found.compute == learned.compute and found.memory.activation_bytes_per_token == 20


def test_what_another_run_learned_is_a_base_like_any_other(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "run").mkdir()
    measured = profile(1, capacity=100)
    _, base = started(measured, tmp_path / "other", slower=4.0)
    assert alike_s(base) == pytest.approx(4.0 * alike_s(measured), rel=0.03)
    with joined_ranks(10):
        learner = Learner(base, base, GroupPool(), torch.device("cpu"), tmp_path / "run", correct=True)
        learner.save_raised(20)  # before anything was corrected
    first, last = started(base, tmp_path / "run", slower=1.0)
    assert first.compute == base.compute
    assert alike_s(last) == pytest.approx(alike_s(base), rel=0.03)


def test_more_ranks_than_gpus_are_bad_input(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(ValueError, match=r"nproc-per-node=4 is more than the 2 GPUs of this node; start one rank"):
        with joined_ranks(10):
            pass


def test_failed_allocations_are_told_from_other_errors():
    with pytest.raises(RuntimeError) as too_large:
        torch.empty(1 << 60)
    assert is_out_of_memory(too_large.value)
    with pytest.raises(MemoryError) as too_large:
        np.empty(1 << 56)
    assert is_out_of_memory(too_large.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))
    nccl = "NCCL error: unhandled cuda error. Last error: Failed to CUDA calloc 8388608 bytes"
    assert is_out_of_memory(RuntimeError(nccl))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
    # another rank's, of which all ranks are told: only that one ran out
    assert not is_out_of_memory(RankError("step 3, rank 1: RuntimeError: can't allocate memory"))


@pytest.mark.parametrize("progress", [0.05, 0.5, 1.0])
def test_a_raised_estimate_forbids_what_ran_out(progress):
    base = profile(capacity=1000)
    raised = raised_activation_bytes(base, tokens_per_rank=600, progress=progress)
    after = replace(base, memory=replace(base.memory, activation_bytes_per_token=raised))
    assert after.capacity_tokens(1) <= 600 * HEADROOM
    assert raised > base.memory.activation_bytes_per_token
    if progress == 0.5:  # the room was full half way, so the whole needs twice as much
        assert after.capacity_tokens(1) == pytest.approx(600 * HEADROOM / 2, rel=0.02)


def two_groups() -> PlannedBatch:
    plan = Plan(
        num_devices=2,
        micro_batches=(
            MicroBatch(groups=(Group(ranks=(0,), sequences=(2,)),)),
            MicroBatch(groups=(Group(ranks=(0, 1), sequences=(0, 1)),)),
        ),
    )
    return PlannedBatch(step=7, sequence_ids=np.arange(3), lengths=np.array([40, 50, 10]), plan=plan, source=None)


def test_the_error_names_rank_group_and_lengths():
    with joined_ranks(10):
        clock = BusyClock(torch.device("cpu"))
        clock.begin()
        clock.begin()
        text, raised, _ = describe(two_groups(), clock, profile(2, capacity=100), num_layers=4)
    assert "step 7: out of memory on rank 0 in micro-batch 1: its group of ranks 0-1 held 2 sequences" in text
    assert "50, 40 tokens, 45 a rank" in text
    assert raised == raised_activation_bytes(profile(2, capacity=100), 45.0, 1 / 4)


def test_after_the_micro_batches_it_is_the_optimizers_step_and_the_fullest_of_them():
    with joined_ranks(10):
        text, raised, _ = describe(two_groups(), BusyClock(torch.device("cpu")), profile(2, capacity=100), num_layers=4)
    assert "on rank 0 in the optimizer's step, after all micro-batches, 1 being its fullest: its group of ranks" in text
    assert raised == raised_activation_bytes(profile(2, capacity=100), 45.0, 1.0)


def test_memory_that_runs_out_under_a_policy_raises_the_estimate_of_that_policy(tmp_path):
    plain = profile(2, capacity=100)
    policies = {"full": Policy(activation_bytes_per_token=plain.memory.activation_bytes_per_token / 4)}
    base = replace(plain, memory=replace(plain.memory, policies=policies))
    batch = two_groups()
    under = tuple(replace(micro_batch, policy="full") for micro_batch in batch.plan.micro_batches)
    batch = replace(batch, plan=replace(batch.plan, micro_batches=under))
    with joined_ranks(10):
        learner = Learner(base, base, GroupPool(), torch.device("cpu"), tmp_path, correct=True)
        text, raised, policy = describe(batch, BusyClock(torch.device("cpu")), base, num_layers=4)
        saved = Profile.load(learner.save_raised(raised, policy))
    assert "its fullest under policy 'full': its group" in text
    assert saved.memory.activation_bytes_per_token == base.memory.activation_bytes_per_token
    assert saved.memory.policies["full"].activation_bytes_per_token == raised
    assert not saved.fits(2, 90, "full")  # what ran out


class Peaks:
    """A PeakMeter of a rank that held so many bytes."""

    def __init__(self, peak: int, exact: bool = True) -> None:
        self.peak, self.exact = peak, exact

    def peak_bytes(self) -> int:
        return self.peak


def learned_on_ranks(
    folder: str, peaks: list[int], exact: bool = True, correct: bool = True
) -> tuple[Profile | None, dict]:
    world_size = dist.get_world_size()
    base = profile(world_size, capacity=100)
    learner = Learner(base, base, pool(), torch.device("cpu"), Path(folder), correct=correct)
    learner._meter = Peaks(peaks[dist.get_rank()], exact)
    learner.computed()
    batch = two_groups()
    # the first rank works alone in the first micro-batch; both share the second
    busy = [[0.3, 0.5], [0.0, 0.4]][dist.get_rank()]
    times = tuple(MicroBatchTime(elapsed_s=1.0, busy_s=b) for b in busy)
    for _ in range(LEAST):
        new, metrics = learner.learn(batch, StepResult(loss=1.0, num_labels=1, times=times, kernels=frozenset()))
    assert learner.profile == (new or base)
    return new, metrics


def test_all_ranks_learn_the_same_and_rank_0_has_the_metrics(ranks, tmp_path):
    (new, metrics), (other, nothing) = ranks(2).run(learned_on_ranks, str(tmp_path), [1200, 1000])
    assert new == other
    assert nothing == {}
    assert metrics["micro_batch_s"] == (1.0, 1.0)
    assert metrics["group_s"] == ((0.3,), (0.5,))
    assert metrics["peak_bytes"] == 1200
    assert metrics["predicted_peak_bytes"] == 1000 + 10 * 45  # half of 90 tokens
    assert metrics["ratios"]["attention"] > 1.0  # what took 0.3 s was predicted to take 0.011 s
    saved = Profile.load(tmp_path / FILE)
    assert saved == new
    assert saved.memory.activation_bytes_per_token == 10
    assert go_on(profile(2, capacity=100), tmp_path, correct=True) == new


def test_a_peak_above_the_predicted_one_raises_the_estimate(ranks, tmp_path):
    (new, _), _ = ranks(2).run(learned_on_ranks, str(tmp_path), [1000, 1900])
    assert new.memory.activation_bytes_per_token == 900 / 45


@pytest.mark.parametrize(("exact", "correct"), [(True, False), (False, True), (False, False)])
def test_a_peak_raises_nothing_where_it_is_not_exact_or_corrections_are_off(ranks, tmp_path, exact, correct):
    """Plans are then what they were: a function of profile and lengths, the same in each run."""
    found = ranks(2).run(learned_on_ranks, str(tmp_path), [1000, 1900], exact, correct)
    for new, _ in found:
        assert (new is not None) is correct  # times were learned of, if anything
        assert new is None or new.memory.activation_bytes_per_token == 10


def learned_when_hardly_filled(folder: str) -> Profile | None:
    base = profile(dist.get_world_size(), capacity=10_000)  # of which 45 tokens are hardly any
    learner = Learner(base, base, pool(), torch.device("cpu"), Path(folder), correct=True)
    learner._meter = Peaks(50_000)
    learner.computed()
    times = (MicroBatchTime(elapsed_s=1.0, busy_s=0.5),) * 2
    return learner.learn(two_groups(), StepResult(loss=1.0, num_labels=1, times=times, kernels=frozenset()))[0]


def test_a_rank_that_was_hardly_filled_says_nothing_of_a_tokens_bytes(ranks, tmp_path):
    assert ranks(2).run(learned_when_hardly_filled, str(tmp_path)) == [None, None]


def learned_without_a_folder(folder: str) -> str:
    try:
        learned_on_ranks(folder, [1200, 1000])
    except RankError as error:
        return str(error)
    return "no error"


def test_a_profile_that_cannot_be_saved_is_an_error_on_all_ranks(ranks, tmp_path):
    (tmp_path / "file").write_text("")
    for said in ranks(2).run(learned_without_a_folder, str(tmp_path / "file")):
        assert said.startswith("step 7, rank 0, saving the profile: ")
        assert "profile.json: cannot be written (File exists)" in said


def data_bytes_at_rest() -> int:
    """Private memory of a rank before its model is built; a CUDA build of torch holds more than a CPU build."""
    code = (
        "import re, torch, transformers, flexsp.parallel, torch.distributed as dist\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "print(re.search(r'VmData:\\s+(\\d+)', open('/proc/self/status').read()).group(1))"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=100, check=True,
    )  # fmt: skip
    return int(said.stdout) * 1024


def train_within(folder: Path, data_bytes: int, *flags: str) -> subprocess.CompletedProcess[str]:
    """Two ranks whose processes may hold so many bytes of data: real allocations fail beyond."""
    command = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "flexsp", "train", "config.toml")
    flags = (
        "--planner.max_tokens_per_rank", "0", "--planner.sp_degrees", "[1, 2]", "--train.steps", "4",
        "--train.batch_size", "96", "--run.compare_batches", "0", "--run.save_model", "false",
        "--checkpoint.every", "2", "--watch.tensorboard", "false", *flags,
    )  # fmt: skip
    return subprocess.run(
        [sys.executable, *command, *flags],
        cwd=folder, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200,
        check=False, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (data_bytes, data_bytes)),
    )  # fmt: skip


def runs_until_it_fits(
    folder: Path, data_bytes: int, *flags: str
) -> tuple[subprocess.CompletedProcess[str], list[int]]:
    """The last of at most six runs of one command, and the estimate after each that ran out of memory."""
    estimates: list[int] = []
    for _ in range(6):
        run = train_within(folder, data_bytes, *flags)
        if run.returncode == 0:
            break
        ours = [line for line in run.stderr.splitlines() if line.startswith("flexsp train:")]
        assert len(ours) == 1, run.stderr[-3000:]
        assert "out of memory on rank" in ours[0]
        assert "tokens" in ours[0] and "start the same command again" in ours[0]
        assert "flexsp/" not in run.stderr  # no traceback of ours on any rank
        learned = folder / "out" / FILE
        estimates.append(Profile.load(learned).memory.activation_bytes_per_token)
    return run, estimates


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA counts all private memory on Linux alone")
def test_running_out_of_memory_is_one_error_and_the_next_run_plans_within_the_raised_estimate(tmp_path):
    """A process limit, real allocations: first a run that measures its profile and keeps within it, then, as if that
    had been killed after two steps, a profile that underrates activations twentyfold."""
    limit = data_bytes_at_rest() + 550 * 2**20
    wide = CONFIG.replace("hidden_size = 32, intermediate_size = 64", "hidden_size = 64, intermediate_size = 512")
    (tmp_path / "config.toml").write_text(wide)
    measured, _ = runs_until_it_fits(tmp_path, limit)
    assert measured.returncode == 0, measured.stderr[-3000:]
    (saved,) = (tmp_path / "profiles").iterdir()
    document = json.loads(saved.read_text())
    assert "of the process's limit of" in document["provenance"]["memory_limit"]
    document["memory"]["activation_bytes_per_token"] //= 20
    (tmp_path / "wrong.json").write_text(json.dumps(document))

    shutil.rmtree(tmp_path / "out/checkpoints/step-00000004")

    run, estimates = runs_until_it_fits(tmp_path, limit, "--planner.profile", "wrong.json")
    estimates.insert(0, document["memory"]["activation_bytes_per_token"])
    assert run.returncode == 0, run.stderr[-3000:]
    assert len(estimates) > 1, "the underrated profile did not run out of memory"
    assert estimates == sorted(set(estimates))
    assert "going on from what the last run in this folder learned" in run.stdout
    assert "checkpoint: going on after step" in run.stdout
    rows = last_rows(tmp_path / "out" / METRICS)
    assert sorted(rows) == [0, 1, 2, 3]
    assert all(row["peak_bytes"] <= limit for row in rows.values())
