"""What a run says of itself: shares of its time, its sinks, logs, summary and documentation."""

from __future__ import annotations

import errno
import importlib
import importlib.util
import json
import logging
import sys
import threading
import time
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from flexsp.estimate.flops import flop_count
from flexsp.plans import Group, MicroBatch, Plan
from flexsp.train import rank_logs
from flexsp.train import sinks as sinks_module
from flexsp.train.config import Config, WatchConfig
from flexsp.train.rank_logs import RankLog
from flexsp.train.sinks import TensorBoard, check_sinks, open_sinks
from flexsp.train.throughput import Throughput
from flexsp.watch.rows import last_rows
from flexsp.watch.shares import predicted_exchange_share, time_shares
from flexsp.watch.summary import KEYS, lines, summary
from flexsp.watch.tags import scalars
from profiles import profile


def plan(num_devices: int, *micro_batches: list[tuple[list[int], list[int]]]) -> Plan:
    """Of ranks and sequences."""
    return Plan(
        num_devices=num_devices,
        micro_batches=tuple(
            MicroBatch(groups=tuple(Group(ranks=tuple(ranks), sequences=tuple(own)) for ranks, own in groups))
            for groups in micro_batches
        ),
    )


MIXED = plan(4, [([0, 1], [0]), ([2], [1])], [([0, 1, 2, 3], [2])])
"""Rank 3 is unused in the first micro-batch."""


def test_shares_are_rank_seconds_by_hand():
    # micro-batch 0: groups busy 6 and 4, of 10; micro-batch 1: all busy 7 of 8
    elapsed = [[10.0, 8.0], [9.9, 8.0], [10.0, 7.9], [10.0, 8.0]]
    busy = [[5.5, 7.0], [6.0, 7.0], [4.0, 6.5], [0.25, 7.0]]
    exchange = [[1.0, 2.0], [1.5, 2.0], [0.0, 1.0], [0.0, 1.0]]
    shares = time_shares(MIXED, elapsed, busy, exchange)
    idle_s = 2 * 0 + 1 * (6 - 4) + 6  # the group of rank 2, and rank 3 for as long as the slowest
    assert shares["micro_batch_idle_share"] == pytest.approx([idle_s / 40, 0.0])
    assert shares["idle_share"] == pytest.approx(idle_s / 72)
    assert shares["unused_share"] == pytest.approx(6 / 72)
    assert shares["gather_share"] == pytest.approx((40 - 4 * 6 + 32 - 4 * 7) / 72)
    assert shares["exchange_share"] == pytest.approx(8.5 / (5.5 + 6 + 4 + 7 + 7 + 6.5 + 7))  # unused ranks do not count
    # the groups' own seconds are what is left
    assert shares["idle_share"] + shares["gather_share"] == pytest.approx(1 - (2 * 6 + 4 + 4 * 7) / 72)


def test_even_groups_are_not_idle_and_nothing_is_divided_by_nothing():
    even = plan(2, [([0], [0]), ([1], [1])])
    assert time_shares(even, [[3.0], [3.0]], [[2.0], [2.0]], [[0.0], [0.0]])["idle_share"] == 0.0
    nothing = time_shares(even, [[0.0], [0.0]], [[0.0], [0.0]], [[0.0], [0.0]])
    assert nothing.pop("micro_batch_idle_share") == [0.0]
    assert set(nothing.values()) == {0.0}


def test_the_predicted_exchange_share_is_the_profiles():
    base = profile(4)
    lengths = np.array([50, 40, 90])
    exchange = busy = 0.0
    for degree, tokens in ((2, 50), (1, 40), (4, 90)):
        with_exchange = base.group_s(degree, [tokens])
        compute = (base.compute.quadratic_s * tokens**2 + base.compute.linear_s * tokens) / degree
        busy += degree * with_exchange
        exchange += degree * (with_exchange - compute)
    assert predicted_exchange_share(MIXED, lengths, base) == pytest.approx(exchange / busy)
    assert 0 < exchange / busy < 1


# ---- sinks


def row(step: int, **more) -> dict:
    return {
        "step": step, "loss": 3.0 - step / 7, "step_s": 0.5, "tokens": 100 + step, "micro_batches": [[2], [1, 1]],
        "group_s": [[0.1]], "ratios": {"exchange 2": 1.5}, **more,
    }  # fmt: skip


