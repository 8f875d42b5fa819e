"""`flexsp profile` from the command line, as torchrun starts it, and the parts of a model that it builds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig

import flexsp
from flexsp import Profile
from flexsp.cli.main import main
from flexsp.estimate import model_shape
from flexsp.parallel.model import check_model
from flexsp.profiler.alike import check_alike
from flexsp.profiler.parts import SMALL_VOCABULARY, build_part, needed_bytes, parts_of, read_model_config

pytestmark = pytest.mark.alone

LLAMA = {
    "model_type": "llama", "vocab_size": 3000, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 7,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip


def measure(folder: Path, *flags: str, world_size: int = 2) -> subprocess.CompletedProcess[str]:
    command = ["-m", "torch.distributed.run", "--nproc-per-node", str(world_size), "-m", "flexsp", "profile"]
    return subprocess.run(
        [sys.executable, *command, "config.json", "--output", "profile.json", *flags], cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip


def test_a_model_is_measured_by_few_of_its_layers_and_the_rest_of_a_cluster_estimated(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    done = measure(tmp_path, "--probe-tokens", "128", "--cluster", "h100", "--num-devices", "8")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "measuring will hold about" in done.stdout.splitlines()[0]
    (doubt,) = [line for line in done.stdout.splitlines() if "which is not the NVIDIA H100" in line]
    assert "saved as profile.json" in done.stdout.splitlines()[-1]
    profile = Profile.load(tmp_path / "profile.json")
    provenance = profile.provenance
    assert (profile.num_devices, profile.sp_degrees) == (8, (1, 2, 4, 8))
    assert provenance["source"] == "mixed"
    assert provenance["fields"]["compute.linear_s"] == "measured"
    assert provenance["fields"]["all_to_all.bandwidth_bytes_per_s.2"] == "measured"
    assert provenance["fields"]["all_to_all.bandwidth_bytes_per_s.4"].startswith("estimated")
    assert "measured on 3, 1, 1 layers with vocabularies of 1024, 1024, 3000" in provenance["assumptions"][0]
    assert {(p["layers"], round(p["head"] * 3000)) for p in provenance["points"]} == {(3, 1024), (1, 1024), (1, 3000)}
    assert all(p["layers"] == 3 for p in provenance["points"] if p["degree"] > 1)
    assert doubt.removeprefix("profile: ") in provenance["assumptions"]
    share = 16 * model_shape(LLAMA).num_parameters / 8
    assert profile.memory.model_state_bytes - profile.memory.unsharded_bytes == pytest.approx(share, abs=2)
    assert provenance["fit"]["held_out"] == 6
    assert flexsp.plan([100, 900, 60], profile).has_plan
    assert main(["show", str(tmp_path / "profile.json")]) == 0


def status_of(*argv: object) -> int:
    """What the command ends with; what goes wrong on the ranks ends the process, this one."""
    try:
        return main([str(each) for each in argv])
    except SystemExit as ended:
        return int(ended.code or 0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--output", "/"], "--output=/ cannot be written; give a file"),
        (["--output", ""], "--output=. cannot be written; give a file"),
        (["--sp-degrees", "3"], "sp_degree=3 is not between 1 and world_size=1"),
        (["--sp-degrees", "1,x"], "--sp-degrees='1,x' must be positive integers"),
        (["--probe-tokens", "900000K"], "--probe-tokens=921600000: measuring would hold about"),
        (["--num-devices", "8"], "--num-devices=8 needs --cluster"),
        (["--cluster", "toaster"], "cluster='toaster' is unknown; choose one of a100-40"),
        (["--cluster", "h100", "--num-devices", "9"], "num_devices=9"),
        (["--memory-fraction", "0"], "--memory-fraction=0.0 must be above 0"),
    ],
)
def test_bad_flags_are_one_line_and_status_2(tmp_path, capsys, flags, message):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert status_of("profile", tmp_path, "--output", tmp_path / "p.json", *flags) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert message in said[0]
    assert not (tmp_path / "p.json").exists()


EIGHT_B = {
    **LLAMA, "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "ways"),
    [
        ([], r"num_devices=1,.*use --cluster NAME --num-devices \d+ or more, or \d+ ranks of as much memory, or"),
        (["--cluster", "h100", "--num-devices", "2"], r"num_devices=2,.*; use --num-devices \d+ or more, or"),
        (["--weights", "bfloat16"], r"\(8 bytes for each of 109,\d+,\d+,\d+ parameters"),
    ],
)
def test_a_model_whose_states_do_not_fit_is_refused_before_anything_is_measured(tmp_path, capsys, flags, ways):
    """109 billion parameters: 1.7 TB of model states, of which little is in one layer."""
    (tmp_path / "config.json").write_text(json.dumps({**EIGHT_B, "num_hidden_layers": 500, "vocab_size": 256}))
    flags = ["--memory-fraction", "0.5", *flags]
    assert status_of("profile", tmp_path, "--output", tmp_path / "p.json", *flags) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert "GiB" in line
    assert re.search(ways, line), line


@pytest.mark.slow
def test_a_model_too_large_for_the_ranks_at_hand_is_measured_for_a_cluster_that_holds_it(tmp_path, capsys):
    """1.7 billion parameters: 27 GB of model states, on one rank with a limit of half of this machine's memory."""
    wide = {**LLAMA, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 100, "vocab_size": 256}
    (tmp_path / "config.json").write_text(json.dumps(wide))
    output = tmp_path / "p.json"
    flags = ["profile", str(tmp_path), "--output", str(output), "--probe-tokens", "128", "--memory-fraction", "0.5"]
    assert main([*flags, "--cluster", "h100", "--num-devices", "64", "--sp-degrees", "2,4"]) == 0
    profile = Profile.load(output)
    states = 16 * model_shape(wide).num_parameters
    assert states > profile.memory.memory_bytes > profile.memory.model_state_bytes > states / 64
    assert profile.sp_degrees == (2, 4)
    assert status_of(*flags[:3], tmp_path, *flags[4:]) == 2
    assert "cannot be written; give a file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"config.json: is not JSON"),
        ('{"model_type": "nonesuch"}', r"config.json: model_type='nonesuch' is unknown to transformers"),
        ('{"hidden_size": 3}', r"config.json: the field 'model_type' is missing"),
    ],
)
def test_a_broken_config_is_named(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        read_model_config(tmp_path)
    assert len(str(raised.value).splitlines()) == 1


ALIKE = {
    "llama": {},
    "mistral": {"sliding_window": 16},
    "mixtral": {},
    "qwen2": {},
    "qwen2, all with a window": {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0},
    "qwen3": {},
    "gemma3_text": {"layer_types": ["full_attention"] * 7},
    "qwen3_moe": {},
    "smollm3": {},
}


@pytest.mark.parametrize("kind", ALIKE)
def test_models_whose_layers_are_alike_are_taken(kind):
    config = config_of(kind.split(",")[0], ALIKE[kind])
    check_alike(config, model_shape(config.to_dict()))


UNLIKE = {
    "gemma3_text": ({"num_hidden_layers": 26}, r"layer_types=.*\(22 x sliding_attention, 4 x full_attention\)"),
    "gemma2": ({}, r"layer_types="),
    "qwen2": ({"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3}, r"layer_types="),
    "qwen2_moe": ({"mlp_only_layers": [0, 1, 2]}, r"mlp_only_layers=\[0, 1, 2\].*3 of 7 layers have no experts"),
    "qwen3_moe": ({"decoder_sparse_step": 2}, r"decoder_sparse_step=2.*layers have no experts"),
    "glm4_moe": ({"first_k_dense_replace": 1}, r"first_k_dense_replace=1"),
}


@pytest.mark.parametrize("kind", UNLIKE)
def test_models_whose_layers_differ_are_refused_by_the_field_that_says_so(kind):
    fields, message = UNLIKE[kind]
    config = config_of(kind, fields)
    before = config.to_dict()
    with pytest.raises(ValueError, match=message + r".*measure the whole model with flexsp train"):
        check_alike(config, model_shape(config.to_dict()))
    assert config.to_dict() == before


def test_layers_that_no_known_field_tells_apart_are_found_by_their_parameters():
    config = config_of("ernie4_5_moe", {"moe_layer_start_index": 1})
    with pytest.raises(ValueError, match=r"moe_layer_start_index=1.*layer 1 has other parameters than layer 0"):
        check_alike(config, model_shape(LLAMA))


def test_the_command_refuses_layers_that_differ(tmp_path, capsys):
    fields = {**LLAMA, "model_type": "gemma2"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    assert main(["profile", str(tmp_path), "--output", str(tmp_path / "p.json")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "layer_types=" in line


def config_of(kind: str, fields: dict[str, object]) -> PreTrainedConfig:
    """A small config of another kind."""
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0)
    return AutoConfig.for_model(
        kind, **{name: v for name, v in {**LLAMA, **special, **fields}.items() if name != "model_type"}
    )


KINDS = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "gpt_neox": {"num_key_value_heads": 4},
    "olmo2": {},
    "granite": {},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_part_has_as_many_layers_and_as_large_a_vocabulary_as_asked(kind):
    fields = {**LLAMA, "pad_token_id": 2999, **KINDS[kind]}
    fields.pop("model_type")
    config = AutoConfig.for_model(kind, **fields)
    before = config.to_dict()
    model = build_part(config, layers=2, vocabulary=50, longest=5000, device=torch.device("cpu"))
    check_model(model)
    whole = model_shape(before)
    part = model_shape(model.config.to_dict())
    assert (part.num_layers, part.vocab_size) == (2, 50)
    assert part.layer_parameters == whole.layer_parameters
    assert sum(p.numel() for p in model.parameters()) == part.num_parameters
    assert model.config.max_position_embeddings == 5000
    assert config.to_dict() == before


def test_the_parts_tell_layers_and_head_apart_and_are_small():
    shape = model_shape(EIGHT_B)
    parts = parts_of(shape)
    assert [part.layers for part in parts] == [3, 1, 1]
    assert [round(part.head * 128256) for part in parts] == [SMALL_VOCABULARY, SMALL_VOCABULARY, 128256]
    whole = 16 * shape.num_parameters
    assert needed_bytes(shape, 1024) < 0.4 * whole
    assert needed_bytes(shape, 65536) > needed_bytes(shape, 1024)
    (only,) = parts_of(model_shape({**LLAMA, "vocab_size": 256, "num_hidden_layers": 2}))
    assert only.whole
