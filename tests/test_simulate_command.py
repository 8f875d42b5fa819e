"""`flexsp simulate` as a user runs it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import flexsp
from flexsp.batches import global_batch
from flexsp.cli.main import main
from flexsp.cli.simulate_tables import show_case
from flexsp.planner import COMPARED
from flexsp.simulate.cases import make_case
from flexsp.simulate.figures import step_figures
from flexsp.simulate.runs import Done, case_figures
from profiles import profile

# Three quarters short, a few that need two or four of the four devices of 100 tokens.
DOCUMENTS = [5, 9, 300, 12, 40, 150, 7, 7, 20, 33, 60, 5] * 4


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("docs.txt").write_text("".join(f"{length}\n" for length in DOCUMENTS))
    profile(4).save("p.json")
    return tmp_path


def run(capsys, *flags: str) -> tuple[int, str, str]:
    status = main(["simulate", *flags, "--workers", "1"])
    said = capsys.readouterr()
    return status, said.out, said.err


SMALL = ("docs.txt", "--profile", "p.json", "--batch-size", "12", "--iterations", "3")


def test_it_prints_and_writes_the_same_figures_of_every_planner(files, capsys):
    status, out, _ = run(capsys, *SMALL, "--output", "out")
    assert status == 0
    report = json.loads(Path("out/report.json").read_text())
    assert list(report["planners"]) == ["flex", "batch-adaptive", "static"]
    lengths = np.array(DOCUMENTS)
    for name, figures in report["planners"].items():
        options = {"sp_degree": 4} if name == "static" else {}
        seconds = [
            flexsp.plan(lengths[global_batch(48, 12, 0, step)], profile(4), name, **options).predicted_s
            for step in range(3)
        ]
        assert [step["step_s"] for step in figures["steps"]] == seconds
        assert figures["total_s"] == sum(seconds) and figures["median_step_s"] == sorted(seconds)[1]
        assert f" {figures['median_step_s']:.3g} " in out and f"{figures['speedup']:.2f}" in out
    for sentence in report["sentences"]:
        assert sentence in out
    page = Path("out/report.html").read_text()
    assert all(name in page for name in report["planners"])
    rows = [line for line in out.splitlines() if line.split()[:1] and line.split()[0] in report["planners"]]
    assert len([row for row in rows if row.rstrip().endswith(")")]) == 3 and max(map(len, rows[:3])) <= 80


def test_a_step_of_the_output_can_be_checked_and_replayed(files, capsys):
    run(capsys, *SMALL, "--output", "out")
    report = json.loads(Path("out/report.json").read_text())
    (folder,) = Path("out").glob("step-*")
    step = int(folder.name.removeprefix("step-"))
    batch, plan = str(folder / "lengths.txt"), str(folder / "flex.plan.json")
    assert main(["check", batch, "p.json", plan]) == 0
    capsys.readouterr()
    status, out, _ = run(capsys, batch, "--profile", "p.json", "--plan", plan, "--output", "replayed")
    assert status == 0
    replayed = json.loads(Path("replayed/report.json").read_text())
    (before,) = [s for s in report["planners"]["flex"]["steps"] if s["step"] == step]
    (after,) = replayed["planners"]["flex"]["steps"]
    for name in ("step_s", "layout", "idle_share", "exchange_share", "peak_memory_bytes", "lower_bound_s"):
        assert after[name] == before[name]
    assert "0-3" in out or "0-1" in out  # the timeline's rows
    trace = json.loads((next(Path("replayed").glob("step-*")) / "trace.json").read_text())
    assert trace["traceEvents"]


def test_a_hand_written_plan_is_judged(files, capsys):
    Path("batch.txt").write_text("64\n16\n128\n32\n")
    plan = {
        "format": "flexsp-plan/1", "num_devices": 4,
        "micro_batches": [
            {"groups": [{"ranks": [0, 1], "sequences": [0, 3]}, {"ranks": [2], "sequences": [1]}]},
            {"groups": [{"ranks": [0, 1, 2, 3], "sequences": [2]}]},
        ],
    }  # fmt: skip
    Path("mine.json").write_text(json.dumps(plan))
    status, out, _ = run(capsys, "batch.txt", "--profile", "p.json", "--plan", "mine.json", "--planners", "flex,static")
    assert status == 0 and "mine" in out and "flex" in out and "<2,1> <4>" not in out
    plan["micro_batches"][1]["groups"][0]["sequences"] = [2, 1]
    Path("mine.json").write_text(json.dumps(plan))
    status, _, err = run(capsys, "batch.txt", "--profile", "p.json", "--plan", "mine.json")
    assert status == 2 and err.count("\n") == 1 and "mine.json: plan: " in err


def test_what_planning_took_elsewhere_is_not_held_against_a_replayed_plan(files, capsys):
    flexsp.plan([64, 16, 128, 32], profile(4)).save("mine.json")
    document = json.loads(Path("mine.json").read_text())
    Path("mine.json").write_text(json.dumps({**document, "solve_s": 1000.0}))
    Path("batch.txt").write_text("64\n16\n128\n32\n")
    status, out, _ = run(capsys, "batch.txt", "--profile", "p.json", "--plan", "mine.json", "--output", "out")
    assert status == 0 and "Planning a batch takes longer" not in out and "1e+03" not in out
    replayed = json.loads(Path("out/report.json").read_text())["planners"]["mine"]
    assert replayed["median_solve_s"] is replayed["steps"][0]["solve_s"] is None


def test_a_replayed_plan_takes_no_planners_place(files, capsys):
    plan = flexsp.plan([64, 16, 128, 32], profile(4))
    plan.save("static.json")
    Path("batch.txt").write_text("64\n16\n128\n32\n")
    status, _, err = run(capsys, "batch.txt", "--profile", "p.json", "--plan", "static.json")
    assert status == 2 and "--plan: 'static' is the name of two plans, or of a planner that runs too" in err


def test_the_context_limit_of_a_replay_decides_the_baselines_degree(files, capsys):
    flexsp.plan([64, 16, 128, 32], profile(4)).save("mine.json")
    Path("batch.txt").write_text("64\n16\n128\n32\n")
    flags = ("batch.txt", "--profile", "p.json", "--plan", "mine.json", "--output", "out")
    degrees = []
    for limit in ((), ("--max-length", "300")):
        assert run(capsys, *flags, *limit)[0] == 0
        degrees.append(json.loads(Path("out/report.json").read_text())["static_sp_degree"])
    assert degrees == [2, 4]


def test_sweeps_compare_corpora_limits_and_devices(files, capsys):
    Path("short.txt").write_text("".join(f"{length}\n" for length in DOCUMENTS if length < 100))
    flags = ("docs.txt", "short.txt", *SMALL[1:], "--max-length", "100,200", "--overlong", "split")
    status, out, err = run(capsys, *flags, "--num-devices", "1,4", "--output", "out")
    assert status == 0
    cases = json.loads(Path("out/report.json").read_text())["cases"]
    assert {(c["corpus"], c["max_length"], c["num_devices"]) for c in cases} == {
        (corpus, limit, devices) for corpus in ("docs", "short") for limit, devices in ((100, 1), (100, 4), (200, 4))
    } - ({(c, 100, 1) for c in ("docs", "short")} if "num_devices=1: " in err else set())
    assert "max_length=200, num_devices=1" in err  # one device does not hold 200 tokens, and that is said
    assert "speedup over static, all cases" in out
    assert len(list(Path("out").glob("*/step-*"))) == len(cases)


def test_planners_can_be_all_and_a_missing_solver_is_said(files, capsys):
    status, out, _ = run(capsys, *SMALL[:-1], "1", "--planners", "all", "--time-limit-s", "2")
    assert status == 0
    for name in COMPARED:
        assert f"{name} " in out
    (head,) = [line for line in out.splitlines() if "planner" in line and "degrees" in line]
    assert head.split() == ["planner", "step", "s", "speedup", "plan", "exch", "idle", "micro", "GiB", "degrees"]


WIDE = {"median_solve_s": 0.345, "speedup": 12.34, "micro_batches": 123.4, "peak_memory_bytes": 2.0**37 - 1,
        "tokens_by_degree": {1: 0.3, 8: 0.3, 64: 0.4}, "process_groups": 123}  # fmt: skip


def test_six_planners_fit_into_the_80_columns_of_a_pipe(capsys):
    case = make_case("docs", np.array(DOCUMENTS), profile(4), batch_size=None)
    done = [
        Done(case=0, planner=name, step=0, plan=plan, figures=step_figures(0, plan, case.lengths, case.profile))
        for name in COMPARED
        for plan in [flexsp.plan(case.lengths, case.profile, "static")]
    ]
    figures = case_figures(case, done, COMPARED)
    wide = {
        name: replace(each, **WIDE, exchange_share=0.123, idle_share=0.123) for name, each in figures.planners.items()
    }
    show_case(replace(figures, planners=wide), Console(width=80))
    lines = capsys.readouterr().out.splitlines()
    (head,) = [line for line in lines if "planner" in line and "degrees" in line]
    assert "speedup" in head.split() and "micro" in head.split() and len(head) <= 80
    rows = [line for line in lines if line.split()[:1] and line.split()[0] in COMPARED and "345 ms" in line]
    assert len(rows) == len(COMPARED) and max(map(len, rows)) <= 80
    assert all("12.34" in row and "12.3%" in row and "128.0" in row and row.rstrip().endswith(")") for row in rows)


def test_what_is_assumed_is_said_once_for_all_numbers_of_devices(files, capsys):
    status, _, err = run(capsys, *SMALL, "--max-length", "50,90", "--overlong", "drop", "--num-devices", "3,4")
    assert status == 0, err
    assert err.count("docs: 8 sequences exceed max_length=90: dropped") == 1 and err.count("for 3 devices from") == 1


def test_a_replayed_plan_is_called_what_its_file_is_without_plan(files, capsys):
    Path("batch.txt").write_text("64\n16\n128\n32\n")
    for name in ("flex", "static"):
        flexsp.plan([64, 16, 128, 32], profile(4), name).save(f"{name}.plan.json")
    flags = ("batch.txt", "--profile", "p.json", "--plan", "flex.plan.json", "static.plan.json", "--output", "out")
    for planners, called in (((), "flex"), (("--planners", "flex"), "flex.plan")):
        assert run(capsys, *flags, *planners)[0] == 0
        names = list(json.loads(Path("out/report.json").read_text())["planners"])
        assert names[:2] == [called, "static.plan"] and "static" in names


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch-size", "0"], "--batch-size=0 must be at least 1"),
        (["--iterations", "-1"], "--iterations=-1 must be at least 1"),
        (["--batch-size", "49"], "batch_size=49 is above the 48 sequences of docs"),
        (["--max-length", "64"], "docs[2]: length=300 exceeds max_length=64, as do 8 of 48"),
        (["--max-length", "12q"], "--max-length='12q' must be a positive number of tokens"),
        (["--max-length", "1K"], "max_length=1024 tokens fit into no group"),
        (["--num-devices", "two"], "--num-devices='two' must be positive integers"),
        (["--planners", "best"], "planner='best' is unknown; choose one of"),
        (["--sp-degree", "3"], "sp_degree=3 must be one of sp_degrees=[1, 2, 4]"),
        (["--policy", "recompute"], "policy='recompute' is not in the profile's policies (none)"),
        (["--plan", "p.json"], "--batch-size=12 does not go with --plan"),
        (["--time-limit-s", "-1"], "--time-limit-s=-1.0 must be above 0"),
        (["--num-devices", "4,4"], "--num-devices=[4, 4] has one twice"),
        (["--num-devices", "100000000"], "--num-devices='100000000' must be positive integers up to 131,072"),
        (["--iterations", "100000000"], "sequences; lower one"),
        (["--planners", "slow_planners:os"], "planner='slow_planners:os' is a module; name a function"),
        (["--output", "docs.txt/report"], "--output=docs.txt/report: cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_status_2(files, capsys, flags, message):
    status, out, err = run(capsys, *SMALL, *flags)
    assert (status, out) == (2, "")
    assert err.startswith("flexsp simulate: ") and err.count("\n") == 1 and message in err


def test_a_length_of_a_slip_of_the_keyboard_is_no_million_gigabytes_of_pieces(files, capsys):
    Path("docs.txt").write_text("10\n1000000000000000\n20\n")
    status, _, err = run(capsys, *SMALL, "--max-length", "50", "--overlong", "split")
    assert status == 2 and err.count("\n") == 1
    assert "docs[1]: length=1000000000000000 is 20,000,000,000,000 pieces of max_length=50" in err


def test_policies_are_left_out_with_a_notice_or_taken_for_all(files, capsys):
    policies = {"recompute": {"activation_bytes_per_token": 5, "compute_factor": 1.3}}
    document = profile(4).to_json()
    document["memory"]["policies"] = policies
    flexsp.Profile.from_json(document).save("p.json")
    _, _, err = run(capsys, *SMALL)
    assert "policies recompute of the profile are left out; --policy takes one" in err
    _, out, err = run(capsys, *SMALL, "--policy", "recompute", "--output", "out")
    assert err == "" and "test, recompute" in out
    assert json.loads(Path("out/report.json").read_text())["static_sp_degree"] == 2  # half the bytes, half the degree


@pytest.fixture
def with_policy(files):
    """A profile of which a device holds 100 tokens, and 200 under its policy."""
    policies = {"recompute": {"activation_bytes_per_token": 5, "compute_factor": 1.05}}
    document = profile(4).to_json()
    document["memory"]["policies"] = policies
    flexsp.Profile.from_json(document).save("p.json")
    return flexsp.Profile.load("p.json")


@pytest.mark.parametrize("lengths", [[600, 500, 30, 20], [5] * 100])
@pytest.mark.parametrize("flags", [(), ("--policy", "recompute"), ("--policy", "choose")])
def test_a_plan_with_a_policy_is_judged_with_the_profile_as_it_is(with_policy, capsys, lengths, flags):
    Path("batch.txt").write_text("".join(f"{length}\n" for length in lengths))
    plan = flexsp.plan(lengths, with_policy)
    assert "recompute" in {micro_batch.policy for micro_batch in plan.micro_batches}  # else this test shows nothing
    plan.save("mine.json")
    assert main(["check", "batch.txt", "p.json", "mine.json"]) == 0
    status, _, err = run(capsys, "batch.txt", "--profile", "p.json", "--plan", "mine.json", "--output", "o", *flags)
    if flags == ("--policy", "choose") and max(lengths) > 400:  # static chooses none, and holds 400 tokens
        assert status == 2 and "max_length=600 tokens fit into no group" in err
        return
    assert status == 0, err
    (step,) = json.loads(Path("o/report.json").read_text())["planners"]["mine"]["steps"]
    assert step["step_s"] == pytest.approx(plan.predicted_s)
    if not flags:
        assert ("use policy 'recompute', without which" if max(lengths) > 400 else "use no policy;") in err


def test_plans_made_under_a_policy_name_it_and_are_legal_for_the_profile_as_it_is(with_policy, capsys):
    assert run(capsys, *SMALL, "--policy", "recompute", "--output", "out")[0] == 0
    (folder,) = Path("out").glob("step-*")
    batch, plan = str(folder / "lengths.txt"), str(folder / "flex.plan.json")
    assert {m.policy for m in flexsp.Plan.load(plan).micro_batches} == {"recompute"}
    assert main(["check", batch, "p.json", plan]) == 0
    report = json.loads(Path("out/report.json").read_text())
    (before,) = [s for s in report["planners"]["flex"]["steps"] if f"step-{s['step']}" == folder.name]
    for flags in ((), ("--policy", "recompute")):
        assert run(capsys, batch, "--profile", "p.json", "--plan", plan, "--output", "again", *flags)[0] == 0
        (after,) = json.loads(Path("again/report.json").read_text())["planners"]["flex"]["steps"]
        assert after["step_s"] == pytest.approx(before["step_s"]) and after["layout"] == before["layout"]


SLOW = """
import time, flexsp
def planner(lengths, profile):
    open("called", "a").write("x")
    time.sleep(0.3)
    return flexsp.plan(lengths, profile)
"""


def test_interrupt_keeps_what_is_done(files):
    Path("slow.py").write_text(SLOW)
    flags = [*SMALL[:-1], "60", "--planners", "slow:planner", "--workers", "1", "--output", "out"]
    child = subprocess.Popen(
        [sys.executable, "-m", "flexsp", "simulate", *flags],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(files)},
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not (Path("called").exists() and Path("called").stat().st_size >= 5) and time.monotonic() < deadline:
            time.sleep(0.05)
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    finally:
        child.kill()
    assert child.returncode == 130 and "Traceback" not in err, err
    report = json.loads(Path("out/report.json").read_text())
    done = report["iterations"]
    assert 3 <= done < 60 and f"what follows is of the {done} steps done" in err
    assert "slow:planner" in out and len(report["planners"]["static"]["steps"]) == done


def test_it_needs_no_torch(files):
    code = (
        "import sys; sys.modules['torch'] = None; from flexsp.cli.main import main; "
        "sys.exit(main(['simulate', *sys.argv[1:]]))"
    )
    flags = [*SMALL[:-1], "1", "--output", "out", "--workers", "1"]
    assert subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, timeout=120).returncode == 0