def test_numbers_get_tags_whatever_their_key_and_lists_do_not():
    more = {"eval_loss": 2.5, "fallback": True, "data_wait_s": 0.1, "surprise": 4, "said": "text", "none": None}
    assert scalars(row(7, **more)) == {
        "train/loss": 2.0, "time/step_s": 0.5, "data/tokens": 107.0, "plan/micro_batches": 2.0,
        "profile/ratios/exchange 2": 1.5, "eval/eval_loss": 2.5, "plan/fallback": 1.0, "time/data_wait_s": 0.1,
        "more/surprise": 4.0,
    }  # fmt: skip


def losses_shown(folder: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder)).Reload()
    return [(event.step, event.value) for event in events.Scalars("train/loss")]


def test_after_a_kill_tensorboard_shows_each_step_once(tmp_path):
    killed = TensorBoard(tmp_path, 0)
    for step in range(5):
        killed.write(step, {"train/loss": 10.0 + step})
    # no close: the process is gone. Each step was flushed
    assert losses_shown(tmp_path) == [(step, 10.0 + step) for step in range(5)]
    time.sleep(1.1)  # event files are ordered by their second
    goes_on = TensorBoard(tmp_path, 3)
    for step in range(3, 7):
        goes_on.write(step, {"train/loss": 20.0 + step})
    goes_on.close(failed=False)
    assert losses_shown(tmp_path) == [*((s, 10.0 + s) for s in range(3)), *((s, 20.0 + s) for s in range(3, 7))]
    killed.close(failed=True)


class Wandb(types.ModuleType):
    """Stands in for the documented interface: of a run, rows are kept whose step is not below the one that it is at."""

    def __init__(self, refuses: bool = False, finish_s: float = 0.0) -> None:
        super().__init__("wandb")
        self.calls: list[tuple] = []
        self.rows: dict[str, list[dict]] = {}
        self.refuses, self.finish_s = refuses, finish_s

    def init(self, *, project, dir, id, resume, config):
        if self.refuses:
            raise RuntimeError("api_key not configured (no-tty).\ncall wandb.login")
        self.calls.append(("init", project, dir, id, resume, config))
        self.now = self.rows.setdefault(id, [])
        return self

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.calls.append(("define_metric", name, step_metric))

    def log(self, data: dict, step: int | None = None) -> None:
        if data["step"] == 13:
            raise OSError("no space")
        at = len(self.now) if step is None else step
        if at >= len(self.now):
            self.now += [{}] * (at - len(self.now)) + [data]

    def finish(self, exit_code: int | None = None) -> None:
        time.sleep(self.finish_s)
        self.calls.append(("finish", exit_code))


def watching(**watch) -> Config:
    return Config(watch=WatchConfig(**watch))


