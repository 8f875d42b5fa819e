"""`flexsp lengths` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest

from flexsp.cli.main import main
from flexsp.distributions import find, names
from flexsp.simulate.pictures.lengths import draw


@pytest.fixture
def shown(tmp_path, capsys, monkeypatch):
    """`shown(*arguments)`: exit status, standard output and standard error of `flexsp lengths`, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")

    def show(*arguments):
        return (main(["lengths", *map(str, arguments)]), *capsys.readouterr())

    return show


@pytest.fixture
def ten(tmp_path):
    """Lengths of which one in ten holds nearly all tokens."""
    (tmp_path / "ten.txt").write_text("\n".join(map(str, [100] * 8 + [1000, 100_000])))
    return "ten.txt"


def test_figures_by_hand(shown, ten):
    status, out, err = shown(ten, "--max-length", "4K")
    assert (status, err) == (0, "")
    assert out.startswith("ten.txt\n10 sequences, 101,800 tokens, on average 10,180\n")
    lines = out.splitlines()
    cells = [line.split() for line in lines]
    assert ["100", "100", "100", "100", "1,000", *["100,000"] * 4] in cells
    assert ["128", "8", "80.0", "%", "0.79", "%", "<0.001", "%"] == cells[lines.index(next(
        line for line in lines if line.split()[:2] == ["128", "8"]))][:8]  # fmt: skip
    last = next(each for each in cells if each[:3] == ["64K", "-", "128K"])
    assert last[3:10] == ["1", "10.0", "%", "98.2", "%", "100.0", "%"]
    said = " ".join(out.split())
    assert "longer than 4K: 1 sequence (10.0 %) with 100,000 tokens (98.2 %); cut there, it loses 95,904" in said


def test_a_limit_that_nothing_exceeds_is_said(shown, ten):
    assert "none is longer than 192K" in shown(ten, "--max-length", "192K")[1]


def test_a_bar_grows_with_the_logarithm_and_one_sequence_is_seen(shown, ten):
    bars = [line.count("█") for line in shown(ten)[1].splitlines() if line.strip()[-1:] in "█%" and " % " in line]
    assert max(bars) == bars[0] == 18
    assert bars[-1] == 1


def test_a_distribution_is_drawn_with_its_seed(shown):
    first = shown("wikipedia", "--count", 1000, "--seed", 7)[1]
    drawn = find("wikipedia").draw(1000, 7)
    assert f"1,000 sequences, {drawn.sum():,} tokens" in first
    assert "drawn with seed 7 (measured)" in first
    assert first == shown("wikipedia", "--count", 1000, "--seed", 7)[1]
    assert first != shown("wikipedia", "--count", 1000)[1]
    assert "100,000 sequences" in shown("wikipedia")[1]


def test_json_holds_all_that_is_printed(shown, tmp_path):
    shown("github", "--count", 500, "--max-length", "64K", "--json", "out/g.json")
    document = json.loads((tmp_path / "out" / "g.json").read_text())
    drawn = find("github").draw(500, 0)
    assert document["format"] == "flexsp-lengths/1"
    assert (document["sequences"], document["tokens"]) == (500, drawn.sum())
    assert sum(band["tokens"] for band in document["bands"]) == drawn.sum()
    assert document["quantiles_tokens"]["1"] == drawn.max()
    assert document["over_max_length"]["tokens"] == drawn[drawn > 65536].sum()
    assert document["drawn"] == {"seed": 0, "kind": "published", "unit": find("github").unit}


def test_a_column_of_rows_is_read(shown, tmp_path):
    (tmp_path / "r.jsonl").write_text('{"n": 5, "ids": [1, 2]}\n{"n": 7, "ids": [1]}\n')
    assert "2 sequences, 12 tokens, on average 6" in shown("r.jsonl", "--column", "n")[1]
    assert "2 sequences, 3 tokens, on average 2" in shown("r.jsonl", "--column", "ids")[1]


def test_plan_and_check_take_a_column_too(tmp_path, capsys):
    from profiles import profile_json

    (tmp_path / "r.jsonl").write_text('{"n": 5, "length": 9}\n{"n": 7, "length": 9}\n')
    (tmp_path / "p.json").write_text(json.dumps(profile_json()))
    rows, profile, plan = (str(tmp_path / name) for name in ("r.jsonl", "p.json", "plan.json"))
    assert main(["plan", rows, "--column", "n", "--profile", profile, "--output", plan]) == 0
    assert "2 sequences, 12 tokens" in capsys.readouterr().out
    assert main(["check", rows, profile, plan, "--column", "n"]) == 0
    assert main(["check", rows, profile, plan]) == 1  # the plan is for other lengths


