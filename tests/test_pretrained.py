"""Models that lie in a folder: with another config, and with no weight that was drawn anew."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from flexsp.train.config import ModelConfig
from flexsp.train.run_model import build_model

LLAMA = {
    "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "rope_parameters": {"rope_type": "default",
    "rope_theta": 5e5},
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}


def saved(folder: Path, model_type: str = "llama", **fields) -> Path:
    torch.manual_seed(7)
    config = AutoConfig.for_model(model_type, **(fields or LLAMA))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return saved(tmp_path / "llama")


def built(path: Path, **fields):
    return build_model(ModelConfig(path=str(path), config=fields), seed=0)


def same_weights(model, other) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_fields_change_the_folder_s_config_and_no_weight(llama):
    plain = built(llama)
    model = built(llama, max_position_embeddings=1024, attention_dropout=0.0, rope_parameters=YARN, rms_norm_eps=1e-5)
    assert same_weights(model, plain)
    config = model.config
    assert (config.max_position_embeddings, config.rms_norm_eps, config.hidden_size) == (1024, 1e-5, 16)
    # the table is changed field by field: losing rope_theta would turn all positions, silently
    assert config.rope_parameters == {**YARN, "rope_theta": 5e5}
    assert not torch.equal(model.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    assert plain.config.rope_parameters == LLAMA["rope_parameters"]


def test_the_rotary_fields_of_an_older_file_do_not_win_over_the_new_ones(llama):
    said = json.loads((llama / "config.json").read_text())
    del said["rope_parameters"]
    old = {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    (llama / "config.json").write_text(json.dumps(said | old))
    assert built(llama).config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}
    assert built(llama, rope_parameters=YARN).config.rope_parameters == {**YARN, "rope_theta": 5e5}


def test_what_a_config_derives_follows_the_change(tmp_path):
    """Layers of sliding attention in qwen2 follow from `use_sliding_window`, which an older file alone says."""
    fields = {key: value for key, value in LLAMA.items() if key != "rope_parameters"}
    folder = saved(tmp_path / "qwen2", "qwen2", **fields)
    said = json.loads((folder / "config.json").read_text())
    for key in ("layer_types", "sliding_window"):
        said.pop(key)
    (folder / "config.json").write_text(json.dumps(said))
    model = built(folder, use_sliding_window=True, sliding_window=32, max_window_layers=1)
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    assert model.config.sliding_window == 32


def test_a_field_has_the_name_that_it_has_in_other_models_too(tmp_path):
    folder = saved(tmp_path / "gpt2", "gpt2", vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    assert built(folder, resid_pdrop=0.0, embd_pdrop=0.0, num_attention_heads=4).config.n_head == 4
    with pytest.raises(ValueError, match=r"other shapes: transformer.wpe.weight is \(32, 16\) in it and \(64, 16\) by"):
        built(folder, max_position_embeddings=64)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_sise": 3}, r"model.config.hidden_sise=3 is no field of LlamaConfig; correct its name"),
        ({"rope_theta": 1e6}, r"model.config.rope_theta=1000000.0 is no field of LlamaConfig; rotary positions are "
                              r"model.config.rope_parameters"),
        ({"model_type": "qwen2"}, r"model_type='qwen2' is not the 'llama' of model.path='.*llama'; leave it out, or"),
        ({"vocab_size": 80}, r"model.path='.*llama' holds weights of other shapes: lm_head.weight is \(64, 16\) in it "
                             r"and \(80, 16\) by the config, model.embed_tokens.weight .*; correct model.config"),
        ({"num_hidden_layers": 3}, r"lacks weights, which would begin at random: model.layers.2.* and 6 more; correct"),
        ({"attention_bias": True}, r"lacks weights, which would begin at random: .*bias.*; correct model.config"),
        ({"num_attention_heads": 3}, r"model.path='.*', model.config={.*}: transformers cannot make this model \(.*\)"),
        ({"hidden_size": "many"}, r"model.config={'hidden_size': 'many'}: transformers cannot make this model \(.*\)"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line_and_no_weight_is_drawn_anew(llama, capfd, fields, message):
    with pytest.raises(ValueError, match=message) as raised:
        built(llama, **fields)
    assert "\n" not in str(raised.value)
    assert "LOAD REPORT" not in capfd.readouterr().err  # a table, of each rank


def test_a_folder_without_all_weights_is_refused_and_weights_without_a_place_are_named(llama, caplog):
    logging.getLogger("flexsp").propagate = True
    assert len(built(llama, num_hidden_layers=1).model.layers) == 1
    assert "weights that the model does not have are not taken: model.layers.1.input_layernorm.weight" in caplog.text
    said = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**said, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"lacks weights, which would begin at random: .*; give a whole model"):
        built(llama)


def test_the_same_model_type_may_be_said_again(llama):
    assert same_weights(built(llama, model_type="llama"), built(llama))
