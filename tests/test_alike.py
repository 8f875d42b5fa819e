"""Ranks that were not started alike end with one error that names what differs; each trained wrongly before.

Weights cannot differ: they are rank 0's.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, LlamaConfig

from fault_runs import one_line

SAME = r": it must be the same on all ranks; start all nodes with one configuration and the same packages"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("other_lr", rf"train\.lr=0\.001 on rank 0, 1\.0 on rank 1{SAME}"),
        ("other_every", rf"checkpoint\.every=0 on rank 0, 3 on rank 1{SAME}"),
        ("other_options", rf"train\.optimizer_options\.amsgrad=nothing on rank 0, True on rank 1{SAME}"),
        ("other_kind_of_place", rf"planner\.profile=True on rank 0, False on rank 1{SAME}"),
        ("other_version", rf"version of numpy='[0-9.]+' on rank 0, '1\.0\.7' on rank 1{SAME}"),
        (
            "other_architecture",
            r"model=LlamaForCausalLM: rank 1 has a parameter of shape \(32, 32\) as "
            r"model\.layers\.2\.self_attn\.q_proj\.weight, rank 0 nothing; build the same model on all ranks",
        ),
    ],
)
def test_what_differs_is_named_with_its_values_and_ranks(launcher, fault, said):
    ended = launcher.run(fault)
    assert ended.statuses == [2, 2]
    one_line(ended, said)
    assert not (launcher.folder / f"out-{fault}/metrics.jsonl").exists()


def test_another_profile_is_named_by_its_first_field(launcher):
    document = json.loads((launcher.folder / "profile.json").read_text())
    document["compute"]["fixed_s"] *= 2
    (launcher.folder / "profile-of-another-node.json").write_text(json.dumps(document))
    ended = launcher.run("other_profile")
    assert ended.statuses == [2, 2]
    one_line(ended, r"planner\.profile: compute\.fixed_s=\S+ on rank 0, \S+ on rank 1: it must be .* the same file")


def test_where_a_node_keeps_things_may_differ(launcher):
    ended = launcher.run("other_places")
    assert (ended.statuses, ended.err) == ([0, 0], "")


def save_model(folder: Path, **changes: object) -> None:
    config = LlamaConfig(
        vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    written = folder / "config.json"
    written.write_text(json.dumps(json.loads(written.read_text()) | changes))


PATH = ("--model.config", "{}", "--model.path", "model")


def test_a_node_whose_model_computes_something_else_is_named(launcher):
    save_model(launcher.folder / "model")
    save_model(launcher.folder / "model-of-another-node", hidden_act="relu")
    ended = launcher.run("other_model", *PATH)
    assert ended.statuses == [2, 2]
    one_line(
        ended,
        r"model\.path: hidden_act='silu' on rank 0, 'relu' on rank 1: it must be the same on all ranks; give all nodes "
        r"the same config\.json",
    )


def test_weights_lie_on_the_node_of_rank_0_alone(launcher):
    save_model(launcher.folder / "model")
    save_model(launcher.folder / "model-of-another-node", transformers_version="4.0.0")
    (launcher.folder / "model-of-another-node/model.safetensors").unlink()
    ended = launcher.run("other_model", *PATH, "--run.dir", "out-weights")
    assert (ended.statuses, ended.err) == ([0, 0], "")


@pytest.mark.parametrize("left_bytes", [None, 1000])
def test_weights_that_rank_0_cannot_load_end_all_ranks_with_one_line(launcher, left_bytes):
    save_model(launcher.folder / "model")
    weights = launcher.folder / "model/model.safetensors"
    if left_bytes is None:
        weights.unlink()
    else:
        os.truncate(weights, left_bytes)
    ended = launcher.run("none", *PATH, "--run.dir", "out-broken")
    assert ended.statuses == [2, 2]
    one_line(ended, r"model\.path='model': transformers cannot make this model \(.*\); correct it")


def test_a_node_without_the_models_config_is_named(launcher):
    save_model(launcher.folder / "model")
    shutil.rmtree(launcher.folder / "model-of-another-node", ignore_errors=True)
    ended = launcher.run("other_model", *PATH)
    assert ended.statuses == [2, 2]
    one_line(
        ended,
        r"rank 1: model\.path='model-of-another-node': transformers cannot make this model \(.*\); correct it",
    )
