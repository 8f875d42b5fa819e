"""The fit, and a profile measured through the real executor."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from transformers import DeepseekV3Config, DiffLlamaConfig, Gemma4TextConfig

from channel_pools import pool
from equality_ranks import make_batch
from flexsp.parallel import GroupPool, forward_backward, prepare_model
from flexsp.parallel.kinds import NOTHING
from flexsp.parallel.needs import Attention
from flexsp.profile import Layout
from flexsp.profiler import load_or_measure, measure_profile, profile_path
from flexsp.profiler.make import exchange_bytes_per_token, exchange_columns
from flexsp.profiler.memory import memory_limit
from flexsp.profiler.splits import fastest, served
from flexsp.train.ranks import joined_ranks
from profiles import profile
from reference import build, small_config
from test_equality import plan

pytestmark = pytest.mark.alone


def test_exchanged_bytes_are_those_of_the_published_7b_profile():
    """2 MiB a token: 32 layers of 4 x 4096 half-precision numbers, forward and backward."""
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=32)
    assert exchange_bytes_per_token(config, torch.bfloat16) == 2097152
    # four KV heads are repeated to eight at degree 8: queries, twice eight heads of keys and values, and the output
    config = LlamaConfig(hidden_size=4096, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=4)
    assert exchange_columns(config, 8) == (4096 + 2 * 8 * 128, 4096)


DEEPSEEK = dict(
    n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, n_shared_experts=1, moe_intermediate_size=16,
    first_k_dense_replace=1, q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5,
)  # fmt: skip
SIZES = {key: value for key, value in small_config().to_dict().items() if key not in ("model_type", "head_dim")}
WIDE = {
    "llama": small_config(4, 4),
    "GQA": small_config(4, 2),
    "MQA, its KV head repeated": small_config(4, 1),
    "deepseek_v3, keys and values of another width than its head_dim": DeepseekV3Config(
        **{**SIZES, **DEEPSEEK, "num_key_value_heads": 4}
    ),
    "diffllama, two attentions a layer": DiffLlamaConfig(**SIZES),
}


def bytes_sent(config) -> int:
    """Of this rank, in a step of one sequence of 20 tokens at degree 2 in fp64."""
    model, groups = prepare_model(build(config, torch.float64)), pool()
    batch = make_batch([20], plan(2, [([0, 1], [0])]), seed=0, masked=0.0)
    before = groups.bytes_sent
    forward_backward(model, batch, groups)
    return groups.bytes_sent - before


@pytest.mark.parametrize("config", WIDE.values(), ids=WIDE.keys())
def test_what_is_counted_of_a_token_is_what_ranks_send(ranks, config):
    """Of what a token's exchanges carry half stays on its rank."""
    sent = sum(ranks(2).run(bytes_sent, config))
    columns = sum(exchange_columns(config, 2)) * config.num_hidden_layers
    assert sent == 20 * columns * 8 * 2 / 2
    if config.num_key_value_heads % 2 == 0:
        assert sent == 20 * exchange_bytes_per_token(config, torch.float64) / 2


