"""A model's sizes against published counts, against transformers, and by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flexsp.estimate import estimate_profile, load_cluster, load_model_shape, model_shape
from flexsp.estimate.seconds import kv_repetition
from flexsp.profile import Profile

ROOT = Path(__file__).parent.parent
MODELS = ROOT / "examples" / "models"
SIZES = ("7b", "13b", "30b")

TINY = {
    "model_type": "llama", "hidden_size": 8, "intermediate_size": 20, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50, "hidden_act": "silu",
}  # fmt: skip
GPT2 = {"model_type": "gpt2", "n_embd": 8, "n_layer": 3, "n_head": 4, "n_positions": 16, "vocab_size": 50}
MIXTRAL = {
    "model_type": "mixtral", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000, "hidden_act": "silu",
    "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip

PUBLISHED_PARAMETERS = {  # what the models' checkpoints hold
    "Llama-2-7B": (
        {
            "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "vocab_size": 32000, "hidden_act": "silu",
        },
        6_738_415_616,
    ),
    "Qwen2.5-7B": (
        {
            "model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
            "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064, "hidden_act": "silu",
        },
        7_615_616_512,
    ),
    "Mixtral-8x7B": (MIXTRAL, 46_702_792_704),
    "GPT-2": (
        {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024, "vocab_size": 50257},
        124_439_808,
    ),
}  # fmt: skip


def tiny(**changes):
    return model_shape({**TINY, **changes})


def estimate(shape):
    return estimate_profile(shape, load_cluster("a100-80"))


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_parameters_are_those_of_the_published_models(name):
    config, published = PUBLISHED_PARAMETERS[name]
    assert model_shape(config).num_parameters == published


def test_example_configs_are_the_models_they_are_named_after():
    assert load_model_shape(MODELS / "llama-3-8b.json").num_parameters == 8_030_261_248
    assert load_model_shape(MODELS / "llama-3.2-1b.json").num_parameters == 1_235_814_400
    for size in SIZES:  # 16 bytes a parameter over 64 devices is what was published as model states, to the byte
        published = Profile.load(ROOT / "examples" / "profiles" / f"gpt-{size}-64xa100.json")
        shape = load_model_shape(MODELS / f"gpt-{size}.json")
        assert 16 * shape.num_parameters == 64 * published.memory.model_state_bytes


HEADS = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 100}
WIDTH = {**HEADS, "intermediate_size": 160}
SMALL = {**WIDTH, "num_key_value_heads": 2}
EXPERTS = {**SMALL, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
OLD_NAMES = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 50, "vocab_size": 100}
FAMILY_CASES = [
    ("llama", SMALL),
    ("llama", {**SMALL, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    ("qwen2", SMALL),
    ("qwen2_moe", {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 48}),
    ("qwen3", {**SMALL, "head_dim": 24}),
    ("qwen3_moe", {**EXPERTS, "num_experts": 4, "mlp_only_layers": [1]}),
    ("qwen3_moe", {**EXPERTS, "num_experts": 4, "decoder_sparse_step": 2}),
    ("mistral", SMALL),
    ("mixtral", {**SMALL, "num_local_experts": 4}),
    ("gemma", SMALL),
    ("gemma2", {**SMALL, "head_dim": 24}),
    ("gemma3_text", SMALL),
    ("phi", WIDTH),
    ("phi3", {**SMALL, "pad_token_id": 0}),
    ("olmo", SMALL),
    ("olmo2", SMALL),
    ("olmo3", SMALL),
    ("olmoe", {**SMALL, "num_experts": 4, "num_experts_per_tok": 2}),
    ("granite", SMALL),
    ("granitemoe", {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}),
    ("gpt_neox", WIDTH),
    ("gpt_neox", {**WIDTH, "attention_bias": False}),
    ("starcoder2", SMALL),
    ("starcoder2", {**SMALL, "use_bias": False}),
    ("gpt2", OLD_NAMES),
    ("gpt2", {**OLD_NAMES, "n_inner": 100, "tie_word_embeddings": False}),
    ("gpt_bigcode", OLD_NAMES),
    ("gpt_neo", {
        "hidden_size": 64, "num_layers": 4, "num_heads": 4, "vocab_size": 100, "max_position_embeddings": 50,
        "attention_types": [[["global", "local"], 2]],
    }),
    ("opt", {**HEADS, "ffn_dim": 160, "max_position_embeddings": 50, "word_embed_proj_dim": 64}),
    ("bloom", {"hidden_size": 64, "n_layer": 3, "n_head": 4, "vocab_size": 100}),
    ("falcon", HEADS),
    ("falcon", {**HEADS, "new_decoder_architecture": True, "num_kv_heads": 2}),
    ("falcon", {**HEADS, "bias": True, "multi_query": False, "parallel_attn": False}),
]  # fmt: skip


@pytest.mark.filterwarnings("default")  # configs this small make transformers warn about token ids
@pytest.mark.parametrize(("model_type", "fields"), FAMILY_CASES)
def test_parameters_are_those_of_the_model_that_transformers_builds(model_type, fields):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.for_model(model_type, **fields)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    shape = model_shape(config.to_dict())
    assert shape.num_parameters == sum(p.numel() for p in model.parameters())
    assert shape.assumptions == () or shape.assumptions[0].startswith("sliding_window")


def test_flops_by_hand():
    shape = tiny()  # head_dim 2: q and o 8 x 8, k and v 8 x 4; gated MLP 3 x 8 x 20
    assert shape.attention_parameters == 2 * 64 + 2 * 32
    assert shape.layer_parameters == 192 + 480 + 16  # and two norms
    assert shape.active_layer_parameters == 192 + 480
    assert shape.num_parameters == 3 * 688 + 2 * 50 * 8 + 8
    assert shape.flops_by_kind() == {
        "attention_projections": 6 * 3 * 192, "mlp": 6 * 3 * 480, "router": 0, "head": 6 * 400,
    }  # fmt: skip
    assert shape.linear_flops_per_token() == 6 * (3 * 672 + 400)
    # forward 4 * s^2 * 8 by half for the mask, backward 2.5 times that, three layers
    assert shape.attention_flops_per_square() == (2 + 5) * 8 * 3


def test_fewer_kv_heads_move_fewer_bytes_until_a_degree_repeats_them():
    shared, full = tiny(), tiny(num_key_value_heads=4)
    assert full.exchange_bytes_per_token(2) == 2 * 3 * (4 * 8) * 2
    assert shared.exchange_bytes_per_token(2) == full.exchange_bytes_per_token(2) * 3 // 4
    assert kv_repetition(shared, 2) == 1
    # at degree 4 two KV heads become four: as many bytes as with full heads
    assert shared.exchange_bytes_per_token(2) * kv_repetition(shared, 4) == full.exchange_bytes_per_token(2)
    bandwidth = [estimate(s).all_to_all.bandwidth_bytes_per_s for s in (shared, full)]
    assert bandwidth[0][2] == bandwidth[1][2]
    assert bandwidth[0][4] == pytest.approx(bandwidth[1][4] * 3 / 4)


def test_a_token_multiplies_with_the_experts_it_chose():
    shape = model_shape(MIXTRAL)
    expert = 3 * 4096 * 14336
    assert shape.layer_parameters - shape.active_layer_parameters == 6 * expert + 2 * 4096  # and two norms
    assert shape.flops_by_kind()["mlp"] == 6 * 32 * 2 * expert
    assert shape.num_parameters > 3.5 * shape.linear_flops_per_token() / 6


def test_a_gpt_keeps_32_bytes_a_hidden_unit_and_layer():
    # Korthikanti et al. count 34 with two dropout masks of a byte; beside them one fp32 number a head
    shape = model_shape({**GPT2, "n_embd": 64})
    items = shape.kept_bytes_per_layer(2)
    assert sum(items.values()) - items["log-sum-exp of the scores"] == 32 * 64


def test_configs_are_read_under_other_names_and_nested(tmp_path):
    assert model_shape(GPT2).intermediate_size == 32
    assert model_shape(GPT2).num_kv_heads == 4
    nested = model_shape({"model_type": "llava", "text_config": TINY, "tie_word_embeddings": False})
    assert nested.num_parameters == tiny().num_parameters
    assert "text_config alone" in nested.assumptions[0]
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-model" / "config.json").write_text(json.dumps(TINY))
    assert load_model_shape(tmp_path / "my-model").name == "my-model"


def test_what_a_config_does_not_say_is_recorded():
    unknown = tiny(model_type="tower")
    assert unknown.gated
    assert "model_type='tower' is not known: MLP taken as gated" in unknown.assumptions[0]
    assert not tiny(model_type="tower", hidden_act="relu").gated
    assert "sliding_window=128" in tiny(sliding_window=128).assumptions[0]
    assert unknown.assumptions[0] in estimate(unknown).provenance["assumptions"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "model config: the field 'hidden_size' is missing"),
        ({"vocab_size": "50"}, "model config: vocab_size='50' must be an integer"),
        ({"num_hidden_layers": 0}, "num_hidden_layers=0 must be at least 1"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings='no' must be true or false"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3 must divide num_attention_heads=4"),
        ({"kv_lora_rank": 512}, "kv_lora_rank=512: latent attention is not estimated"),
        ({"num_experts": 4}, "the field 'num_experts_per_tok' is missing"),
        ({"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok=5 is above num_experts=4"),
        ({"text_config": 3}, r"text_config=3 must be a JSON object"),
    ],
)
def test_a_wrong_config_is_named_with_its_field(changes, message):
    with pytest.raises(ValueError, match=message) as raised:
        tiny(**changes)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2**53}, r"num_hidden_layers=9007199254740992 must be at most 16,384"),
        ({"vocab_size": 2**40}, r"vocab_size=1099511627776 must be at most 16,777,216"),
        (
            {"num_attention_heads": 10**6, "num_key_value_heads": 1},
            r"hidden_size=.* must be at least num_attention_heads",
        ),
        ({"num_experts": 4, "num_experts_per_tok": 2, "mlp_only_layers": 3}, r"mlp_only_layers=3 must be a JSON list"),
        ({"tie_word_embeddings": "x" * 5000}, r"tie_word_embeddings='x{56}\.\.\. must be true or false"),
    ],
)
def test_sizes_that_no_model_has(changes, message):
    """Found by tests/fuzzing: a hang, a division by zero, a TypeError."""
    fields = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256, **changes}
    with pytest.raises(ValueError, match=message):
        model_shape(fields)
