"""Several nodes: two agents of torchrun on one machine, each with its own copies of all that may be local."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from flexsp.train.checkpoint import saved_checkpoints
from profiles import profile_json

CONFIG = """
[model]
path = "model"
replicate = 2
[data]
source = "rows.jsonl"
cache_dir = "cache"
max_length = 64
[planner]
profile = "profile.json"
correct = false
[train]
steps = 4
batch_size = 4
[checkpoint]
every = 2
[run]
dir = "{shared}"
save_model = false
timeout_s = 120
"""


@pytest.fixture
def nodes(tmp_path) -> list[Path]:
    """Folders in which the agents of two nodes are started: the same paths lead to files of their own."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    folders = [tmp_path / "one", tmp_path / "two"]
    for folder in folders:
        folder.mkdir()
        model.save_pretrained(folder / "model")
        rows = [{"input_ids": [(7 * row + i) % 64 for i in range(5 + row)]} for row in range(40)]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        provenance = {"source": "estimated", "max_tokens_per_rank": 100}
        (folder / "profile.json").write_text(json.dumps(profile_json(2, 100, provenance=provenance)))
        (folder / "config.toml").write_text(CONFIG.format(shared=tmp_path / "run"))
    return folders


def start(nodes: list[Path], ranks: int = 1, *flags: str) -> list[subprocess.Popen[str]]:
    """The agents, each of which starts so many ranks."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", str(ranks),
                "--rdzv-backend", "c10d", "--rdzv-endpoint", f"localhost:{port}", "--rdzv-id", "run-1",
                "-m", "flexsp", "train", "config.toml", *flags,
            ],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=node, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for node in nodes
    ]  # fmt: skip


def train(nodes: list[Path]) -> tuple[list[int], str]:
    """Statuses of the agents, and what all ranks print."""
    agents = start(nodes)
    said = "".join(agent.communicate(timeout=250)[0] for agent in agents)
    return [agent.returncode for agent in agents], said


@pytest.mark.slow
@pytest.mark.timeout(800)
def test_nodes_share_the_run_s_folder_and_nothing_else(nodes, tmp_path):
    statuses, said = train(nodes)
    assert statuses == [0, 0], said[-3000:]
    for node in nodes:  # each has built a store of its own
        assert list((node / "cache" / "shards").glob("*/*/tokens.bin"))
    before, last = saved_checkpoints(tmp_path / "run")
    shutil.rmtree(last)
    assert {path.name for path in before.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
    statuses, said = train(nodes[::-1])
    assert statuses == [0, 0] and "checkpoint: going on after step 2 of 4" in said, said[-3000:]

    config = nodes[1] / "config.toml"
    text = config.read_text()
    config.write_text(text.replace(str(tmp_path / "run"), str(tmp_path / "elsewhere")))
    statuses, said = train(nodes)
    assert 0 not in statuses and "run.dir=" in said and "it must be the same on all ranks" in said, said[-3000:]

    config.write_text(text)
    shutil.rmtree(nodes[1] / "cache")
    (nodes[1] / "rows.jsonl").write_text(json.dumps({"input_ids": [1, 2, 3]}) + "\n")
    statuses, said = train(nodes)
    assert 0 not in statuses and "see other tokens than rank 0" in said, said[-3000:]


def below(pid: int) -> dict[int, bytes]:
    """The processes that it has started, and those that they have, each with its environment."""
    found: dict[int, bytes] = {}
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found |= {child: b"\0" + Path(f"/proc/{child}/environ").read_bytes(), **below(child)}
    return found


def kill(pids: list[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_of_ranks_that_are_left_when_the_node_of_rank_0_is_lost_one_says_so(nodes, tmp_path):
    """With that node torchrun's store is lost, so that they can tell nothing of each other, and blame no rank."""
    agents = start(nodes, 2, "--train.steps", "100000")
    rows = tmp_path / "run" / "metrics.jsonl"
    try:
        until = time.monotonic() + 150
        while not (rows.exists() and rows.read_text().count("\n") > 2) and time.monotonic() < until:
            time.sleep(0.1)
        processes = {agent: below(agent.pid) for agent in agents}
        first = next(agent for agent in agents if any(b"\0RANK=0\0" in found for found in processes[agent].values()))
        (left,) = set(agents) - {first}
        kill([first.pid, *processes[first]])
        said, _ = left.communicate(timeout=100)  # whose output its ranks hold open as long as they live
    finally:
        for agent in agents:
            kill([agent.pid, *below(agent.pid)])
            agent.communicate()
    lines = re.findall("flexsp train: (.*)", said)
    assert len(lines) == 1, said[-3000:]
    assert re.fullmatch(
        r"step \d+, rank 2, .*: a collective failed, and torchrun's store on MASTER_ADDR=\S+ has ended "
        r"\(is that node lost, or stopped\?\)",
        lines[0],
    )
