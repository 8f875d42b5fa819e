"""Models that would not be exact, and degrees that the heads cannot serve, are refused by name."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    GptOssConfig,
    LlamaForCausalLM,
    T5ForConditionalGeneration,
)

from flexsp.parallel import check_degrees, check_model, default_layouts, layouts_of
from flexsp.parallel.attention import SPContext, flexsp_attention
from flexsp.parallel.kinds import Asked, asked_of
from flexsp.parallel.model import attention_of
from flexsp.parallel.needs import Attention
from flexsp.parallel.row import Row
from flexsp.profile import Layout
from reference import small_config

SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, bos_token_id=None, eos_token_id=None, pad_token_id=None,
)  # fmt: skip


def model(config):
    return AutoModelForCausalLM.from_config(config)


REFUSED = {
    "dropout": (
        small_config(attention_dropout=0.1), r"attention_dropout=0.1: dropout makes loss and gradients depend",
    ),
    "dropout of another name": (GPT2Config(vocab_size=64, n_embd=32, n_layer=1, n_head=4), r"pdrop=0.1: dropout makes"),
    "rotary scaling by the longest position": (
        small_config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
        r"rope_type='dynamic' of LlamaForCausalLM depends on the longest position .*use one of fixed scaling",
    ),
    "the same in one type of layer": (
        CONFIG_MAPPING["gemma3_text"](
            **SIZES, layer_types=["sliding_attention", "full_attention"], rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
            },
        ),
        r"rope_type='dynamic' of Gemma3ForCausalLM",
    ),
    "longrope": (
        CONFIG_MAPPING["phi3"](
            **SIZES, original_max_position_embeddings=64,
            rope_parameters={
                "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4,
            },
        ),
        r"rope_type='longrope' of Phi3ForCausalLM",
    ),
    "a loss over the tokens of a batch": (
        CONFIG_MAPPING["mixtral"](**SIZES, num_local_experts=4, output_router_logits=True),
        r"output_router_logits=True of MixtralForCausalLM: the balancing loss .*set it to False",
    ),
    "chunked attention": (
        CONFIG_MAPPING["llama4_text"](**SIZES, head_dim=8, intermediate_size_mlp=16, attention_chunk_size=16),
        r"layer_types=\['chunked_attention'\] of Llama4ForCausalLM see only their own chunk",
    ),
    "convolutions": (
        CONFIG_MAPPING["lfm2"](**SIZES, layer_types=["conv", "full_attention"]),
        r"layer_types=\['conv'\] of Lfm2ForCausalLM mix neighbouring tokens",
    ),
    "linear attention": (
        CONFIG_MAPPING["minimax"](**SIZES, layer_types=["linear_attention", "full_attention"], num_local_experts=2),
        r"layer_types=\['linear_attention'\] of MiniMaxForCausalLM keep a state",
    ),
    "linear attention that has no interface": (
        CONFIG_MAPPING["qwen3_next"](**SIZES, num_experts=2, linear_num_key_heads=2, linear_num_value_heads=2),
        r"model=Qwen3NextForCausalLM does not call the attention interface",
    ),
    "state space": (
        CONFIG_MAPPING["mamba"](vocab_size=64, hidden_size=16, num_hidden_layers=1),
        r"model=MambaForCausalLM does not call .*, and its backbone.layers.0.mixer.conv1d mixes neighbouring tokens",
    ),
    "recurrence": (
        CONFIG_MAPPING["rwkv"](vocab_size=64, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2),
        r"model=RwkvForCausalLM does not call the attention interface",
    ),
    "a hybrid": (
        CONFIG_MAPPING["bamba"](**SIZES, mamba_n_heads=2, mamba_d_head=32, mamba_d_state=4, attn_layer_indices=[1]),
        r"model=BambaForCausalLM does not call the attention interface",
    ),
    "an encoder": (
        CONFIG_MAPPING["bert"](vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                               intermediate_size=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        r"is_causal=False of BertSelfAttention: its tokens see later ones",
    ),
    "positions that begin elsewhere": (
        CONFIG_MAPPING["xlm-roberta"](vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
                                      intermediate_size=16, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
                                      is_decoder=True, pad_token_id=1),
        r"model=XLMRobertaForCausalLM: it does not number the tokens of a sequence from 0, as flexsp does",
    ),
    "attention to later tokens": (
        CONFIG_MAPPING["gemma3_text"](**SIZES, use_bidirectional_attention=True),
        r"use_bidirectional_attention=True of Gemma3ForCausalLM",
    ),
    "randomness in training": (
        CONFIG_MAPPING["phimoe"](**SIZES, num_local_experts=4),
        r"model=PhimoeForCausalLM: its result is random",
    ),
    "layers that drop our arguments": (
        CONFIG_MAPPING["nemotron"](**SIZES, head_dim=8), r"do not hand keyword arguments to the attention interface",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")  # of transformers, on kernels that are not installed
@pytest.mark.parametrize("case", REFUSED)
def test_models_that_would_not_be_exact_are_refused_by_name(case):
    config, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as raised:
        check_model(model(config))
    assert len(str(raised.value).splitlines()) == 1


def test_an_encoder_with_a_decoder_is_refused():
    config = CONFIG_MAPPING["t5"](vocab_size=64, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match=r"is_encoder_decoder=True of T5ForConditionalGeneration"):
        check_model(T5ForConditionalGeneration(config))


class Neighbours(torch.nn.Module):
    """Feeds every token the one before it."""

    def __init__(self, config):
        super().__init__()
        self.mix = torch.nn.Conv1d(config.hidden_size, config.hidden_size, 2, padding=1, groups=config.hidden_size)

    def forward(self, hidden):
        return self.mix(hidden.mT)[..., :-1].mT


class ShiftedLlama(LlamaForCausalLM):
    """Says nothing of it in its config."""

    def __init__(self, config):
        super().__init__(config)
        self.model.layers[0].mlp = Neighbours(config)


class PositionlessLlama(LlamaForCausalLM):
    """Counts the tokens at hand."""

    def forward(self, input_ids, position_ids=None, **arguments):
        return super().forward(input_ids, position_ids=torch.arange(input_ids.shape[1])[None], **arguments)


class HalfSeenLlama(LlamaForCausalLM):
    """Its eager attention has a mask that no argument tells of."""

    def forward(self, input_ids, **arguments):
        tokens = input_ids.shape[1]
        mask = None
        if self.config._attn_implementation == "eager":
            mask = torch.ones(tokens, tokens).tril().triu(-3).log()[None, None].to(self.dtype)
        return super().forward(input_ids, attention_mask=mask, **arguments)


class Branches(torch.nn.Module):
    """Uses a weight where a token asks for it."""

    def __init__(self, config):
        super().__init__()
        self.rare = torch.nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden):
        asked = hidden[..., :1] > 0
        return torch.where(asked, self.rare(hidden), hidden) if asked.any() else hidden


class BranchingLlama(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model.layers[0].mlp = Branches(config)
        self.model.layers[1].mlp = Branches(config)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (BranchingLlama, r"some tokens leave model.layers..*rare.bias and . other parameters without a gradient"),
        (ShiftedLlama, r"tokens reach one another in model.layers.0.mlp \(Neighbours\), outside of attention"),
        (PositionlessLlama, r"tokens reach one another in .*, or it reads positions of its own"),
        (
            HalfSeenLlama,
            r"its attention, first seen in model.layers.0.self_attn.* is not causal attention by scores, w",
        ),
    ],
)
def test_what_no_field_names_is_found_by_running_a_small_model(kind, message):
    with pytest.raises(ValueError, match=rf"model={kind.__name__}: {message}"):
        check_model(kind(small_config()))


def test_what_is_random_is_let_through_where_exactness_is_given_up():
    check_model(model(small_config(attention_dropout=0.1)), exact=False)
    check_model(model(CONFIG_MAPPING["phimoe"](**SIZES, num_local_experts=4)), exact=False)


class NeedyLlama(LlamaForCausalLM):
    """Cannot be made of a config alone."""

    def __init__(self, config, needed):
        super().__init__(config)


def test_what_cannot_be_checked_is_let_through_where_exactness_is_given_up():
    needy = NeedyLlama(small_config(), needed=1)
    with pytest.raises(ValueError, match=r"NeedyLlama: it cannot be checked, .*give up exactness with exact=False"):
        check_model(needy)
    check_model(needy, exact=False)


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("llama", {}),
        ("qwen2", {"use_sliding_window": True, "sliding_window": 16}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 16}),
        ("gemma2", {"sliding_window": 16}),
        ("gpt2", {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}),
        ("gpt_oss", {"num_local_experts": 4}),
        ("deepseek_v3", {"n_routed_experts": 8, "num_key_value_heads": 4, "head_dim": 64}),
        ("longcat_flash", {"num_layers": 2, "n_routed_experts": 8, "num_key_value_heads": 4, "head_dim": 64}),
    ],
)
def test_exact_models_are_let_through_and_left_as_they_are(kind, fields):
    built = model(CONFIG_MAPPING[kind](**{**SIZES, **fields}))
    before = built.config.to_dict()
    state = torch.random.get_rng_state()
    with torch.device("meta"):  # as where a user builds a large model
        check_model(built)
    assert built.config.to_dict() == before
    assert torch.equal(torch.random.get_rng_state(), state)


def test_any_degree_has_a_layout_with_as_much_ulysses_as_divides_the_heads():
    six_heads = small_config(6, 3)
    assert [(each.ulysses, each.ring) for each in layouts_of(six_heads, 12)] == [(6, 2), (3, 4), (2, 6), (1, 12)]
    assert default_layouts(six_heads, [1, 2, 3, 4, 5]) == {4: Layout(ulysses=2, ring=2), 5: Layout(ulysses=1, ring=5)}


def test_degrees_that_ranks_or_heads_cannot_serve_are_refused_with_a_layout_that_works():
    for degrees, layouts, message in [
        ([4], {}, r"sp_degree=4 is not between 1 and world_size=2"),
        ([2], {}, r"sp_degree=2 with ulysses=2 cannot be served with num_attention_heads=3, .*e.g. ulysses=1 x ring=2"),
        ([2], {2: Layout(ulysses=1, ring=3)}, r"ulysses=1 x ring=3 is not sp_degree=2"),
    ]:
        with pytest.raises(ValueError, match=message):
            check_degrees(degrees, small_config(3, 3), 2, layouts)
    check_degrees([1, 2], small_config(3, 3), 2, {2: Layout(ulysses=1, ring=2)})


@pytest.mark.parametrize("model_type", ["hunyuan_v1_dense", "hunyuan_v1_moe"])
def test_a_scaling_that_is_called_dynamic_but_fixed_by_its_alpha_is_tried(model_type):
    """As HunYuan's configs are published; without alpha it goes by the longest position."""
    scaling = dict(type="dynamic", alpha=1000.0, beta_fast=32, beta_slow=1, factor=1.0, mscale=1.0, mscale_all_dim=1.0)
    config = CONFIG_MAPPING[model_type](**SIZES, head_dim=8, rope_scaling=scaling)
    assert config.rope_parameters["rope_type"] == "dynamic"
    check_model(model(config))
    config.rope_parameters["alpha"] = None
    with pytest.raises(ValueError, match=r"rope_type='dynamic' of HunYuan.* depends on the longest position"):
        check_model(model(config))


