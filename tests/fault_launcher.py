"""A launcher that starts ranks as torchrun does, in half a second: they are forked with all imports done.

What torchrun gives a rank it gets here too: the environment, the agent's store, SIGTERM once another rank has failed
and SIGKILL after a while. Requests and answers are JSON lines.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from datetime import timedelta


def serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import torch

    import flexsp.cli.main
    import flexsp.train.run
    import flexsp.train.verify  # noqa: F401

    torch.set_num_threads(1)
    answers.write("ready\n")
    answers.flush()
    for line in sys.stdin:
        request = json.loads(line)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            store = serve_store(port) if request["agent"] else 0
            os.environ["FLEXSP_TEST_STORE"] = str(store)
            ranks = [start(rank, port, request, out.fileno(), err.fileno()) for rank in range(request["world_size"])]
            began = time.monotonic()
            statuses = wait_for(ranks, request["kill_after_s"])
            if store:
                os.kill(store, signal.SIGKILL)
                os.waitpid(store, 0)
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode())
        answer = {"statuses": statuses, "out": texts[0], "err": texts[1], "seconds": time.monotonic() - began}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def serve_store(port: int) -> int:
    """The agent's store, in a process that a fault may stop or end; its process id."""
    pid = os.fork()
    if pid:
        return pid
    import torch.distributed as dist

    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=300))
    while store:
        signal.pause()
    os._exit(0)


def start(rank: int, port: int, request: dict, out: int, err: int) -> int:
    """A rank; its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 70
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(request["cwd"])
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank % request["node_size"]),
            "WORLD_SIZE": str(request["world_size"]), "LOCAL_WORLD_SIZE": str(request["node_size"]),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        os.environ["FLEXSP_TEST_RUN"] = request["name"]
        if request["agent"]:
            os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
        import fault_cases
        from flexsp.cli.main import main

        getattr(fault_cases, request["fault"])()
        status = main(request["arguments"])
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def wait_for(ranks: list[int], kill_after_s: float) -> list[int]:
    """What each ended with, negative where a signal ended it. Once one has failed the others are told to end."""
    statuses: dict[int, int] = {}
    told_at = 0.0
    while len(statuses) < len(ranks):
        for pid in set(ranks) - set(statuses):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                statuses[pid] = os.waitstatus_to_exitcode(status)
        left = set(ranks) - set(statuses)
        if any(statuses.values()) and not told_at:
            told_at = time.monotonic()
            for pid in left:
                os.kill(pid, signal.SIGTERM)
        if told_at and time.monotonic() > told_at + kill_after_s:
            for pid in left:
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
    return [statuses[pid] for pid in ranks]


if __name__ == "__main__":
    serve()
