"""The parts of benchmarks/paper.py on small inputs, and the committed page against the committed results."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flexsp.plans import Group, MicroBatch, Plan
from flexsp.profile import Profile
from flexsp.simulate import runs
from profiles import profile

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import paper
import paper_baselines as baselines
import paper_claims as claims
import paper_measure
import paper_page
from paper_ablation import token_error
from paper_cases import PROFILES, K, Settings, model_profile, with_fewer_activations

pytest.importorskip("matplotlib")
pytest.importorskip("ortools")

ROOT = Path(__file__).parents[1]
TINY = Settings(
    models=("7b",), batch_size=8, iterations=2, sweep_iterations=1, large_iterations=1, devices=(16, 32, 128),
    sweep_contexts_k=(64, 512), milp_batches=1, milp_limit_s=0.05, drawn=2000,
)  # fmt: skip


def plan_of(*degrees: tuple[int, ...]) -> Plan:
    groups = [tuple(Group(ranks=tuple(range(d)), sequences=(0,)) for d in own) for own in degrees]
    return Plan(num_devices=64, micro_batches=tuple(MicroBatch(groups=own) for own in groups))


def serially(cases: Any, planners: Any, iterations: int, *, options: Any = None, workers: Any = None) -> Iterator[Any]:
    """`simulate` without processes."""
    for c, case in enumerate(cases):
        for step in range(iterations):
            for job in runs.jobs(case, planners, options or {}):
                yield runs._plan_one(c, case.profile, case.batch(step), job, step)


# ---- cases


def test_profiles_of_the_published_limits_are_the_published_ones():
    for model in ("7b", "13b", "30b"):
        for context_k, suffix in ((192, ""), (384, "-384k")):
            published = Profile.load(PROFILES / f"gpt-{model}-64xa100{suffix}.json")
            made = model_profile(model, context_k)
            assert (made.name, made.memory, made.compute, made.all_to_all) == (
                published.name, published.memory, published.compute, published.all_to_all
            )  # fmt: skip


def test_model_states_follow_the_line_of_the_learned_positions():
    states = [model_profile("7b", k).memory.model_state_bytes for k in (64, 192, 320, 384)]
    assert states[2] - states[1] == pytest.approx(2 * (states[3] - states[2]))
    assert states[1] - states[0] == pytest.approx(states[2] - states[1])


def test_sixteen_devices_hold_128k_only_with_fewer_activations():
    sixteen = model_profile("7b", 128).for_devices(16)
    assert sixteen.capacity_tokens(16) < 128 * K < with_fewer_activations(sixteen).capacity_tokens(16)


# ---- the published baselines


def test_published_baselines_fill_nine_tenths_of_a_group():
    two = profile(2)  # a rank holds 100 tokens
    assert baselines.micro_batches(np.array([80, 10, 11]), two, 1) == [[[0, 1], [2]]]
    assert baselines.micro_batches(np.array([100, 10]), two, 1) == [[[0], [1]]]  # as much as the longest needs


def test_a_group_that_would_be_empty_takes_a_sequence_of_the_last_one_that_has_several():
    assert baselines.micro_batches(np.array([40, 30, 20]), profile(4), 1) == [[[2], [0], [1], []]]


def test_the_last_micro_batch_is_evened_out():
    groups = [[0, 1, 2, 3], [4]]
    baselines._even_out(groups, np.array([40, 10, 10, 10, 10]), 100)
    assert groups == [[1, 2, 3], [4, 0]]  # 80 tokens: the second group takes until it has 40


def test_published_baselines_take_what_their_groups_take():
    four, lengths = profile(4), np.array([300, 90, 40, 40, 40, 5])
    degree = 4
    rounds = baselines.micro_batches(lengths, four, degree)
    assert sorted(i for groups in rounds for group in groups for i in group) == list(range(6))
    expected = sum(four.compute.fixed_s + four.group_s(degree, lengths[groups[0]].tolist()) for groups in rounds)
    assert baselines.static_s(lengths, four) == pytest.approx(expected)
    assert baselines.adaptive(lengths, four) == (pytest.approx(expected), 4)  # 300 tokens fit no lower degree


# ---- layouts, bucketing


@pytest.mark.parametrize(
    ("degrees", "text"),
    [
        ([(32, 16, 8, 8)], "<32, 16, 8x2>"),
        ([(8,) * 7 + (4, 4), (1,) * 64], "<8x7, 4x2> <1x64>"),
        ([(64,)] * 5, "<64> x5"),
        ([(8,) * 8, (8,) * 8, (64,)], "<8x8> x2 <64>"),
    ],
)
def test_layouts_are_written_as_in_the_paper(degrees, text):
    assert paper_measure.layout(plan_of(*degrees)) == text


def test_the_papers_layouts_use_64_devices():
    for case in claims.CASES:
        for layout in case.layouts.values():
            for micro_batch in layout.replace("> x", ">x").split("<")[1:]:
                parts = micro_batch.split(">")[0].split(", ")
                assert sum(int(np.prod([int(n) for n in part.split("x")])) for part in parts) == 64
    assert sum(claims.ASSIGNED.values()) == claims.BATCH_SIZE


def test_dp_buckets_err_less_than_naive_ones_and_not_at_all_where_there_are_enough():
    published = model_profile("7b", 192)
    lengths = np.random.default_rng(0).lognormal(6.5, 1.5, 200).astype(np.int64) + 1
    assert 0 < token_error(lengths, published, "dp") < token_error(lengths, published, "naive")
    assert token_error(np.arange(1, 17) * 100, published, "dp") == 0


# ---- the whole


def test_a_small_run_writes_results_page_and_pictures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paper_measure, "simulate", serially)
    monkeypatch.setattr(paper, "QUICK", TINY)
    assert paper.main(["--quick", "--output", str(tmp_path)]) == 0
    results, page = json.loads((tmp_path / "paper.json").read_text()), (tmp_path / "paper.md").read_text()
    assert len(results["cells"]) == 6 and len(results["ablation"]) == 14 and len(results["bucketing"]) == 6
    assert [each["value"] for each in results["scaling"]["misfits"]] == [16, 512]
    assert "64 devices, 512K, 4.70 MB" in page and "fit into no group" in page
    pictures = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert pictures == [f"paper_{name}.png" for name in ("ablation", "assigned", "scaling", "speedups")]
    assert all(f"figures/{name}" in page for name in pictures)
    before = page
    assert paper.main(["--render", "--output", str(tmp_path)]) == 0 and (tmp_path / "paper.md").read_text() == before
    assert str(tmp_path / "paper.md") in capsys.readouterr().out


def test_a_file_of_lengths_replaces_the_corpora(tmp_path, monkeypatch):
    monkeypatch.setattr(paper_measure, "simulate", serially)
    monkeypatch.setattr(paper, "QUICK", TINY)
    path = tmp_path / "mine.txt"
    path.write_text("\n".join(str(n) for n in [150_000, 40_000, *range(100, 3000, 100)]))
    assert paper.main(["--lengths", str(path), "--quick", "--output", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "paper.md").read_text()
    assert "the file mine.txt" in page and "no corpus of the paper" in page and str(tmp_path) not in page


def test_a_wrong_file_of_lengths_is_one_line(tmp_path, capsys):
    assert paper.main(["--lengths", str(tmp_path / "none.txt"), "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("paper: ") and not (tmp_path / "out").exists()


def test_the_committed_page_says_what_the_committed_results_say():
    results = json.loads((ROOT / "benchmarks" / "results" / "paper.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    assert paper_page.page(results) == page
    assert max(len(line) for line in page.splitlines() if line[0:1] not in ("|", "")) <= paper_page.WIDTH
    assert all((ROOT / "docs" / "figures" / f"paper_{n}.png").is_file() for n in ("ablation", "assigned", "scaling"))
