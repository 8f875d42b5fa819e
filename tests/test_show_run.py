"""`flexsp show` of a run: its summary, a table by mixes of degrees, a picture, and files that are no run."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from flexsp.cli.main import main
from flexsp.watch.picture import draw
from flexsp.watch.rows import read_run
from flexsp.watch.shapes import shapes


def row(step: int, **more) -> dict:
    return {
        "step": step, "loss": 3.0 - step / 2, "tokens": 100, "tokens_per_s": 200.0, "step_s": 4.0, "predicted_s": 2.0,
        "micro_batches": [[2], [1, 1]], "micro_batch_s": [1.0 + step, 2.0], "predicted_micro_batch_s": [1.0, 1.0],
        "micro_batch_idle_share": [0.0, 0.1 * (step + 1)], "idle_share": 0.1, "exchange_share": 0.3,
        "gather_share": 0.2, **more,
    }  # fmt: skip


@pytest.fixture
def shown(tmp_path, capsys):
    """`shown(rows, *arguments)`: status, standard output and standard error of `flexsp show` of a run's folder."""

    def show(rows, *arguments):
        text = "".join(json.dumps(each) + "\n" if isinstance(each, dict) else each for each in rows)
        (tmp_path / "metrics.jsonl").write_text(text)
        return (main(["show", str(tmp_path), *map(str, arguments)]), *capsys.readouterr())

    return show


def test_a_run_is_shown_by_its_mixes_of_degrees(shown):
    status, out, err = shown([row(0), row(1, loss=9.0), row(1), row(2), '{"step": 3, "los'])
    assert (status, err) == (0, "")
    assert "steps: 3 of 3" in out and "loss: 3.000 -> 2.000" in out
    cells = [line.split() for line in out.splitlines() if line.strip().startswith("<")]
    # <2>: 1 + 2 + 3 of 12 s; <1,1>: 2 + 2 + 2, idle for 0.1, 0.2 and 0.3 of them
    assert cells == [["<1,1>", "3", "50%", "2", "2.00", "20.0%"], ["<2>", "3", "50%", "2", "2.00", "0.0%"]]


def test_shapes_that_took_most_come_first_and_rows_without_times_are_left_out():
    made = shapes([row(0), row(4), {"step": 5, "loss": 1.0}])
    assert [(shape.degrees, shape.count, shape.seconds) for shape in made] == [("<2>", 2, 6.0), ("<1,1>", 2, 4.0)]
    assert made[0].ratio == 3.0
    assert shapes([]) == []


def test_a_picture_has_the_values_of_the_rows(shown, tmp_path):
    status, _, err = shown([row(0), row(1, eval_loss=2.75), row(2)], "--plot", tmp_path / "run.svg")
    assert (status, err) == (0, "") and (tmp_path / "run.svg").stat().st_size > 1000
    panels = draw(read_run(tmp_path), "a run").axes
    drawn = {axes.get_title("left"): [line.get_xydata().tolist() for line in axes.lines] for axes in panels}
    assert drawn["Loss"] == [[[0, 3.0], [1, 2.5], [2, 2.0]], [[1, 2.75]]]
    assert drawn["Speed"] == [[[0, 200.0], [1, 200.0], [2, 200.0]]]
    assert drawn["Measured and predicted"] == [[[0, 3.0], [1, 4.0], [2, 5.0]], [[0, 2.0], [1, 2.0], [2, 2.0]]]
    assert [line[0][1] for line in drawn["Where time went"]] == [0.1, 0.3, 0.2]


@pytest.mark.parametrize(
    ("rows", "arguments", "message"),
    [
        ([], [], "there is no row in it yet; wait for the first step"),
        (["[1, 2]\n"], [], "metrics.jsonl:1=[1, 2] must be a JSON object"),
        (['{"loss": 1.0}\n'], [], "metrics.jsonl:1: the field 'step' is missing"),
        ([row(3, loss="low")], [], "step 3: loss='low' must be a number; restore the row"),
        ([row(3, micro_batches=[["a"]])], [], "step 3: micro_batches='a' must be a number"),
        ([row(3, micro_batch_s=[1.0])], [], "must have an entry for each micro-batch alike"),
        ([row(3, micro_batch_s=5)], [], "step 3: micro_batch_s=5 must be a JSON list"),
        ([row(0)], ["--lengths", "1K"], "--lengths=1K is for profiles, and"),
        ([row(0)], ["--plot", "run.gif"], "suffix='.gif' must be one of .png, .svg, .pdf"),
    ],
)
def test_what_is_no_run_is_one_line_and_status_2(shown, rows, arguments, message):
    status, out, err = shown(rows, *arguments)
    assert (status, out) == (2, "")
    (line,) = err.splitlines()
    assert line.startswith("flexsp show: ") and message in line


def test_an_empty_folder_and_old_rows(tmp_path, shown, capsys):
    assert main(["show", str(tmp_path / "none.jsonl")]) == 2
    assert "none.jsonl: cannot be read (No such file or directory)" in capsys.readouterr().err
    status, out, err = shown([{"step": 0}])  # of another version
    assert (status, out.splitlines()[0], err) == (0, "steps: 1 of 1", "")


def test_showing_a_run_needs_no_torch(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row(0)))
    code = "import sys; from flexsp.cli.main import main; assert main(['show', sys.argv[1]]) == 0; "
    code += "import flexsp.watch.shares, flexsp.watch.tags, flexsp.estimate.flops; "
    code += "sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