def test_weights_and_biases_gets_every_row_and_the_same_run_when_it_goes_on(tmp_path, monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = watching(wandb="project")
    ids = []
    for first_step, append in ((0, False), (3, True), (0, False)):
        sinks = open_sinks(config, tmp_path, first_step, append)
        for step in range(first_step, first_step + 5):
            sinks.write(row(step))
        sinks.close(failed=append)
        begun, *defined, finished = wandb.calls[-4:]
        _, project, folder, known, resume, said = begun
        assert (project, folder, resume) == ("project", str(tmp_path), "allow")
        assert said["watch"]["wandb"] == "project" and said["train"]["steps"] == 30
        assert defined == [("define_metric", "step", None), ("define_metric", "*", "step")]
        assert finished == ("finish", int(append))
        ids.append(known)
    assert ids[0] == ids[1] != ids[2]  # the last one began anew
    assert all(ids)
    # steps 3 and 4 were trained again after a kill: no row is lost
    assert wandb.rows[ids[0]] == [{**scalars(row(s)), "step": s} for s in (0, 1, 2, 3, 4, 3, 4, 5, 6, 7)]


def test_the_word_on_an_error_does_not_wait_for_weights_and_biases(tmp_path, monkeypatch):
    monkeypatch.setattr(sinks_module, "FINISH_S", 0.2)
    monkeypatch.setitem(sys.modules, "wandb", Wandb(finish_s=30.0))
    sinks = open_sinks(watching(wandb="project"), tmp_path, 0, append=False)
    began = time.monotonic()
    sinks.close(failed=True)
    assert time.monotonic() - began < 10


def test_a_sink_that_fails_is_left_out_with_one_warning(tmp_path, monkeypatch, caplog):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    sinks = open_sinks(watching(wandb="project"), tmp_path, 12, append=False)
    for step in (12, 13, 14):
        sinks.write(row(step))
    sinks.close(failed=False)
    assert [logged["step"] for logged in wandb.now] == [12]
    (record,) = caplog.records
    assert record.getMessage() == "watch: wandb failed (OSError: no space) and gets no more; metrics.jsonl goes on"


def test_a_full_disk_under_tensorboard_is_one_warning_and_no_traceback(tmp_path, monkeypatch, caplog, capfd):
    """Its own thread raises what it has told `write` already."""
    from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # pytest's own would keep it from being said
    sinks = open_sinks(watching(tensorboard=True), tmp_path, 0, append=False)
    monkeypatch.setattr(LocalFileSystem, "append", full)
    for step in range(3):
        sinks.write(row(step))
    sinks.close(failed=False)
    for thread in threading.enumerate():
        if type(thread).__module__.startswith("tensorboard."):
            thread.join(10.0)
    assert [r.message for r in caplog.records if "No space left" in r.message] and len(caplog.records) == 1
    assert "Traceback" not in capfd.readouterr().err


def test_a_sink_that_cannot_begin_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", Wandb(refuses=True))
    with pytest.raises(ValueError, match=r"watch.wandb='p': wandb.init failed \(RuntimeError: api_key .*offline$"):
        open_sinks(watching(wandb="p"), tmp_path, 0, append=False)


def test_a_package_that_is_not_installed_is_named_and_a_folder_is_no_package(tmp_path, monkeypatch):
    check_sinks(watching())
    (tmp_path / "wandb").mkdir()  # where wandb writes by default
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match=r"^watch.wandb='p' needs wandb; pip install wandb$"):
        check_sinks(watching(wandb="p"))
    (tmp_path / "wandb/__init__.py").write_text("")
    importlib.invalidate_caches()
    check_sinks(watching(wandb="p"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"watch.tensorboard=true needs tensorboard; pip install 'flexsp\[tens"):
        check_sinks(watching(tensorboard=True))


# ---- logs of ranks


def test_a_ranks_log_has_rank_and_step_and_its_warnings_are_said_aloud_once(tmp_path, capsys):
    log = logging.getLogger("flexsp.somewhere")
    logging.getLogger("flexsp").setLevel(logging.INFO)
    with RankLog(tmp_path, 3) as rank_log:
        log.info("before the steps")
        rank_log.begin(17)
        log.debug("not kept")
        for _ in range(3):
            log.warning("the loader is slow")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("deprecated", DeprecationWarning, stacklevel=1)
    with pytest.raises(KeyError), RankLog(tmp_path, 3):
        raise KeyError("what ended it")
    log.info("after")
    lines = (tmp_path / "logs/rank-0003.log").read_text().splitlines()
    assert lines[0].endswith(" INFO rank 3 step -: before the steps")
    assert [line.endswith(" WARNING rank 3 step 17: the loader is slow") for line in lines[1:4]] == [True] * 3
    assert "WARNING rank 3 step 17: " in lines[4] and "DeprecationWarning: deprecated" in lines[4]
    assert any("ERROR rank 3 step -: ended by an error" in line for line in lines)
    assert lines[-1] == "KeyError: 'what ended it'"
    aloud = capsys.readouterr().err.splitlines()
    assert aloud[0] == "[rank 3] the loader is slow"
    assert aloud[1].startswith("[rank 3] ") and "DeprecationWarning: deprecated" in aloud[1]
    assert not any("loader" in line for line in aloud[1:])


def test_a_ranks_log_stays_small(tmp_path, monkeypatch):
    monkeypatch.setattr(rank_logs, "MOST_BYTES", 2000)
    with RankLog(tmp_path, 0):
        for step in range(200):
            logging.getLogger("flexsp").info("step %d of many", step)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "logs").iterdir()}
    assert set(sizes) == {"rank-0000.log", "rank-0000.log.1"} and max(sizes.values()) <= 2000
    assert "step 199 of many" in (tmp_path / "logs/rank-0000.log").read_text()


