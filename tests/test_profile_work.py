"""How much `flexsp profile` computes: no high degree may take much longer than a low one."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from channel_pools import pool
from flexsp.estimate import ModelShape, model_shape
from flexsp.parallel import layouts_of
from flexsp.profiler import probe
from flexsp.profiler.layers import measure_layers
from flexsp.profiler.points import FULL_ROW, fit_points, held_out_mixes, row_tokens
from flexsp.profiler.probe import LEAST_REPEATS, MOST_REPEATS, more_repeats
from flexsp.profiler.work import planned_flops

SMALL = {
    "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 4096, "max_position_embeddings": 4096,
}  # fmt: skip
EIGHT_B = Path(__file__).parent.parent / "examples/models/llama-3-8b.json"


def test_a_row_costs_no_rank_more_attention_than_one_of_degree_1_or_is_short():
    for degree in (1, 2, 4, 8, 64, 1024):
        assert row_tokens(2048, degree) == min(2048 * degree, FULL_ROW)  # as on a CPU: filled
        row = row_tokens(32768, degree)
        assert row <= 32768 * degree
        assert row == FULL_ROW or row**2 / degree <= 1.001 * 32768**2
    assert row_tokens(32768, 64) == 8 * 32768


def test_no_point_and_no_held_out_row_is_longer():
    degrees = [1, 2, 4, 8, 16, 32, 64]
    mixes = [[(p.degree, p.lengths)] for p in fit_points(32768, degrees)] + held_out_mixes(32768, degrees, 64, 20)
    assert all(sum(lengths) <= row_tokens(32768, degree) for mix in mixes for degree, lengths in mix)


def test_long_steps_are_timed_once_a_round_and_short_ones_often():
    def repeats(seconds: float) -> int:
        taken: list[float] = []
        while more_repeats(taken):
            taken.append(seconds)
        return len(taken)

    assert [repeats(s) for s in (0.001, 0.3, 1.5, 3.0, 60.0)] == [MOST_REPEATS, LEAST_REPEATS, LEAST_REPEATS, 1, 1]


@pytest.mark.parametrize(
    ("world_size", "policies", "most"),
    [(1, (), 14e15), (1, ("selective", "full", "offload"), 38.5e15), (8, (), 34.5e15), (64, (), 50e15)],
)
def test_an_8b_model_is_measured_within_a_stated_number_of_flops_a_rank(world_size, policies, most):
    shape = model_shape(json.loads(EIGHT_B.read_text()))
    degrees = [1 << power for power in range(world_size.bit_length())]
    counted = planned_flops(shape, 32768, degrees, world_size, lambda degree: degree.bit_length(), policies)
    assert 0.9 * most < counted < most


def multiplied(degrees: list[int]) -> float:
    """FLOPs of matrix products on this rank while a profile is measured, each row as seldom as it may be."""
    with mock.patch.object(probe, "ENOUGH_S", 0.0), FlopCounterMode(display=False) as counter:
        measure_layers(
            LlamaConfig(**SMALL), pool(), sp_degrees=degrees, probe_tokens=256, device=torch.device("cpu")
        )  # fmt: skip
    return float(counter.get_total_flops())


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_what_is_counted_is_what_a_rank_computes(ranks, world_size, monkeypatch):
    """torch counts no attention in the kernels that rows use, so here flexsp does not either."""
    degrees = [1, 2][:world_size]
    of_ranks = ranks(world_size).run(multiplied, degrees, timeout_s=240.0)
    monkeypatch.setattr(ModelShape, "attention_flops_per_square", lambda shape: 0)
    config = LlamaConfig(**SMALL)
    shape = model_shape(config.to_dict())
    counted = planned_flops(shape, 256, degrees, world_size, lambda degree: len(layouts_of(config, degree)))
    if world_size == 1:
        assert of_ranks[0] == pytest.approx(counted, rel=0.01)
    else:  # counted is the busiest rank of every micro-batch
        assert 0.9 * counted < max(of_ranks) < 1.02 * counted
