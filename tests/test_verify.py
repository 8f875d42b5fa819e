"""`flexsp verify` from the command line: equal, not equal, refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import CONFIG_MAPPING

from fault_runs import one_line
from flexsp.cli.main import main
from flexsp.parallel.small import small_config
from flexsp.train import verify

pytestmark = pytest.mark.alone

MIXTRAL = {
    "model_type": "mixtral", "vocab_size": 3000, "hidden_size": 96, "intermediate_size": 640, "num_hidden_layers": 7,
    "num_attention_heads": 6, "num_key_value_heads": 3, "num_local_experts": 16, "sliding_window": 512,
    "router_jitter_noise": 0.0, "max_position_embeddings": 4096,
}  # fmt: skip
LONGROPE = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
}  # fmt: skip


def on_two_ranks(folder: Path, config: dict[str, object], *flags: str) -> subprocess.CompletedProcess[str]:
    (folder / "config.json").write_text(json.dumps(config))
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "flexsp", "verify", str(folder), *flags]
    return subprocess.run(
        [sys.executable, *command], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=200, check=False,
    )  # fmt: skip


def alone(folder: Path, config: dict[str, object], *flags: str) -> int:
    (folder / "config.json").write_text(json.dumps(config))
    return main(["verify", str(folder), *flags])


def test_a_model_is_compared_with_one_device_on_the_ranks(tmp_path):
    done = on_two_ranks(tmp_path, MIXTRAL)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert lines[0] == "mixtral: a small model in float64, 2 of 7 layers"
    assert lines[1] == "as in the model: num_attention_heads=6, num_key_value_heads=3, head_dim=16"
    assert "sliding_window=16 (512)" in lines[2]
    assert "num_local_experts=8 (16)" in lines[2]
    assert lines[3].startswith("sequences of up to 64 tokens, longer than the windows")
    assert lines[4].startswith("<1> <2>, most Ulysses: loss ")
    assert lines[5].startswith("<1> <2>, ring alone: loss ")
    assert lines[6].startswith("equal: on 2 ranks loss and gradients differ by at most ")


def test_a_refused_model_is_one_line_and_status_2(tmp_path):
    done = on_two_ranks(tmp_path, LONGROPE)
    assert "exitcode  : 2" in done.stderr  # torchrun's own status is 1
    said = [line for line in done.stderr.splitlines() if line.startswith("flexsp verify")]
    assert len(said) == 1
    assert "flexsp verify: refused: rope_type='dynamic' of LlamaForCausalLM depends on" in said[0]
    assert "Traceback (most recent call last)" not in done.stderr.partition(said[0])[0]


@pytest.mark.parametrize(
    ("config", "flags", "message"),
    [
        (LONGROPE, [], "refused: rope_type='dynamic'"),
        ({**MIXTRAL, "output_router_logits": True}, [], "refused: output_router_logits=True of MixtralForCausalLM"),
        ({"model_type": "t5"}, [], "refused: model_type='t5' has no causal language model in transformers"),
        ({"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1}, [], "refused: model=MambaForCausalLM"),
        ({**MIXTRAL, "hidden_size": "wide"}, [], "transformers cannot make a config of it ("),
        ({**MIXTRAL, "num_attention_heads": 7}, [], "refused: no small model of model_type='mixtral' runs"),
        (MIXTRAL, ["--layers", "0"], "--layers=0 must be at least 1"),
        (MIXTRAL, ["--tolerance", "-1"], "--tolerance=-1.0 must not be negative"),
    ],
)
def test_what_cannot_be_verified_is_one_line_and_status_2(tmp_path, capsys, config, flags, message):
    assert alone(tmp_path, config, *flags) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_the_dtype_and_the_layers_are_the_users(tmp_path, capsys):
    assert alone(tmp_path, MIXTRAL, "--dtype", "float32", "--layers", "3") == 0
    said = capsys.readouterr().out
    assert "mixtral: a small model in float32, 3 of 7 layers" in said
    assert "equal: on 1 rank loss" in said


def test_a_wrong_result_is_found_and_exits_with_1(tmp_path, capsys, monkeypatch):
    def off_by_one(model, batch):
        """A device whose windows are a token wider."""
        for layer in model.model.layers:
            layer.self_attn.sliding_window = None
        model.config.sliding_window += 1
        return one_device(model, batch)

    one_device = verify.one_device
    monkeypatch.setattr(verify, "one_device", off_by_one)
    assert alone(tmp_path, MIXTRAL) == 1
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert verdict.startswith("not equal: on 1 rank loss and gradients differ by at most ")
    assert verdict.endswith("beyond the tolerance of 1e-05")


KINDS = {
    "llama": ({}, 2, None),
    "gemma3_text": ({"num_hidden_layers": 26}, 6, ["sliding_attention"] * 5 + ["full_attention"]),  # a whole period
    "gpt_oss": ({"num_hidden_layers": 24}, 2, ["sliding_attention", "full_attention"]),
    "deepseek_v3": ({"num_hidden_layers": 61}, 2, None),  # one dense, one of experts
    "gemma3n_text": ({}, 8, ["sliding_attention", "full_attention"] * 4),  # half share the others' keys and values
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_model_has_each_kind_of_layer_and_its_own_heads(kind):
    fields, layers, layer_types = KINDS[kind]
    config = CONFIG_MAPPING[kind](**fields)
    before = config.to_dict()
    small = small_config(config, window=16)
    assert small.num_hidden_layers == layers
    assert layer_types is None or small.layer_types == layer_types
    for field in ("num_attention_heads", "num_key_value_heads", "head_dim"):
        assert getattr(small, field) == getattr(config, field)
    assert small.hidden_size < 1024
    assert (getattr(config, "sliding_window", None) is None) or small.sliding_window == 16
    assert config.to_dict() == before


def test_a_rank_that_fails_is_one_line_with_its_rank(launcher):
    """It was a traceback of each rank."""
    (launcher.folder / "mixtral.json").write_text(json.dumps(MIXTRAL))
    ended = launcher.run("raises_in_verify", "mixtral.json", command="verify")
    assert ended.statuses == [1, 1]
    kept = "flexsp-verify/error-rank-1.txt"
    one_line(ended, rf"rank 1, comparing with one device: RuntimeError: the fan has stopped \(traceback in {kept}\)")
    assert "fault_cases.py" in (launcher.folder / kept).read_text()


def test_sigterm_is_not_taken_for_equal(launcher):
    ended = launcher.run("asked_in_verify", "mixtral.json", command="verify")
    assert ended.statuses == [143, 143]
    one_line(ended, r"stopped by SIGTERM while comparing with one device")
