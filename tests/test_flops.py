"""The FLOPs that MFU counts, against those that torch counts in the model, and windows against a count by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from flexsp.estimate.cluster import cluster_names, known_peak, load_cluster
from flexsp.estimate.flops import FULL, flop_count, layer_windows, visible_pairs

SIZES = {
    "vocab_size": 500, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
MODELS = {
    "llama": {**SIZES, "head_dim": 8},
    "qwen3_moe": {**SIZES, "moe_intermediate_size": 48, "num_experts": 8, "num_experts_per_tok": 3},
    "mixtral": {**SIZES, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "gpt2": {"vocab_size": 500, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512},
    "gemma2": {**SIZES, "sliding_window": 100_000},
}  # fmt: skip
TOLERANCE = 1e-3
"""Of the whole: torch counts the products of rotary embeddings too. Matrix products are counted exactly."""


def counted(kind: str, tokens: int) -> tuple[float, dict]:
    """What torch counts of a forward and backward with plain attention, which computes all s^2 pairs."""
    config = CONFIG_MAPPING[kind](**MODELS[kind])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    ids = torch.randint(0, 500, (1, tokens))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False).logits.sum().backward()
    assert sum(p.numel() for p in model.parameters()) == flop_count(config.to_dict()).num_parameters
    return counter.get_total_flops(), config.to_dict()


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("tokens", [31, 400])
def test_a_step_counts_what_torch_counts_but_for_the_masked_half_of_attention(kind, tokens):
    total, config = counted(kind, tokens)
    count = flop_count(config)
    ours = count.step_flops(np.array([tokens]))
    masked_half = count.layer_flops_per_pair * sum(count.windows.values()) * tokens**2 / 2
    assert ours + masked_half == pytest.approx(total, rel=TOLERANCE)
    assert ours < total * (1 - TOLERANCE)  # the half is more than the tolerance


def test_sequences_of_a_batch_attend_to_themselves_alone():
    count = flop_count({"model_type": "llama", **SIZES})
    whole, parts = count.step_flops(np.array([300])), count.step_flops(np.array([100, 200]))
    assert whole - parts == pytest.approx(4 * count.layer_flops_per_pair * (300**2 - 100**2 - 200**2) / 2)


@pytest.mark.parametrize(("tokens", "window"), [(7, 50), (50, 50), (400, 50), (4000, 64), (1000, FULL)])
def test_a_window_counts_what_it_sees(tokens, window):
    by_hand = sum(min(place + 1, window or tokens) for place in range(tokens))  # as masks are: itself included
    diagonal = min(tokens, window or tokens)  # of which the formula counts half: s^2 / 2 of s * (s + 1) / 2
    assert float(visible_pairs(np.array([float(tokens)]), window)[0]) == by_hand - diagonal / 2


KINDS = {
    "llama": ({}, {FULL: 4}),
    "mistral": ({"sliding_window": 32}, {32: 4}),
    "qwen2": ({"sliding_window": 32, "use_sliding_window": False}, {FULL: 4}),
    "qwen3": ({"sliding_window": 32, "use_sliding_window": True, "max_window_layers": 1}, {FULL: 1, 32: 3}),
    "gemma2": ({"sliding_window": 32}, {32: 2, FULL: 2}),
    "gemma3_text": ({"sliding_window": 32, "num_hidden_layers": 6}, {32: 5, FULL: 1}),
    "gpt_oss": ({"sliding_window": 32}, {32: 2, FULL: 2}),
    "gpt_neo": ({"attention_types": [[["global", "local"], 2]], "window_size": 16, "num_layers": 4}, {16: 2, FULL: 2}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_windows_are_those_of_the_models_layers(kind):
    fields, expected = KINDS[kind]
    config = CONFIG_MAPPING[kind](**({} if kind == "gpt_neo" else SIZES) | fields)
    windows = layer_windows(config.to_dict(), config.num_hidden_layers)
    assert {window: windows.count(window) for window in windows} == expected
    if kind not in ("gpt_neo", "mistral"):  # whose layers do not hold their window
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        layers = [getattr(layer.self_attn, "sliding_window", None) or FULL for layer in model.model.layers]
        assert [layer for layer in layers if layer] == [window for window in windows if window]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layer_types": ["full_attention"] * 3}, "layer_types has 3 entries for 4 layers"),
        ({"layer_types": ["linear_attention"] * 4}, "layer_types has 'linear_attention', whose FLOPs are not counted"),
        ({"kv_lora_rank": 8}, "latent attention is not estimated"),
    ],
)
def test_attention_that_is_not_counted_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        flop_count({"model_type": "llama", **SIZES, **changes})


def test_peaks_are_those_of_the_data_sheets_by_the_exact_name():
    assert known_peak("NVIDIA H100 80GB HBM3", "bfloat16") == 989.4e12
    assert known_peak("NVIDIA A100-SXM4-40GB", "float32") == 19.5e12
    for unknown in ("NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA GeForce RTX 4090", "cpu", ""):
        assert known_peak(unknown, "bfloat16") is None
    assert known_peak("NVIDIA H200", "float64") is None
    names = [name for cluster in cluster_names() for name in load_cluster(cluster).device_names]
    assert len(names) == len(set(names)) and len(cluster_names()) <= len(names)
    assert dataclasses.replace(load_cluster("h100"), device_names=()).device_names == ()
