"""Rank 0 builds or loads the weights, all others take their shards from it: bit for bit what each had built whole."""

from __future__ import annotations

import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from flexsp.parallel import prepare_model
from flexsp.train.config import ModelConfig
from reference import small_config
from test_families import EXPERTS, FAMILIES, SIZES
from weights_ranks import constants, difference, difference_from_path, held_bytes, refusal

MODELS = {
    "llama": {},
    "llama, tied": {"tie_word_embeddings": True},
    "llama, uneven": {"vocab_size": 61, "intermediate_size": 33},
    "llama, rotary scaling": {"rope_parameters": {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }},
    "qwen3_moe": {**EXPERTS, "decoder_sparse_step": 1},
    "deepseek_v3": FAMILIES["deepseek_v3"],  # a buffer that is saved
    "afmoe": FAMILIES["afmoe"],  # what it builds frozen is loaded trainable
    "gemma3_text": FAMILIES["gemma3_text"],  # ties, a scaled embedding, two rotary embeddings
    "gpt_neox": FAMILIES["gpt_neox"],
}  # fmt: skip
WIRINGS = {
    "usual": {},
    "copies": {"replicate": 2},
    "one unit": {"shard_layers": False},
    "bfloat16": {"weights": "bfloat16", "dtype": "bfloat16"},
    "computed in bfloat16": {"dtype": "bfloat16"},
}


def config_of(model: str, **wiring: object) -> ModelConfig:
    return ModelConfig(config={**SIZES, "model_type": model.partition(",")[0], **MODELS[model]}, **wiring)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("model", MODELS)
def test_weights_buffers_and_random_numbers_are_what_each_rank_would_have_built(ranks, model, world_size):
    assert set(ranks(world_size).run(difference, config_of(model))) == {""}


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("wiring", WIRINGS)
def test_so_they_are_however_they_are_sharded(ranks, wiring, world_size):
    assert set(ranks(world_size).run(difference, config_of("llama, tied", **WIRINGS[wiring]))) == {""}


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize("model", MODELS)
def test_so_they_are_where_rank_0_alone_loads_them(ranks, model, weights, tmp_path):
    """transformers keeps a buffer of deepseek's in fp32 where it loads bfloat16, and not where it builds it."""
    path = ModelConfig(path=str(tmp_path), weights=weights, dtype="bfloat16")
    assert set(ranks(2).run(difference_from_path, config_of(model), path)) == {""}


def test_ends_that_the_config_ties_stay_apart_where_the_files_hold_two(ranks, tmp_path):
    path, head = ModelConfig(path=str(tmp_path)), torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    found = ranks(2).run(difference_from_path, config_of("llama, tied"), path)
    assert set(found) == {""}
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": head}, file, metadata={"format": "pt"})
    assert set(ranks(2).run(difference, path)) == {""}


def test_ranks_other_than_the_first_hold_a_layer_beside_their_shards_and_never_the_whole_model(ranks):
    config = ModelConfig(config={**SIZES, "model_type": "llama", "num_hidden_layers": 16})
    _, *others = ranks(4).run(held_bytes, config)
    for most, shards, whole, layer in others:
        assert shards < most < shards + 1.5 * layer < whole / 2


def test_constants_of_every_sort_are_rank_0s(ranks):
    found = ranks(2).run(constants, small_config())
    assert found[0] == found[1]
    assert [values for _, values in found[1]] == [
        [0.0, 2.0, 4.0], [True, False, True], 2.5, [], [[0, 3], [1, 4], [2, 5]],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (
            {"intermediate_size": 40},
            r"rank 1 has a parameter of shape \(40, 32\) as model.layers.0.mlp.gate_proj.weight, rank 0 a "
            r"parameter of shape \(48, 32\); build the same model on all ranks",
        ),
        ({"num_hidden_layers": 3}, r"rank 1 has .* as model.layers.2.self_attn.q_proj.weight, rank 0 nothing; .*"),
    ],
)
def test_another_architecture_is_refused_on_all_ranks_alike(broken_ranks, other, said):
    found = set(broken_ranks(2).run(refusal, small_config(), small_config(**other)))
    assert len(found) == 1
    assert re.fullmatch(f"model=LlamaForCausalLM: {said}", found.pop())


def test_weights_that_nobody_has_are_refused(ranks):
    (said,) = set(ranks(2).run(refusal, small_config(), small_config(), False))
    assert said.startswith("model=LlamaForCausalLM: rank 0 has model.embed_tokens.weight on the meta device, ")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(small_config())
    with pytest.raises(ValueError, match=r"embed_tokens.weight is on the meta device .*set from_first_rank=True"):
        prepare_model(model)
