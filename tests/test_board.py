"""The board, on a store whose process is stopped or ends: no question waits for ever, whichever thread asks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from flexsp.train import board

pytestmark = pytest.mark.alone

SERVER = """
import signal
from torch.distributed import TCPStore

store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
print(store.port, flush=True)
signal.pause()
"""


@pytest.fixture
def server(monkeypatch) -> Iterator[int]:
    """The process that serves the store of torchrun's agent."""
    child = subprocess.Popen([sys.executable, "-c", SERVER], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", child.stdout.readline().strip())
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setattr(board, "ANSWER_S", 2.0)
    yield child.pid
    child.kill()
    child.communicate()


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("sent", "lost"), [(signal.SIGSTOP, board.GIVES_NO_ANSWER), (signal.SIGKILL, board.HAS_ENDED)])
def test_a_board_that_is_lost_is_so_for_all_threads_and_for_good(server, sent, lost):
    ours, theirs = board.Board(), board.Board()
    assert ours.is_there and ours.add("count", 1) == 1 and theirs.add("count", 2) == 3
    ours.post("word", {"said": 2})
    assert theirs.read("word") == {"said": 2} and theirs.read("nothing") is None
    os.kill(server, sent)
    began = time.monotonic()
    found: list[object] = []
    others = [
        threading.Thread(target=lambda ask=ask: found.append(ask()), daemon=True)
        for ask in (lambda: ours.add("count", 1), lambda: ours.post("word", 1), lambda: ours.wait("said", 100.0))
    ]
    for other in others:
        other.start()
    assert ours.read("word") is None
    for other in others:
        other.join(20.0)
    assert found == [None] * 3 and time.monotonic() - began < 8.0
    assert (ours.is_there, ours.lost) == (False, lost)
    os.kill(server, signal.SIGCONT)
    began = time.monotonic()
    assert ours.read("word") is None and not ours.is_there  # others have said that it is lost
    assert time.monotonic() - began < 1.0
    if sent == signal.SIGSTOP:  # which then does all that it was asked
        assert theirs.read("word") == 1


def test_a_store_that_is_not_there_or_gives_no_answer_at_the_start_is_none(server, monkeypatch):
    os.kill(server, signal.SIGSTOP)
    never = board.Board()
    assert (never.is_there, never.lost, never.add("count", 1)) == (False, "", None)
    monkeypatch.delenv("MASTER_PORT")
    assert not board.Board().is_there
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE")
    assert not board.Board().is_there
