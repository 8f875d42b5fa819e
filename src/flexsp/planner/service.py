"""Planning in a process of its own, so that a step never waits for a planner.

The parent holds a `PlanService`; the child runs `serve`, which needs no torch. They talk in
JSON lines over the child's standard input and output: first the profile, planner and options, then one batch of
lengths per line down, one plan per line up, in order. A line down may also be another profile, for what follows it.
The child ends when its input does, whatever it is doing: nobody would read its answer.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flexsp.lengths import LengthArray
from flexsp.planner import find_planner, plan
from flexsp.planner.kernels import load_kernels
from flexsp.plans import Plan
from flexsp.profile import Profile

JOIN_S = 5.0
"""How long the end of a thread is waited for that reads from a dead child, whose own children may hold its pipes."""
CLOSE_S = 0.2
"""The same, where nobody wants to know what the child said."""
BEGIN = """import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
signal.signal(signal.SIGHUP, signal.SIG_IGN)
from flexsp.planner.service import serve
serve()
"""
"""The child: it outlives the signals of its parent's group from its first moment, before what takes long to import."""

KEPT_BYTES = 4096
"""Of what the planner printed, for the error if it ends."""


class PlannerError(RuntimeError):
    """The planner's process failed; the message says how."""


class PlannerGoneError(PlannerError):
    """The process has ended or does not answer: it plans nothing more until it is started again."""


@dataclass(slots=True)
class _Batch:
    """A batch handed over, whose plan has not been fetched."""

    lengths: list[int]
    profile: Profile
    wanted: bool = True


class PlanService:
    """Plans batches ahead, in the order in which they are submitted."""

    def __init__(self, profile: Profile, planner: str, options: Mapping[str, Any]) -> None:
        find_planner(planner)  # an unknown name is an error here, not in the child
        self._setup = {"planner": planner, "options": dict(options), "path": list(sys.path)}
        self._profile = profile
        self._waiting: deque[_Batch] = deque()
        self._start()

    def submit(self, lengths: LengthArray) -> None:
        """Hands over one batch of (K,) lengths in tokens."""
        self._waiting.append(_Batch(lengths.tolist(), self._profile))
        self._hand_over(self._waiting[-1])

    def update(self, profile: Profile) -> None:
        """Batches submitted from now on are planned with this profile."""
        self._profile = profile

    def forget(self) -> None:
        """Nobody wants the plans not yet fetched."""
        for batch in self._waiting:
            batch.wanted = False

    def ready(self) -> bool:
        """Whether `result` would return a plan at once."""
        while self._waiting and not self._waiting[0].wanted and self._process.has_plan():
            self._process.answer(0.0)
            self._waiting.popleft()
        return bool(self._waiting) and self._waiting[0].wanted and self._process.has_plan()

    def result(self, timeout_s: float | None = None) -> tuple[Plan, float]:
        """The plan of the earliest batch wanted and not yet fetched, and the seconds waited for it: nil where it was
        there. An error is the answer to that batch: the next call is about the next one.

        Raises:
            PlannerError: the planner raised, or what it made is no plan.
            PlannerGoneError: its process ended, or nothing came within `timeout_s`.
        """
        began = time.perf_counter()
        waited_s = 0.0
        while True:
            there = self._process.has_answer()
            left_s = None if timeout_s is None else max(0.0, timeout_s - (time.perf_counter() - began))
            try:
                document = self._process.answer(left_s)
            except queue.Empty:
                self._next()
                said = f"the planner gave no plan within timeout_s={timeout_s}; use a faster one"
                raise PlannerGoneError(said) from None
            except PlannerGoneError:
                self._next()
                raise
            waited_s = 0.0 if there else time.perf_counter() - began
            if self._waiting.popleft().wanted:
                return _read_plan(document), waited_s

    def restart(self) -> None:
        """Another process, for the batches that are still wanted."""
        self._process.close()
        self._waiting = deque(batch for batch in self._waiting if batch.wanted)
        self._start()
        for batch in self._waiting:
            self._hand_over(batch)

    def close(self) -> None:
        """Ends the process."""
        self._process.close()

    def _start(self) -> None:
        self._process = _Process()
        self._process.send({**self._setup, "profile": self._profile.to_json()})
        self._told = self._profile

    def _hand_over(self, batch: _Batch) -> None:
        if batch.profile is not self._told:
            self._process.send({"profile": batch.profile.to_json()})
            self._told = batch.profile
        self._process.send({"lengths": batch.lengths})

    def _next(self) -> None:
        """Gives up the earliest batch wanted, and those before it that nobody wants."""
        while self._waiting and not self._waiting.popleft().wanted:
            pass


