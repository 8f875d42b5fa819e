"""Families of models, prepared and trained on mixed plans: loss and gradients equal one device's, in fp64.

The reference is the model's own layers with textbook attention, one sequence at a time (`reference`).
"""

from __future__ import annotations

import pytest
import torch
from transformers import CONFIG_MAPPING

from family_ranks import check_experts_that_nobody_chose, check_family
from flexsp.profile import Layout
from test_equality import plan

ALL = [0, 1, 2, 3]
LENGTHS = [29, 3, 17, 9, 23, 1]
MIXED = plan(4, [(ALL, [0, 1])], [([0, 1], [2, 5]), ([2], [3])], [([2, 3], [4])])
"""A degree beyond the two KV heads, ranks with different degrees beside each other, and idle ranks."""
RING = {4: Layout(ulysses=2, ring=2), 2: Layout(ulysses=1, ring=2)}

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=256, pad_token_id=None, bos_token_id=None,
    eos_token_id=None,
)  # fmt: skip
WINDOW = 5
EXPERTS = dict(num_experts=4, num_local_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
FAMILIES: dict[str, dict[str, object]] = {
    "llama": {},
    "qwen2": {},
    "qwen2, windows in its second layer": dict(use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
    "qwen3": {},
    "mistral": dict(sliding_window=WINDOW),
    "mixtral": dict(EXPERTS, sliding_window=WINDOW),
    "gemma2": dict(sliding_window=WINDOW, query_pre_attn_scalar=6, attn_logit_softcapping=1.0),
    "gemma3_text": dict(
        sliding_window=WINDOW, query_pre_attn_scalar=6, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": {},
    "olmo2": {},
    "gpt_neox": dict(attention_dropout=0.0, hidden_dropout=0.0),
    "granite": dict(attention_multiplier=0.2, logits_scaling=2.0, residual_multiplier=0.5, embedding_multiplier=3.0),
    "starcoder2": dict(sliding_window=WINDOW, embedding_dropout=0.0, residual_dropout=0.0),
    "gpt_oss": dict(EXPERTS, sliding_window=WINDOW),  # windows, attention sinks and experts
    "qwen3_moe": dict(EXPERTS, decoder_sparse_step=1),
    "olmoe": dict(EXPERTS),
    "deepseek_v3": dict(  # values narrower than keys
        num_key_value_heads=4, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, n_shared_experts=1,
        moe_intermediate_size=16, first_k_dense_replace=1, q_lora_rank=12, kv_lora_rank=10, qk_nope_head_dim=6,
        qk_rope_head_dim=4, v_head_dim=5, head_dim=4,
    ),
    "cohere": dict(logit_scale=0.3),
    "glm4": {},
    "afmoe": dict(
        EXPERTS, layer_types=["sliding_attention", "full_attention"], sliding_window=WINDOW, num_dense_layers=1
    ),
}  # fmt: skip


FP32_INSIDE = {"gemma2", "gemma3_text", "deepseek_v3", "cohere"}
"""Their norms or routers make gradients in fp32, whatever the model's type."""


def config_of(family: str):  # type: ignore[no-untyped-def]
    return CONFIG_MAPPING[family.partition(",")[0]](**{**SIZES, **FAMILIES[family]})


def tolerance_of(family: str) -> float:
    return 1e-6 if family in FP32_INSIDE else 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_equals_one_device_on_a_mixed_plan(ranks, family):
    ranks(4).run(check_family, config_of(family), LENGTHS, MIXED, tolerance_of(family))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_equals_one_device_in_a_ring(ranks, family):
    """Windows, sinks, softcap and values narrower than keys among them, passed around."""
    ranks(4).run(check_family, config_of(family), LENGTHS, MIXED, tolerance_of(family), RING)


@pytest.mark.parametrize("experts", ["grouped_mm", "batched_mm"])
def test_experts_equal_one_device_by_each_implementation(ranks, experts):
    ranks(4).run(check_family, config_of("qwen3_moe"), LENGTHS, MIXED, 1e-5, None, torch.float32, experts)


def test_experts_that_do_nothing_may_be_all_that_a_rank_chooses(ranks):
    """Of 16 experts 14 hand their token through: idle ranks' filler, and short rows, choose none of the others."""
    config = CONFIG_MAPPING["longcat_flash"](
        **{**SIZES, **FAMILIES["deepseek_v3"], "n_routed_experts": 2, "moe_topk": 1}, num_layers=1, zero_expert_num=14,
        ffn_hidden_size=16, expert_ffn_hidden_size=16,
    )  # fmt: skip
    ranks(4).run(check_family, config, LENGTHS, MIXED, 1e-6)


@pytest.mark.parametrize("frozen", [False, True], ids=["embedding trained", "embedding frozen"])
def test_experts_held_apart_get_gradients_where_nobody_chose_them(ranks, frozen):
    ranks(2).run(check_experts_that_nobody_chose, frozen)
