"""Runs of `flexsp train` with a fault, started by `fault_launcher`: the folder that they run in, and what they say."""

from __future__ import annotations

import json
import os
import random
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from profiles import profile_json

CONFIG = """
[model]
config = { model_type = "llama", vocab_size = 256, hidden_size = 32, intermediate_size = 64, num_hidden_layers = 2, num_attention_heads = 4, num_key_value_heads = 2, max_position_embeddings = 256 }
[data]
source = "rows.jsonl"
cache_dir = "data"
max_length = 256
[planner]
profile = "profile.json"
correct = false
timeout_s = 20
[train]
steps = 5
batch_size = 8
[checkpoint]
every = 0
[run]
dir = "out"
save_model = false
timeout_s = 60
"""  # noqa: E501
ANSWER_S = 200.0
"""What a test waits for at the most; a hang is longer."""


@dataclass(frozen=True)
class Ended:
    """A run that has ended, of whatever kind."""

    statuses: list[int]
    out: str
    err: str
    seconds: float
    """From the start of the ranks to the end of the last."""

    @property
    def said(self) -> list[str]:
        """Our lines."""
        ours = re.compile("flexsp (train|verify|profile): (.*)")
        return [found[2] for line in self.err.splitlines() if (found := ours.match(line))]


class Launcher:
    """Starts runs in one folder; see `fault_launcher`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._child = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fault_launcher.py"))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        self._answer()

    def run(
        self, fault: str, *flags: str, world_size: int = 2, agent: bool = True, kill_after_s: float = 30,
        command: str = "train", node_size: int | None = None,
    ) -> Ended:  # fmt: skip
        """A run with a fault of `fault_cases`, in a folder `out-FAULT`; no process of it is left.

        `node_size`: ranks of a node, as far as the ranks can see; None: all.
        """
        name = f"{self.folder}/{fault}/{' '.join(flags)}"
        arguments = ["config.toml", "--run.dir", f"out-{fault}"] if command == "train" else []
        request = {
            "fault": fault, "arguments": [command, *arguments, *flags], "world_size": world_size, "agent": agent,
            "cwd": str(self.folder), "kill_after_s": kill_after_s, "name": name,
            "node_size": node_size or world_size,
        }  # fmt: skip
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps(request) + "\n")
        answer = json.loads(self._answer())
        assert left_over(name) == []
        return Ended(answer["statuses"], answer["out"], answer["err"], answer["seconds"])

    def _answer(self) -> str:
        assert self._child.stdout is not None
        ready, _, _ = select.select([self._child.stdout], [], [], ANSWER_S)
        if not ready:
            self.close()
            raise AssertionError(f"the run has not ended within {ANSWER_S} s")
        return self._child.stdout.readline()

    def close(self) -> None:
        os.killpg(self._child.pid, 9)
        self._child.communicate()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Corpus, profile and configuration of a run that takes a second."""
    made = tmp_path_factory.mktemp("faults")
    draw = random.Random(0)
    rows = [[draw.randrange(256) for _ in range(draw.randrange(4, 120))] for _ in range(200)]
    (made / "rows.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    provenance = {"source": "estimated", "max_tokens_per_rank": 400}
    for devices in (2, 4):
        document = profile_json(devices, 400, provenance=provenance)
        (made / f"profile{devices if devices > 2 else ''}.json").write_text(json.dumps(document))
    (made / "config.toml").write_text(CONFIG)
    return made


@pytest.fixture(scope="module")
def launcher(folder: Path) -> Iterator[Launcher]:
    made = Launcher(folder)
    yield made
    made.close()


def left_over(name: str) -> list[str]:
    """What still runs of a run a few seconds after its ranks have ended: planners, whose input has."""
    found: list[str] = []
    until = time.monotonic() + 10.0
    while time.monotonic() < until:
        found = list(_processes(f"FLEXSP_TEST_RUN={name}"))
        if not found:
            break
        time.sleep(0.1)
    return found


def _processes(variable: str) -> Iterator[str]:
    """Command lines of processes that were started with this variable and are no zombies."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.fsencode(variable) in (path / "environ").read_bytes().split(b"\0"):
                yield (path / "cmdline").read_text()
        except OSError:
            continue


def one_line(ended: Ended, pattern: str) -> None:
    """One line of ours, which says this, and no traceback."""
    assert len(ended.said) == 1, ended.err[-3000:]
    assert re.fullmatch(pattern, ended.said[0]), ended.said[0]
    assert "Traceback" not in ended.err and 'File "' not in ended.err, ended.err[-3000:]