def test_the_list_names_all_with_kind_and_source(shown):
    status, out, err = shown("--list")
    assert (status, err) == (0, "")
    said = " ".join(out.split())
    for name in names():
        distribution = find(name)
        assert f"{name} {distribution.kind} {int(distribution.quantile(0.5)):,}" in said
        assert f"{distribution.tokens[-1]:,}" in said
        for text in (distribution.description, distribution.unit):
            assert text in said
        # wrapped lines may break a path at its slashes
        assert "".join(distribution.source.split()) in "".join(out.split())


@pytest.mark.parametrize(
    "arguments", [["--list"], ["pile", "--count", 300_000, "--max-length", "192K"], ["source-code"]]
)
def test_output_stays_within_the_width_of_a_pipe(shown, arguments):
    _, out, _ = shown(*arguments)
    assert max(map(len, out.splitlines())) <= 80
    assert "…" not in out


def test_bars_are_ascii_where_the_terminal_is():
    ran = subprocess.run(
        [sys.executable, "-m", "flexsp", "lengths", "pile", "--count", "50"],
        env={"PYTHONIOENCODING": "ascii", "PATH": ""}, capture_output=True, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (0, b"")
    assert b"###" in ran.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there are no LENGTHS; give a file or a distribution, or --list"),
        (["ten.txt", "--list"], "--list takes no LENGTHS='ten.txt'"),
        (["ten.txt", "--count", 5], "--count=5 is for a distribution; ten.txt is read whole"),
        (["ten.txt", "--seed", 5], "--seed=5 is for a distribution"),
        (["ten.txt", "--column", "n"], "ten.txt: column='n' must be left out"),
        (["ten.txt", "--max-length", "4M"], "--max-length='4M' must be a positive number of tokens"),
        (["ten.txt", "--plot", "p.jpg"], "p.jpg: suffix='.jpg' must be one of .png, .svg, .pdf"),
        (["ten.txt", "--plot", "ten.txt/p.png"], "p.png: cannot be written"),
        (["ten.txt", "--json", "ten.txt/p.json"], "p.json: cannot be written"),
        (["github", "--count", 0], "count=0 must be at least 1"),
        (["gitlab"], "lengths='gitlab' must be a file or a distribution"),
        (["none.parquet"], "none.parquet: cannot be read"),
    ],
)
def test_bad_input_exits_with_2_and_one_line(shown, ten, arguments, message):
    status, out, err = shown(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("flexsp lengths: ")
    assert message in err
    assert err.count("\n") == 1


# ---- the picture


def test_the_picture_is_a_png_of_a_size_to_read(shown, ten, tmp_path):
    assert shown(ten, "--plot", "new/p.PNG", "--max-length", "4K")[0] == 0
    data = (tmp_path / "new" / "p.PNG").read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    assert 1000 <= width <= 2500
    assert 500 <= height <= 1500


def test_the_picture_holds_every_sequence_and_token():
    lengths = find("source-code").draw(5000, 1)
    upper, lower = draw(lengths, "code $a$ [b]", 196_608).axes
    for bars in upper.patches:
        assert bars.get_data().values.sum() == pytest.approx(100)
    of_sequences = upper.patches[0].get_data()
    below = of_sequences.edges[1:] <= 1024 * (1 + 1e-9)
    assert of_sequences.values[below].sum() == pytest.approx(100 * (lengths <= 1024).mean())
    sequences, tokens, squares, limit = lower.lines
    for line in (sequences, tokens, squares):
        assert (np.diff(line.get_ydata()) >= 0).all()
        assert line.get_ydata()[-1] == pytest.approx(100)
    assert limit.get_xdata()[0] == 196_608
    assert len({(line.get_color(), line.get_linestyle()) for line in (sequences, tokens, squares)}) == 3


def test_legends_cover_nothing():
    figure = draw(find("github").draw(2000, 1), "github")
    figure.draw_without_rendering()
    for axes in figure.axes:
        assert axes.get_legend().get_window_extent().x0 >= axes.get_window_extent().x1


@pytest.mark.parametrize("lengths", [[1], [1, 1], [8], [7, 9], [1, 10**9], [2**40]])
@pytest.mark.parametrize("limit", [None, 1, 8, 10**12])
def test_extreme_lengths_are_drawn_without_a_warning(lengths, limit, tmp_path):
    draw(np.array(lengths), "few", limit).savefig(tmp_path / "p.svg")


def test_without_matplotlib_it_says_what_to_install(shown, ten, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    status, out, err = shown(ten, "--plot", "p.png")
    assert (status, out) == (2, "")
    assert "pip install 'flexsp[plot]'" in err
    assert not (tmp_path / "p.png").exists()


def test_neither_torch_nor_matplotlib_is_imported_without_a_picture():
    code = (
        "import sys; from flexsp.cli.main import main; assert main(['lengths', 'pile']) == 0; "
        "sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
