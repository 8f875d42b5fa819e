"""benchmarks/card.py: what it makes of a measured profile."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from flexsp.estimate import load_model_shape
from flexsp.profiler.mixed import fill_from_estimate
from profiles import profile

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import card

CONFIG = {
    "model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 7,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512,
}  # fmt: skip


def test_rates_are_of_full_rows_of_degree_1_on_the_part_with_most_layers(tmp_path):
    (tmp_path / "m.json").write_text(json.dumps(CONFIG))
    shape = load_model_shape(tmp_path / "m.json")
    row = {"layers": 3, "head": 0.1, "degree": 1, "lengths": [100, 100], "micro_batches": 1, "seconds": 2.0}
    others = [{**row, **change} for change in ({"layers": 1}, {"degree": 2}, {"micro_batches": 4})]
    (found,) = card.achieved_tflops(shape, [row, *others])
    # by hand: 6 FLOPs a parameter of 3 layers and a head of 100 (8 where logits are made again), 7 h d a square
    layer = 4 * 64 * 64 + 3 * 64 * 128
    assert (found["length"], found["sequences"]) == (100, 2)
    linear = 200 * (3 * 6 * layer + 8 * 64 * 100)
    attention = 2 * 100**2 * 7 * 64 * 3
    assert found["tflops_per_s"] == pytest.approx((linear + attention) / 2.0 / 1e12, rel=0.02)


def test_only_what_was_measured_is_compared():
    measured = replace(profile(2), optimizer_s=0.5)
    estimate = replace(
        profile(8, compute={"quadratic_s": 2e-5, "linear_s": 2e-3, "fixed_s": 0.5}),
        optimizer_s=0.25, provenance={"fields": {"compute.fixed_s": "gathers"}},
    )  # fmt: skip
    found = card.coefficients(fill_from_estimate(measured, estimate), estimate)
    assert found["compute.linear_s"] == {"measured": 1e-3, "estimated": 2e-3}
    assert found["optimizer_s"] == {"measured": 0.5, "estimated": 0.25}
    assert "compute.fixed_s" not in found  # the estimate's: it would be compared with itself
    assert "memory.model_state_bytes" not in found and "all_to_all.bytes_per_token" not in found
    for by_degree in ("bandwidth_bytes_per_s", "latency_s"):
        assert {name for name in found if by_degree in name} == {f"all_to_all.{by_degree}.2"}
