"""Models that would not be exact, and degrees that the heads cannot serve, are refused by name."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    MistralConfig,
    MixtralConfig,
    Qwen2Config,
)

from flexsp.parallel import check_degrees, check_model, servable_degrees
from flexsp.parallel.attention import SPContext, flexsp_attention
from reference import small_config

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip


def model(config):
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (small_config(attention_dropout=0.1), r"attention_dropout=0.1: dropout makes loss and gradients depend"),
        (GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4), r"pdrop=0.1: dropout makes"),
        (MistralConfig(**SIZES, sliding_window=16), r"sliding_window=16 of MistralForCausalLM is not computed"),
        (MixtralConfig(**SIZES, num_local_experts=4), r"experts=4 of MixtralForCausalLM"),
        (
            small_config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            r"rope_type='dynamic' of LlamaForCausalLM depends on the longest position",
        ),
    ],
)
def test_models_that_would_not_be_exact_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        check_model(model(config))


def test_dropout_is_let_through_where_exactness_is_given_up():
    check_model(model(small_config(attention_dropout=0.1)), exact=False)


def test_plain_models_are_let_through():
    for config in (small_config(), Qwen2Config(**SIZES), MistralConfig(**SIZES, sliding_window=None)):
        check_model(model(config))


def test_degrees_that_the_heads_cannot_serve_are_refused_with_those_that_work():
    assert servable_degrees(small_config(6, 3), 8) == [1, 2, 3, 6]
    with pytest.raises(
        ValueError, match=r"sp_degree=4 cannot .* num_attention_heads=6 .*degrees that work: \[1, 2, 3, 6\]"
    ):
        check_degrees([1, 4], small_config(6, 3), 8)
    with pytest.raises(ValueError, match=r"sp_degree=4 cannot be served .* on world_size=2"):
        check_degrees([4], small_config(4, 4), 2)


def call(**arguments):
    x = torch.zeros(1, 2, 3, 4)
    context = SPContext(group=None, group_rank=0, shares=(3,))
    given = dict(sp_context=context, cu_seq_lens_q=torch.tensor([0, 3]), max_length_q=3, attention_mask=None)
    return flexsp_attention(None, x, x, x, **{**given, **arguments})


def test_attention_of_another_kind_is_refused_where_it_would_be_wrong():
    assert call()[0].shape == (1, 3, 2, 4)
    for arguments, message in [
        ({"sp_context": None}, "sp_context=None: attn_implementation='flexsp' needs one"),
        ({"attention_mask": torch.ones(1)}, "attention_mask must be None"),
        ({"softcap": 30.0}, "softcap: attn_implementation='flexsp' computes plain causal attention"),
        ({"sliding_window": 2}, "sliding_window=2 is below max_seqlen=3"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(**arguments)