def call(**arguments):
    x = torch.zeros(1, 2, 3, 4)
    context = SPContext(row=Row((3,), 1, 0, x.device), heads=None, ring=None, shares=(3,))
    given = dict(sp_context=context, attention_mask=None)
    return flexsp_attention(None, x, x, x, **{**given, **arguments})


def test_attention_of_another_kind_is_refused_where_it_would_be_wrong():
    assert call()[0].shape == (1, 3, 2, 4)
    for arguments, message in [
        ({"sp_context": None}, "sp_context=None: attn_implementation='flexsp' needs one"),
        ({"attention_mask": torch.ones(1)}, "attention_mask must be None"),
        ({"is_causal": False}, "is_causal=False of .* computes causal attention"),
        ({"position_bias": torch.ones(1)}, "position_bias: attn_implementation='flexsp' does not compute it"),
    ]:
        with pytest.raises(ValueError, match=message):
            call(**arguments)


def test_a_plan_is_refused_before_it_runs_where_no_kernel_computes_the_models_attention_in_it():
    """Not inside of a layer, where the ranks of a ring alone would fail and others wait for them."""
    alone, ring = Layout(ulysses=2, ring=1), Layout(ulysses=1, ring=2)
    with_dropout = small_config(attention_dropout=0.1)
    attention = Attention.of(
        with_dropout, "cpu", torch.float32, None, asked_of(LlamaForCausalLM, with_dropout, training=False)
    )
    attention.check([alone])
    with pytest.raises(ValueError, match=r"dropout=True, .* no attention kernel computes this"):
        attention.check([alone, ring])
    with pytest.raises(ValueError, match="attention='typo' is unknown; choose one of varlen, flash-attn"):
        Attention.of(with_dropout, "cpu", torch.float32, "typo")
    from transformers import MistralConfig

    mistral = MistralConfig(hidden_size=32, num_attention_heads=4, sliding_window=16)
    windowed = Attention.of(mistral, "cuda", torch.bfloat16, "math")
    assert {need.by_positions for need in windowed.in_ring} == {False, True}
    windowed.check([alone, ring])


