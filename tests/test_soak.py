"""benchmarks/soak.py: its rules find growth in made-up series, and a short soak holds few files and groups."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from soak import plans_of, prepare, series_of, watched
from soak_plot import draw
from soak_verdict import Series, communicator_bound, verdict

STEPS = 2000
MIB = 2**20


def made_up(bytes_per_step: float = 0.0, warm_up: float = 0.0, files_per_step: float = 0.0) -> Series:
    """A process of 300 MiB that jitters and has a peak at every tenth sample, as around a checkpoint."""
    noise, steps = random.Random(0), list(range(5, STEPS, 5))
    own = []
    for step in steps:
        jitter = noise.uniform(-2, 2) * MIB + (noise.uniform(0, 40) * MIB if step % 50 == 0 else 0)
        own.append(int(300 * MIB + jitter + bytes_per_step * step + warm_up * min(step, 400)))
    columns = {
        "rss_bytes": [each + 100 * MIB for each in own], "own_bytes": own,
        "open_files": [20 + int(files_per_step * step) + (step % 50 == 0) for step in steps],
        "threads": [8] * len(steps),
    }  # fmt: skip
    return Series(steps=steps, columns=columns)


@pytest.mark.parametrize(
    ("series", "holds"),
    [
        (made_up(), True),
        (made_up(warm_up=0.5 * MIB), True),  # what happens in the first quarter is warm-up
        (made_up(bytes_per_step=-0.01 * MIB), True),
        (made_up(bytes_per_step=0.001 * MIB), True),  # 0.3 % in 1,000 steps
        (made_up(bytes_per_step=0.005 * MIB), False),  # 5 MiB in 1,000 steps, jitter and peaks notwithstanding
        (made_up(files_per_step=0.002), False),  # four files in the whole run
    ],
)
def test_growth_is_found_and_noise_is_not_growth(series, holds):
    assert verdict({"rank 0": series}, STEPS)["rank 0"]["holds"] is holds


def test_the_slope_is_that_of_the_growth():
    found = verdict({"rank 0": made_up(bytes_per_step=0.1 * MIB)}, STEPS)["rank 0"]["own_bytes"]
    assert found["bytes_per_1000_steps"] == pytest.approx(100 * MIB, rel=0.02)
    assert found["low"] < found["share_per_1000_steps"] < found["high"]


def test_a_rank_that_was_not_watched_holds_no_rule():
    few = Series(steps=[600, 700], columns={key: [1, 1] for key in ("rss_bytes", "own_bytes", "open_files", "threads")})
    assert not verdict({"rank 0": few}, STEPS)["rank 0"]["holds"]


def test_the_bound_of_groups():
    assert [communicator_bound(n, [d for d in (1, 2, 4, 8) if d <= n]) for n in (1, 2, 4, 8)] == [1, 3, 7, 15]
    assert communicator_bound(4, (1, 2, 3, 4)) == 9  # 0-2 and 1-3 beside


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_short_soak(tmp_path):
    prepare(tmp_path)
    samples = list(watched(tmp_path, 150, interval_s=0.5))
    series = series_of(samples)
    ranks = [f"rank {rank}" for rank in range(4)]
    assert {*ranks, "planner", "torchrun"} <= set(series)
    judged = verdict({name: series[name] for name in ranks}, 150)
    for name in ranks:
        first, last = judged[name]["open_files"]
        assert last <= first, name
    plans = plans_of(tmp_path)
    assert plans["different_plans"] > 10 and plans["mixed_steps"] > 10 and plans["corrections"] > 100
    assert 0 < plans["communicators"] <= communicator_bound(4, (1, 2, 3, 4))
    result = {
        "steps": 150, "world_size": 4, "samples": samples, "processes": series, "communicators_bound": 9, **plans
    }  # fmt: skip
    draw(result, tmp_path / "soak.png")
    assert (tmp_path / "soak.png").stat().st_size > 10_000