def test_layers_that_differ_are_counted_one_by_one():
    """Of six layers of Gemma 4 the last has heads of 512 numbers, with as many KV heads as the others."""
    config = Gemma4TextConfig(num_hidden_layers=6, num_attention_heads=8, num_key_value_heads=2)
    numbers = (5 * 256 + 512) * (2 * 8 + 2 * 2)
    assert exchange_bytes_per_token(config, torch.bfloat16) == 2 * 2 * numbers
    assert exchange_columns(config, 2) == (-(-(5 * 256 + 512) * 12 // 6), -(-(5 * 256 + 512) * 8 // 6))


def measured(folder: str) -> tuple[dict, dict]:
    model = prepare_model(build(small_config(), torch.float32))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    world_size = dist.get_world_size()
    degrees = [d for d in (1, 2, 4) if d <= world_size]
    calls = []

    def measure():
        calls.append(1)
        return measure_profile(model, pool(), sp_degrees=degrees, max_tokens_per_rank=64)

    path = profile_path(folder, model, {"sp_degrees": degrees})
    first, second = (load_or_measure(path, measure, pool().control) for _ in range(2))
    assert len(calls) == 1  # the second time it is read
    assert first == second
    for name, p in model.named_parameters():
        assert p.grad is None
        assert torch.equal(p, before[name])
    with pytest.raises(ValueError, match="sp_degree=8 is not between 1 and world_size="):
        measure_profile(model, pool(), sp_degrees=[1, 8], max_tokens_per_rank=64)
    return first.to_json(), {"path": str(path)}


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_measured_profile_is_complete_saved_and_reused(ranks, world_size, tmp_path):
    results = ranks(world_size).run(measured, str(tmp_path), timeout_s=120.0)
    document = results[0][0]
    assert all(result[0] == document for result in results)
    assert document["num_devices"] == world_size
    assert document["sp_degrees"] == [d for d in (1, 2, 4) if d <= world_size]
    assert document["compute"]["fixed_s"] > 0
    memory = document["memory"]
    assert (memory["memory_bytes"] - memory["model_state_bytes"]) / memory["activation_bytes_per_token"] == 64
    sharded = world_size * (memory["model_state_bytes"] - memory["unsharded_bytes"])
    numbers = sum(p.numel() for p in build(small_config(), torch.float32).parameters())
    assert sharded == pytest.approx(16 * numbers, rel=0.02)  # weight, gradient and two moments, in fp32
    assert document["optimizer_s"] > 0
    fit, points = document["provenance"]["fit"], document["provenance"]["points"]
    assert fit["held_out"] == 6
    assert fit["points"] == len(points)
    assert {point["degree"] for point in points} == set(document["sp_degrees"])
    places = {1: set(), 2: {"0-1", "2-3"}, 4: {"0-3"}} if world_size == 4 else {2: {"0-1"}}
    splits = {int(d): set(by) for d, by in document["provenance"]["splits_s"].items()}
    assert splits == {d: by for d, by in {2: {"2x1", "1x2"}, 4: {"4x1", "2x2", "1x4"}}.items() if d <= world_size}
    rings = {int(d) for d in document.get("layouts", {})}  # whichever was faster here
    assert {int(d): set(by) for d, by in document["provenance"]["exchange_bytes_per_s"].items()} == {
        d: place for d, place in places.items() if place and d not in rings
    }
    assert document["provenance"]["source"] == "measured"
    assert "max_tokens_per_rank=64" in document["provenance"]["memory_limit"]


def test_another_model_or_setting_has_another_file(ranks, tmp_path):
    ranks(2).run(keys_differ, str(tmp_path))


def test_a_measured_profile_outlives_a_loss_of_power(tmp_path, monkeypatch):
    """What took minutes is written once, and waited for."""
    seen: list[str] = []
    monkeypatch.setattr(os, "fsync", lambda file: seen.append(Path(os.readlink(f"/proc/self/fd/{file}")).name))
    with joined_ranks(10):
        load_or_measure(tmp_path / "p.json", lambda: profile(1), GroupPool().control)
    assert len(seen) == 2 and seen[0].startswith(".p.json.") and seen[1] == tmp_path.name


def keys_differ(folder: str) -> None:
    one, other = (prepare_model(build(small_config(heads), torch.float32)) for heads in (2, 4))
    paths = {profile_path(folder, one, {}), profile_path(folder, other, {}), profile_path(folder, one, {"x": 1})}
    assert len(paths) == 3


def measured_with_the_memory_of_the_process() -> tuple[float, float]:
    model = prepare_model(build(small_config(), torch.float32))
    found = measure_profile(model, pool(), sp_degrees=[1], memory_fraction=0.5)
    with pytest.raises(ValueError, match=r"memory_bytes=.* is not above model_state_bytes=.*: nothing is left"):
        measure_profile(model, pool(), sp_degrees=[1], memory_fraction=1e-3)
    return found.memory.memory_bytes + found.provenance["margin_bytes"], memory_limit(torch.device("cpu"), 0.5, 2)[0]


@pytest.mark.slow
def test_without_an_artificial_limit_the_memory_is_that_of_the_process(ranks):
    for taken, limit in ranks(2).run(measured_with_the_memory_of_the_process, timeout_s=120.0):
        assert taken == pytest.approx(limit, rel=1e-6)


def test_the_fastest_split_is_taken_and_ulysses_where_it_is_as_fast():
    candidates = [Layout(ulysses=4, ring=1), Layout(ulysses=2, ring=2), Layout(ulysses=1, ring=4)]
    assert fastest(candidates, {"4x1": 1.0, "2x2": 0.9, "1x4": 0.95}) == candidates[1]
    assert fastest(candidates, {"4x1": 1.0, "2x2": 0.99, "1x4": 0.98}) == candidates[0]
    assert fastest(candidates[2:], {}) == candidates[2]  # there was no choice


def with_dropout_in_attention() -> dict:
    model = prepare_model(build(small_config(attention_dropout=0.1), torch.float32), exact=False)
    return measure_profile(model, pool(), sp_degrees=[1, 2], max_tokens_per_rank=64).to_json()


@pytest.mark.slow
def test_splits_that_no_kernel_serves_are_not_measured(ranks):
    """Attention with dropout runs in no ring."""
    document = ranks(2).run(with_dropout_in_attention, timeout_s=120.0)[0]
    assert document["sp_degrees"] == [1, 2] and not document.get("layouts")


def test_a_degree_that_no_kernel_serves_is_named():
    attention = Attention.of(small_config(), "cpu", torch.float32, None, replace(NOTHING, dropout=True))
    both = [Layout(ulysses=2, ring=1), Layout(ulysses=1, ring=2)]
    assert served(attention, both, 2) == both[:1]
    with pytest.raises(ValueError, match=r"^sp_degree=2 cannot run: .*dropout.*; or leave the degree out of planner"):
        served(attention, both[1:], 2)


def heads_that_no_degree_divides() -> dict:
    model = prepare_model(build(small_config(3, 3), torch.float32))
    found = measure_profile(model, pool(), sp_degrees=[1, 2], max_tokens_per_rank=64)
    return found.to_json()


@pytest.mark.slow
def test_degrees_that_the_heads_do_not_allow_are_measured_as_rings(ranks):
    document = ranks(2).run(heads_that_no_degree_divides, timeout_s=120.0)[0]
    assert document["layouts"] == {"2": {"ulysses": 1, "ring": 2}}
    assert "splits_s" not in document["provenance"]  # nothing to choose
    assert document["all_to_all"]["bandwidth_bytes_per_s"]["2"] > 0
