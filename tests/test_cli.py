"""The commands as a user runs them, where torch is not installed."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from profiles import profile_json

NO_TORCH = (
    "import sys; sys.modules['torch'] = sys.modules['transformers'] = None; "
    "from flexsp.cli.main import main; sys.exit(main())"
)


def flexsp(*arguments, stdin=""):
    return subprocess.run(
        [sys.executable, "-c", NO_TORCH, *map(str, arguments)],
        input=stdin, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.fixture
def files(tmp_path):
    (tmp_path / "lengths.txt").write_text("\n".join(map(str, [390, 90, 60, 30, 30, 20, 10, 5])))
    (tmp_path / "profile.json").write_text(json.dumps(profile_json()))
    return tmp_path / "lengths.txt", tmp_path / "profile.json", tmp_path / "plan.json"


def one_line_error(result):
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.parametrize("planner", ["flex", "static", "batch-adaptive"])
def test_plan_prints_a_table_and_saves_what_check_accepts(files, planner):
    lengths, profile, plan = files
    made = flexsp("plan", lengths, "--profile", profile, "--planner", planner, "--output", plan)
    assert made.returncode == 0, made.stderr
    assert "8 sequences, 635 tokens on 4 devices" in made.stdout
    assert f"{planner}: predicted" in made.stdout
    assert "…" not in made.stdout  # nothing is cut off in the width of a pipe
    checked = flexsp("check", lengths, profile, plan)
    assert (checked.returncode, checked.stdout[:6]) == (0, "legal:")


ORDER = """
import sys, flexsp.cli.main, flexsp.cli.plan as command
order = []
load, plan = command.load_kernels, command.flexsp.plan
command.load_kernels = lambda: order.append("load") or load()
command.flexsp.plan = lambda *a, **k: order.append("plan") or plan(*a, **k)
assert flexsp.cli.main.main(sys.argv[1:]) == 0 and order == ["load", "plan"], order
"""


def test_the_time_that_planning_took_does_not_include_loading_the_kernels(files):
    lengths, profile, _ = files
    arguments = ["plan", lengths, "--profile", profile]
    done = subprocess.run([sys.executable, "-c", ORDER, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_plan_reads_standard_input(files):
    assert flexsp("plan", "-", "--profile", files[1], stdin="5\n7\n").returncode == 0
    assert "standard input:2" in one_line_error(flexsp("plan", "-", "--profile", files[1], stdin="5\nx\n"))


def test_one_is_not_said_to_be_several(files):
    lengths, profile, _ = files
    lengths.write_text("10\n10\n")
    shown = flexsp("plan", lengths, "--profile", profile, "--planner", "static", "--sp-degree", "4", "--explain", "0")
    assert "with 1 other, " in shown.stdout


def test_check_says_every_fault_and_exits_with_1(files):
    lengths, profile, plan = files
    flexsp("plan", lengths, "--profile", profile, "--output", plan)
    document = json.loads(plan.read_text())
    lost = document["micro_batches"][0]["groups"][0]["sequences"].pop()
    document["micro_batches"][-1]["groups"][0]["ranks"] = [1, 0]
    plan.write_text(json.dumps(document))
    checked = flexsp("check", lengths, profile, plan)
    assert checked.returncode == 1
    assert f"the first is {lost}" in checked.stdout
    assert "ranks [1, 0]" in checked.stdout


def test_a_plan_for_other_devices_is_checked_for_those(files):
    lengths, profile, plan = files
    lengths.write_text("90\n60\n30\n")
    flags = ("--num-devices", "2")
    profile.write_text(json.dumps(profile_json(memory={**profile_json()["memory"], "model_state_bytes": 100})))
    assert flexsp("plan", lengths, "--profile", profile, *flags, "--output", plan).returncode == 0
    checked = flexsp("check", lengths, profile, plan, *flags)
    assert (checked.returncode, checked.stdout[:6]) == (0, "legal:")
    without = flexsp("check", lengths, profile, plan)
    assert without.returncode == 1
    assert "num_devices=2 is not the profile's num_devices=4" in without.stdout
    assert "--num-devices 2" in without.stdout


def test_files_that_cannot_be_read_exit_with_2(files, tmp_path):
    lengths, profile, plan = files
    assert "plan.json: cannot be read" in one_line_error(flexsp("check", lengths, profile, plan))
    assert "nope.txt: cannot be read" in one_line_error(flexsp("plan", tmp_path / "nope.txt", "--profile", profile))
    other = tmp_path / "other.json"
    other.write_text('{"format": "y"}')
    assert "must be 'flexsp-profile/1'" in one_line_error(flexsp("check", lengths, other, plan))
    unknown = flexsp("plan", lengths, "--profile", profile, "--planner", "best")
    assert "planner='best' is unknown" in one_line_error(unknown)
    unwritable = flexsp("plan", lengths, "--profile", profile, "--output", lengths / "plan.json")
    assert "cannot be written" in one_line_error(unwritable)


def test_what_is_infeasible_is_said_on_one_line(files):
    error = one_line_error(flexsp("plan", "-", "--profile", files[1], stdin="5\n500\n"))
    assert "infeasible: lengths[1]=500 tokens fit into no group" in error


def test_training_without_torch_says_what_to_install(tmp_path):
    error = one_line_error(flexsp("train", tmp_path / "c.toml"))
    assert "pip install 'flexsp[train]'" in error


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "flexsp: the following arguments are required: COMMAND; see flexsp --help"),
        (["plan"], "flexsp plan: the following arguments are required: LENGTHS, --profile; see flexsp plan --help"),
        (["plan", "x", "--profile", "y", "--explain", "z"], "argument --explain: invalid int value: 'z'; see"),
        (["check", "a", "b", "c", "", "--x"], "flexsp: unrecognized arguments: '' --x; see flexsp --help"),
        (["show", "x" * 5000], "xxx: cannot be read (File name too long); give a JSON file"),
    ],
)
def test_wrong_flags_are_one_line_too(arguments, said):
    assert said in one_line_error(flexsp(*arguments))


@pytest.mark.parametrize("planner", ["flex", "static"])
def test_a_profile_without_costs_is_refused_in_the_words_of_the_simulator(files, planner):
    lengths, profile, _ = files
    profile.write_text(json.dumps(profile_json(compute={"quadratic_s": 0, "linear_s": 0, "fixed_s": 0})))
    error = one_line_error(flexsp("plan", lengths, "--profile", profile, "--planner", planner))
    assert "test: quadratic_s, linear_s and fixed_s are all 0; give a profile with costs" in error


@pytest.mark.parametrize("planner", ["json:loads", "os:getcwd"])
def test_a_planner_of_the_users_that_is_none_is_one_line(files, planner):
    lengths, profile, _ = files
    error = one_line_error(flexsp("plan", lengths, "--profile", profile, "--planner", planner))
    assert f"planner='{planner}' failed (TypeError" in error
