"""The board on which ranks speak to each other: the store of torchrun's agent, asked with a bound on every answer.

torch's client of a store waits for ever where the process that serves it is stopped or its machine is cut off: `add`,
`set` and `check` know no timeout. A thread of its own asks, therefore, and is left behind where no answer comes.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import Any

import torch.distributed as dist

ANSWER_S = 10.0
"""How long an answer is waited for; none is worth more than a moment, but on a machine that is short of cores."""
HAS_ENDED, GIVES_NO_ANSWER = "has ended", "gives no answer"
"""How a board is lost."""


class Board:
    """A board that all ranks read and write: the store of torchrun's agent, on the node of rank 0.

    It is there before any process group and outlives a failing rank. Where there is none (`env://` by other launchers),
    or it is lost, nothing is found on it. Its methods may be called by any thread.
    """

    def __init__(self) -> None:
        self.lost = ""
        """How, of a board that was there; it is so for good: nobody could say what the others have read meanwhile."""
        self._prefix = f"flexsp/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/"
        self._questions: SimpleQueue[tuple[Callable[[Any], Any], Future[Any]]] = SimpleQueue()
        self._exists = False
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            self._exists = self._begin()

    @property
    def is_there(self) -> bool:
        """Whether other ranks can read what is posted."""
        return self._exists and not self.lost

    def add(self, key: str, amount: int) -> int | None:
        """A counter after adding to it; None where there is no board."""
        total: int | None = self._ask(lambda store: int(store.add(self._prefix + key, amount)))
        return total

    def post(self, key: str, document: Any) -> None:
        """Puts a JSON document up, in the place of an earlier one."""
        self._ask(lambda store: store.set(self._prefix + key, json.dumps(document)))

    def read(self, key: str) -> Any:
        """What was posted; None where nothing was."""
        if not self._ask(lambda store: store.check([self._prefix + key])):
            return None
        return self._ask(lambda store: json.loads(store.get(self._prefix + key)))

    def wait(self, key: str, patience_s: float) -> Any:
        """What was posted, once it is; None where nothing was for so long, or the board is lost."""
        until = time.monotonic() + patience_s
        while (said := self.read(key)) is None and self.is_there and time.monotonic() < until:
            time.sleep(0.1)
        return said

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        if not self.is_there:
            return None
        answer: Future[Any] = Future()
        self._questions.put((question, answer))
        try:
            return answer.result(ANSWER_S)
        except TimeoutError:
            self.lost = self.lost or GIVES_NO_ANSWER
        except dist.DistNetworkError:  # the agent's process has ended
            self.lost = self.lost or HAS_ENDED
        except RuntimeError:  # what was asked for is not there
            pass
        return None

    def _begin(self) -> bool:
        """Starts the thread that asks; whether the store is there."""
        connected: Future[Any] = Future()
        try:
            threading.Thread(target=self._serve, args=(connected,), name="flexsp-board", daemon=True).start()
            connected.result(ANSWER_S)
        except (KeyError, ValueError, RuntimeError, TimeoutError):  # memory has run out, of which a thread needs some
            return False
        return True

    def _serve(self, connected: Future[Any]) -> None:
        """The thread that asks, one question after the other."""
        _settle(connected, _agent_store)
        if connected.exception() is None:
            store = connected.result()
            while True:
                question, answer = self._questions.get()
                _settle(answer, partial(question, store))


def _settle(answer: Future[Any], make: Callable[[], Any]) -> None:
    try:
        answer.set_result(make())
    except Exception as error:  # for the thread that waits, if it still does
        answer.set_exception(error)


def _agent_store() -> Any:
    return dist.TCPStore(  # type: ignore[attr-defined]
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=datetime.timedelta(seconds=ANSWER_S),
    )


def first_to_say(text: str) -> bool:
    """Whether no other rank has said this yet, so that what all ranks find wrong is printed once.

    Ranks that find nothing wrong, with a TOML of their own say, learn that the word has been said; see `Guard`.
    """
    board = Board()
    board.add("first", 1)
    first = board.add("said/" + hashlib.sha256(text.encode()).hexdigest(), 1) in (None, 1)  # better twice than never
    board.post("said", 2)
    board.post("alarm", True)
    return first
