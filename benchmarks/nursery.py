"""Starts ranks quickly: imports torch, transformers and flexsp once, then forks every rank of every start.

    python benchmarks/nursery.py        (kills.py starts it)

A line of JSON on standard input asks for ranks: {"world_size": 4, "folder": DIR, "arguments": ["train", ...], "log":
FILE, "port": PORT}; the answer is {"pids": [...]}, by rank. {"reap": true} answers {"ended": {pid: exit status}}, below
zero for a signal. A rank has the environment that torchrun gives it, but for the agent's store: rank 0 serves its own.
It ends as any Python program does, so that a thread which does not end would be seen.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any


def main() -> int:
    from transformers import LlamaForCausalLM  # noqa: F401  what a lazy module imports later otherwise

    import flexsp.train.run
    from flexsp.cli.main import main as flexsp

    assert len(os.listdir("/proc/self/task")) == 1, "forking is safe in a process of one thread alone"
    versions = {name: sys.modules[name].__version__ for name in ("flexsp", "torch", "transformers")}
    print(json.dumps(versions), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "reap" in request:
            print(json.dumps({"ended": ended()}), flush=True)
            continue
        pids = []
        for rank in range(request["world_size"]):
            pids.append(os.fork())
            if pids[-1] == 0:
                become_rank(rank, request)
                return flexsp(request["arguments"])
        print(json.dumps({"pids": pids}), flush=True)
    return 0


def ended() -> dict[int, int]:
    """Exit statuses of the ranks that have ended since they were last asked for."""
    found = {}
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if pid == 0:
            return found
        found[pid] = os.waitstatus_to_exitcode(status)


def become_rank(rank: int, request: dict[str, Any]) -> None:
    """In a forked child: what torchrun would have started it with."""
    nothing, log = os.open(os.devnull, os.O_RDONLY), os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.chdir(Path(request["folder"]))
    world_size = str(request["world_size"])
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0", "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(request["port"]),
    }  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