# ---- the summary


def full_row(step: int, **more) -> dict:
    return row(
        step, tokens_per_s=200.0 + step, micro_batch_s=[1.0 + step, 1.0], predicted_s=2.0, idle_share=0.1 * step,
        unused_share=0.0, gather_share=0.2, exchange_share=0.25, peak_bytes=step * 2**30, plan_wait_s=0.25, **more,
    )  # fmt: skip


def test_a_summary_is_of_the_rows_that_count(tmp_path):
    path = tmp_path / "metrics.jsonl"
    rows = [
        full_row(0),
        full_row(1, loss=99.0),
        full_row(1, eval_loss=2.25, fallback=True),
        full_row(2, fallback=False),
    ]
    path.write_text("\n".join(json.dumps(each) for each in rows) + '\n{"step": 3, "lo')
    found = summary(last_rows(path, KEYS), 10)
    assert (found["steps_done"], found["steps"], found["tokens"]) == (3, 10, 100 + 101 + 102)
    assert (found["loss_first"], found["loss_last"]) == (3.0, 3.0 - 2 / 7)
    assert found["tokens_per_s_median"] == 201.0
    assert found["measured_over_predicted_median"] == 3.0 / 2.0
    assert found["idle_share"] == pytest.approx((0.0 * 2 + 0.1 * 3 + 0.2 * 4) / 9)  # a long step counts more
    assert (found["fallbacks"], found["eval_loss_last"], found["plan_wait_s_total"]) == (1, 2.25, 0.75)
    assert found["mixes"] == [
        {"degrees": "<2>", "count": 3, "share": 0.5}, {"degrees": "<1,1>", "count": 3, "share": 0.5}
    ]  # fmt: skip
    said = dict(lines({**found, "wall_s": 7204.0, "steps_before": 1, "folder": "out", "files": ["metrics.jsonl"]}))
    assert said["steps"] == "3 of 10, 1 of them before it was started again"
    assert said["time"] == "2:00:04 since it was started; steps took 0:02"
    assert said["loss"] == "3.000 -> 2.714, held out 2.250"
    assert said["fallbacks"] == "1 step"
    assert said["memory"] == "2.00 GiB a rank at the most"
    assert said["micro-batches"] == "<2> 50%, <1,1> 50%"
    assert said["written"] == "out: metrics.jsonl"


def test_a_summary_leaves_out_what_rows_do_not_say():
    assert lines(summary({}, 5)) == [("steps", "0 of 5")]
    found = summary({0: {"step": 0, "loss": 1.0, "tokens": 5}}, 1)
    assert [what for what, _ in lines(found)] == ["steps", "tokens", "loss"]


# ---- FLOPs of a run


def test_flops_are_left_out_where_the_sizes_are_not_the_models(caplog):
    caplog.set_level(logging.INFO, logger="flexsp")
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING["llama"](**sizes))
    batch = np.array([10, 20])
    counted = Throughput(model, 2, torch.device("cpu"), "float32", peak_tflops=1e-3).of(batch, 0.5)
    assert counted["model_flops"] == flop_count(model.config.to_dict()).step_flops(batch)
    assert counted["tflops_per_s"] == pytest.approx(counted["model_flops"] / 0.5 / 2 / 1e12)
    assert counted["mfu"] == pytest.approx(counted["tflops_per_s"] / 1e-3)
    assert caplog.messages == []
    assert "mfu" not in Throughput(model, 2, torch.device("cpu"), "float32", peak_tflops=0).of(batch, 0.5)
    assert caplog.messages == ["watch: no mfu: the peak of cpu in float32 is not known; watch.peak_tflops sets it"]
    model.extra = torch.nn.Linear(100, 100)  # something that the config does not say
    assert Throughput(model, 2, torch.device("cpu"), "float32", peak_tflops=1).of(batch, 0.5) == {}
    assert (
        "FLOPs are not counted, and there is no mfu: the sizes in LlamaForCausalLM's config give" in caplog.messages[1]
    )