@pytest.mark.parametrize(
    ("config", "asked"),
    [
        (GPT2Config(n_head=2, n_embd=16, attn_pdrop=0.1), Asked(dropout=True)),
        (GPT2Config(n_head=2, n_embd=16, attn_pdrop=0.0), Asked()),  # residuals and embeddings are dropped out still
        (GPTNeoXConfig(hidden_size=32, num_attention_heads=2, attention_dropout=0.1), Asked(dropout=True)),
        (GptOssConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=8), Asked(sinks=True)),
    ],
    ids=["gpt2", "gpt2, none of attention", "gpt_neox", "gpt_oss"],
)
def test_what_layers_hand_to_attention_is_asked_of_kernels_whatever_the_config_calls_it(config, asked):
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    assert asked_of(kind, config, training=False) == asked
    attention = Attention.of(config, "cpu", torch.float32, None, asked)
    assert {(need.dropout, need.blocks) for need in attention.alone} == {(asked.dropout, asked.sinks)}
    assert {(need.dropout, need.blocks) for need in attention.in_ring} == {(asked.dropout, True)}


def test_a_config_that_another_model_has_taken_over_is_refused():
    """transformers sets the attention in the config, and a second model of the same object may set another."""
    config = small_config()
    first = model(config)
    first.set_attn_implementation("flexsp")
    first._flexsp_attention = Attention.of(first.config, "cpu", torch.float32, None)
    assert attention_of(first) is first._flexsp_attention
    AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with pytest.raises(ValueError, match=r"asks for attention 'eager', not for flexsp's: .*a copy of the config"):
        attention_of(first)