def _read_plan(document: Any) -> Plan:
    if isinstance(document, dict) and "error" in document:
        raise PlannerError(f"the planner failed: {document['error']}")
    try:
        return Plan.from_json(document, "the planner's plan")
    except ValueError as error:
        raise PlannerError(str(error)) from None


class _Process:
    """The child and what it has answered."""

    def __init__(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-c", BEGIN],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        self._outbox: queue.Queue[str | None] = queue.Queue()  # a pipe is small: writing must not wait for the planner
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._peeked: deque[str | None] = deque()
        self._last_said = b""
        self._threads = [
            threading.Thread(target=target, daemon=True) for target in (self._write, self._read, self._read_errors)
        ]
        for thread in self._threads:
            thread.start()

    def send(self, message: Mapping[str, Any]) -> None:
        self._outbox.put(json.dumps(message) + "\n")

    def has_answer(self) -> bool:
        """Whether `answer` would return or raise at once."""
        return bool(self._peeked) or not self._answers.empty()

    def has_plan(self) -> bool:
        """Whether `answer` would return something at once that is no error."""
        if not self._peeked and not self._answers.empty():
            self._peeked.append(self._answers.get())
        return bool(self._peeked) and self._peeked[0] is not None and not self._peeked[0].startswith('{"error"')

    def answer(self, timeout_s: float | None) -> Any:
        """The next answer's document.

        Raises:
            PlannerGoneError: the child has ended.
            queue.Empty: nothing came in time.
        """
        text = self._peeked.popleft() if self._peeked else self._answers.get(timeout=timeout_s)
        if text is None:
            self._answers.put(None)  # it stays so
            self._threads[-1].join(timeout=JOIN_S)
            said = " ".join(self._last_said.decode("utf-8", "replace").split())[-400:]
            raise PlannerGoneError(f"the planner's process ended with status {self._status()}: {said or 'no word'}")
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            return {"error": f"it answered what is not JSON ({error})"}

    def close(self) -> None:
        """Ends the child."""
        self._child.kill()
        self._child.wait()
        self._outbox.put(None)
        for thread in self._threads:
            thread.join(timeout=CLOSE_S)
        for thread, pipe in zip(self._threads[1:], (self._child.stdout, self._child.stderr), strict=True):
            assert pipe is not None
            if not thread.is_alive():
                pipe.close()

    def _status(self) -> int | None:
        """Its exit status; None where it has closed its output and lives on."""
        try:
            return self._child.wait(JOIN_S)
        except subprocess.TimeoutExpired:
            return None

    def _write(self) -> None:
        assert self._child.stdin is not None
        try:
            with self._child.stdin as pipe:
                while (line := self._outbox.get()) is not None:
                    pipe.write(line)
                    pipe.flush()
        except BrokenPipeError:  # the child has died; answer() says why
            pass

    def _read(self) -> None:
        assert self._child.stdout is not None
        try:
            for line in self._child.stdout:
                self._answers.put(line)
        finally:  # whatever ended it: else one would wait for an answer
            self._answers.put(None)

    def _read_errors(self) -> None:
        """All of it, or the child would wait; the end of it is kept. It may be any bytes, and without end."""
        assert self._child.stderr is not None
        while read := os.read(self._child.stderr.fileno(), 1 << 16):
            self._last_said = (self._last_said + read)[-KEPT_BYTES:]


def serve() -> None:
    """The child: answers batches until its input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # a planner that prints, in whatever language, must not break the protocol
    sys.stdout = sys.stderr
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    setup = json.loads(lines.get())
    sys.path[:] = setup["path"]
    profile = Profile.from_json(setup["profile"])
    if setup["planner"] == "flex":
        load_kernels()  # here, where nobody waits yet, and not in the midst of a run
    while True:
        message = json.loads(lines.get())
        if "profile" in message:
            profile = Profile.from_json(message["profile"])
            continue
        try:
            answer = plan(message["lengths"], profile, setup["planner"], **setup["options"]).to_json()
            text = json.dumps(answer)
        except Exception as error:  # whatever a planner raises is the parent's to report
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            text = json.dumps({"error": f"{kind}{error}"})
        answers.write(text + "\n")
        answers.flush()


def _listen(lines: queue.SimpleQueue[bytes]) -> None:
    """Takes in what the parent sends. Where it has gone, the child goes too, from the midst of a plan that stalls."""
    rest = b""
    while read := os.read(0, 1 << 16):  # not sys.stdin, which an ending interpreter could not close under this thread
        *whole, rest = (rest + read).split(b"\n")
        for line in whole:
            lines.put(line)
    os._exit(0)
