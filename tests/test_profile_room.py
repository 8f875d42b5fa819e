"""What `flexsp profile` says of memory beforehand against what ranks hold, and how it ends where that runs out."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flexsp.estimate import model_shape
from flexsp.profiler.parts import needed_bytes, pinned_bytes

pytestmark = pytest.mark.alone

WIDE_HEAD = {
    "model_type": "llama", "vocab_size": 64000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 7,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
}  # fmt: skip
FLAGS = ("--probe-tokens", "128", "--max-tokens-per-rank", "128", "--sp-degrees", "1")

HOLDING = """
import os, sys
from flexsp.cli.main import main
from flexsp.profiler import memory

most, reset = 0, memory.PeakMeter.reset


def note():
    global most
    most = max(most, memory._status_bytes("VmHWM"))


def noting(meter, trim=False):
    note()  # before the high-water mark starts anew
    reset(meter, trim)


memory.PeakMeter.reset = noting
status = main(sys.argv[1:])
note()
if os.environ["RANK"] == "0":
    print(f"held {most} bytes")
sys.exit(status)
"""

SQUEEZED = """
import os, resource, sys
from flexsp.cli.main import main
from flexsp.profiler import layers
from flexsp.profiler.memory import _status_bytes

prepare = layers.prepare_model


def squeezed(model, **settings):
    if os.environ["RANK"] == "1":  # what others have come to use since the memory was looked at
        most = _status_bytes("VmData") + 48 * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    return prepare(model, **settings)


layers.prepare_model = squeezed
sys.exit(main(sys.argv[1:]))
"""


def run(folder: Path, script: str, *flags: str) -> subprocess.CompletedProcess[str]:
    (folder / "config.json").write_text(json.dumps(WIDE_HEAD))
    (folder / "script.py").write_text(script)
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "script.py", "profile", "config.json"]
    return subprocess.run(
        [sys.executable, *command, "--output", "profile.json", *flags], cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peaks are read from /proc")
def test_the_memory_said_beforehand_is_about_what_is_held(tmp_path):
    done = run(tmp_path, HOLDING, *FLAGS)
    assert done.returncode == 0, done.stderr[-3000:]
    said = 2**30 * float(re.search(r"measuring will hold about ([\d.]+) of", done.stdout).group(1))
    held = int(re.search(r"held (\d+) bytes", done.stdout).group(1))
    assert 0.7 * said < held < 1.4 * said


@pytest.mark.timeout(400)
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_DATA counts all private memory on Linux alone")
def test_memory_that_runs_out_is_one_line_and_status_1_on_every_rank(tmp_path):
    done = run(tmp_path, SQUEEZED, *FLAGS)
    assert done.returncode == 1
    ours = [line for line in done.stderr.splitlines() if line.startswith("flexsp profile:")]
    assert ours == [
        "flexsp profile: out of memory on rank 1 while measuring rows of up to 128 tokens a rank; give fewer with "
        "--probe-tokens"
    ], done.stderr[-3000:]
    assert "flexsp/" not in done.stderr  # no traceback of ours on any rank
    killed = re.findall(r"exitcode\s*: -\d+", done.stderr)
    assert all(each.endswith("-15") for each in killed)  # by torchrun, where a rank had not noticed by itself
    assert not (tmp_path / "profile.json").exists()


MIXTRAL_8X22B = {
    "model_type": "mixtral", "vocab_size": 32768, "hidden_size": 6144, "intermediate_size": 16384,
    "num_hidden_layers": 56, "num_attention_heads": 48, "num_key_value_heads": 8, "num_local_experts": 8,
    "num_experts_per_tok": 2,
}  # fmt: skip
LLAMA_405B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 16384, "intermediate_size": 53248,
    "num_hidden_layers": 126, "num_attention_heads": 128, "num_key_value_heads": 8,
}  # fmt: skip


@pytest.mark.parametrize("fields", [MIXTRAL_8X22B, LLAMA_405B], ids=["Mixtral-8x22B", "Llama-405B"])
def test_eight_ranks_share_the_states_of_a_part(fields):
    shape = model_shape(fields)
    limit = 0.9 * 80 * 2**30
    assert needed_bytes(shape, 2048, ranks=1) > limit > needed_bytes(shape, 2048, ranks=8)
    # however many there are, each builds a part whole before it is sharded
    assert needed_bytes(shape, 1, ranks=1 << 20) >= 4 * 3 * shape.layer_parameters


def test_offload_holds_on_the_host_what_the_largest_row_keeps():
    shape = model_shape(LLAMA_405B)
    assert pinned_bytes(shape, 4096, "bfloat16") == 3 * 4096 * sum(shape.kept_bytes_per_layer(2).values())
