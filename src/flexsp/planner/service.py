"""Planning in a process of its own, so that a step never waits for a planner.

The parent holds a `PlanService`; the child is `python -m flexsp.planner.service`, which needs no torch. They talk in
JSON lines over the child's standard input and output: first the profile, planner and options, then one batch of
lengths per line down, one plan per line up, in order. A line down may also be another profile, for what follows it.
"""

from __future__ import annotations

import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from flexsp.lengths import LengthArray
from flexsp.planner import find_planner, plan
from flexsp.plans import Plan
from flexsp.profile import Profile


class PlannerError(RuntimeError):
    """The planner's process failed; the message says how."""


class PlanService:
    """Plans batches ahead, in the order in which they are submitted."""

    def __init__(self, profile: Profile, planner: str, options: Mapping[str, Any]) -> None:
        find_planner(planner)  # an unknown name is an error here, not in the child
        self._child = subprocess.Popen(
            [sys.executable, "-m", "flexsp.planner.service"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._outbox: queue.Queue[str | None] = queue.Queue()  # a pipe is small: writing must not wait for the planner
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._errors: list[str] = []
        self._threads = [
            threading.Thread(target=target, daemon=True) for target in (self._write, self._read, self._read_errors)
        ]
        for thread in self._threads:
            thread.start()
        self._send({"profile": profile.to_json(), "planner": planner, "options": dict(options), "path": sys.path})

    def submit(self, lengths: LengthArray) -> None:
        """Hands over one batch of (K,) lengths in tokens."""
        self._send({"lengths": lengths.tolist()})

    def update(self, profile: Profile) -> None:
        """Batches submitted from now on are planned with this profile."""
        self._send({"profile": profile.to_json()})

    def result(self, timeout_s: float | None = None) -> tuple[Plan, float]:
        """The plan of the earliest batch not yet fetched, and the seconds waited for it: nil where it was there.

        Raises:
            PlannerError: the planner raised, its process ended, or nothing came within `timeout_s`.
        """
        waited_s = 0.0
        try:
            answer = self._answers.get_nowait()
        except queue.Empty:
            began = time.perf_counter()
            try:
                answer = self._answers.get(timeout=timeout_s)
            except queue.Empty:
                raise PlannerError(f"the planner gave no plan within timeout_s={timeout_s}; use a faster one") from None
            waited_s = time.perf_counter() - began
        if answer is None:
            self._threads[-1].join(timeout=5.0)
            said = " ".join("".join(self._errors[-20:]).split())[-400:]
            raise PlannerError(f"the planner's process ended with status {self._child.wait(5.0)}: {said or 'no word'}")
        document = json.loads(answer)
        if "error" in document:
            raise PlannerError(f"the planner failed: {document['error']}")
        return Plan.from_json(document), waited_s

    def close(self) -> None:
        """Ends the process."""
        self._child.kill()
        self._child.wait()
        self._outbox.put(None)
        for thread in self._threads:
            thread.join()
        for pipe in (self._child.stdout, self._child.stderr):
            assert pipe is not None
            pipe.close()

    def _send(self, message: Mapping[str, Any]) -> None:
        self._outbox.put(json.dumps(message) + "\n")

    def _write(self) -> None:
        assert self._child.stdin is not None
        try:
            with self._child.stdin as pipe:
                while (line := self._outbox.get()) is not None:
                    pipe.write(line)
                    pipe.flush()
        except BrokenPipeError:  # the child has died; result() says why
            pass

    def _read(self) -> None:
        assert self._child.stdout is not None
        for line in self._child.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def _read_errors(self) -> None:
        assert self._child.stderr is not None
        self._errors.extend(self._child.stderr)


def serve() -> None:
    """The child: answers batches until its input ends, whatever signals its parent's group is sent."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    answers, sys.stdout = sys.stdout, sys.stderr  # a planner that prints must not break the protocol
    setup = json.loads(sys.stdin.readline())
    sys.path[:] = setup["path"]
    profile = Profile.from_json(setup["profile"])
    for line in sys.stdin:
        message = json.loads(line)
        if "profile" in message:
            profile = Profile.from_json(message["profile"])
            continue
        try:
            answer = plan(message["lengths"], profile, setup["planner"], **setup["options"]).to_json()
        except Exception as error:  # whatever a planner raises is the parent's to report
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
