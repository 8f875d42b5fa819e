"""How a run ends that cannot go on: with one line for the whole job, on every rank within a stated time.

A rank that fails by itself puts its traceback into a file, says one line and ends; the others, whose collectives then
fail, end without a word. Where no rank has said anything, those whose collective failed, or did not come about in
time, report where they are, and the first of them calls the roll: every other rank that can answers, its watching
thread if the main thread cannot. Who does not answer within `ROLL_CALL_S` is at fault, or else whose main thread is
busy with something of its own; the caller says so. Once a line has been said, every rank's watching thread ends its
process within `TICK_S + GRACE_S`, whatever the main thread is doing: in a collective of NCCL that notices nothing, in a
computation, in a loop.

Ranks speak to each other over the board (`flexsp.train.board.Board`). Without it each rank that fails says a line of
its own; where it is lost, and with it most likely the node of rank 0, one rank of each node that is left says so.

    first       a counter: who raises it to 1 has the word
    alike/HASH  a counter: how many ranks have ended with this ValueError
    caller      a counter: who raises it to 1 calls the roll
    alarm       something is wrong: answer
    found/RANK  the answer
    seen/RANK   where a rank was, at most a tick ago
    beat/RANK   see `Beats`
    said        the line has been said; the status to end with
"""

from __future__ import annotations

import hashlib
import os
import select
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from flexsp.parallel import PlanMismatchError, RankError
from flexsp.planner.service import PlannerError
from flexsp.train.again import UNKNOWN
from flexsp.train.beats import Beats
from flexsp.train.board import Board
from flexsp.train.checkpoint import CheckpointError
from flexsp.train.leaving import leave, within
from flexsp.train.not_finite import NotFiniteError
from flexsp.train.out_of_memory import OutOfMemoryError
from flexsp.train.ranks import LAUNCHER_ENDED, StopSignal
from flexsp.train.roll_call import Kind, Place, Report, as_json, failed_collective, from_json, report, verdict
from flexsp.train.traceback_file import TracebackFile

TICK_S = 1.0
"""Between two looks of a rank's watching thread at the board and at its main thread."""
ROLL_CALL_S = 8.0
"""How long answers are waited for; longer than a tick on a machine that is short of cores."""
GRACE_S = 3.0
"""How long the main thread may take to end by itself once the line has been said."""
PATIENCE_S = 5.0
"""How long a rank waits for the line of the one that has the word."""
BACKSTOP_S = 10.0
"""By how much longer than a collective a main thread may stay at one place in a step."""

Say = Callable[[str, int], None]

LONGEST = 400
"""Characters of an exception that are said; its traceback has all."""

OF_ALL_RANKS = (CheckpointError, NotFiniteError, PlanMismatchError, PlannerError, RankError)
"""Errors that ranks have agreed on; the message names step, rank and cause."""


class Guard:
    """Stands over one rank of a run, while inside: exceptions, requests to stop, others' word, and standing still."""

    def __init__(self, folder: Path, timeout_s: float, say: Say, goes_on: bool = True) -> None:
        """
        Args:
            folder: of the run; tracebacks go there.
            timeout_s: of collectives.
            say: is given the line that this rank has to say, and the status that it ends with; from any thread.
            goes_on: whether the same command takes up what SIGTERM ended, which is then no failure; see `again`.
        """
        self._goes_on = goes_on
        self.again: Callable[[], str] = lambda: UNKNOWN
        """What the same command does after this one, in words; asked by any thread."""
        self._tell = say
        self.place = Place()
        self.stop = StopSignal()
        self._timeout_s = timeout_s
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self._traceback = TracebackFile(folder, self._rank)
        self._has_other_nodes = int(os.environ.get("LOCAL_WORLD_SIZE", self._world_size)) < self._world_size
        self._board = Board()
        self._beats = Beats(self._board, self._rank, self._world_size, ROLL_CALL_S)
        self._ending = threading.Lock()
        """Held by the thread that ends the process, until it has ended."""
        self._has_word = False
        self._answered = False
        self._seen = ""
        self._main = threading.get_ident()
        self._ours, self._theirs = socket.socketpair()
        self._thread = threading.Thread(target=self._run, name="flexsp-guard", daemon=True)

    def __enter__(self) -> Guard:
        self._traceback.remove()
        self.stop.__enter__()
        self._theirs.setblocking(False)
        signal.set_wakeup_fd(self._theirs.fileno(), warn_on_full_buffer=False)  # heard though the main thread be busy
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._answer(Kind.DONE)
        signal.set_wakeup_fd(-1)
        self.stop.__exit__()
        self._theirs.close()
        self._thread.join(timeout=2 * TICK_S)
        if not self._thread.is_alive():  # else it waits for the board, and then reads that all is over
            self._ours.close()

    @contextmanager
    def explaining(self) -> Iterator[None]:
        """An exception from inside is said once for all ranks, and ends this process."""
        try:
            yield
        except SystemExit:
            raise
        except BaseException as error:  # torch's checkpoint errors are no Exceptions
            with self._ending:
                leave(self._explain(error))

    def has_word(self) -> bool:
        """Whether this rank is the first that fails, and so the one to say why."""
        self._has_word = self._has_word or self._board.add("first", 1) in (None, 1)
        return self._has_word

    def _explain(self, error: BaseException) -> int:
        """Says what there is to say of an exception of the main thread; returns the exit status."""
        text = " ".join(str(error).split())
        if isinstance(error, (OutOfMemoryError, *OF_ALL_RANKS)) or self._is_bad_input(error, text):
            if error.__cause__ is not None:  # raised on all ranks, caused here
                self._keep(error)
            return self._say(text, 2 if isinstance(error, ValueError) else 1)
        if isinstance(error, KeyboardInterrupt):
            return self._say("interrupted", 130)
        cause = f"{type(error).__name__}: {text[:LONGEST]}"
        kind = failed_collective(error)
        if (kind is not None or isinstance(error, dist.DistNetworkError)) and self._is_orphan(error):
            return self._orphaned()
        if kind is None or self._alone:
            return self._say(f"{self._where()}: {cause} ({self._keep(error)})", 1)
        status = self._find_out(kind, cause)
        if status:
            self._keep(error)
        return status

    def _is_orphan(self, error: BaseException) -> bool:
        """Whether torchrun's agent has ended, and so its store. That is seen a moment before it is another parent's."""
        until = time.monotonic() + (TICK_S if isinstance(error, dist.DistNetworkError) else 0.0)
        while True:
            self.stop.look_for_launcher()
            if self.stop.cause == LAUNCHER_ENDED or time.monotonic() > until:
                return self.stop.cause == LAUNCHER_ENDED
            time.sleep(0.02)

    def _orphaned(self) -> int:
        """Torchrun has ended, and there is no board to agree on who speaks: rank 0 does."""
        if self._rank == 0:
            step = "" if self.place.step is None else f"step {self.place.step}, "
            text = f"stopped by {LAUNCHER_ENDED} in {step}{self.place.phase}; {self.again()}"
            within(PATIENCE_S, partial(self._tell, text, 1))
        return 1

    def _is_bad_input(self, error: BaseException, text: str) -> bool:
        """Whether it is what all ranks find wrong alike, and not a ValueError of this rank's own.

        In a step such an error names it. Before the first step and after the last, the ranks count who says the same:
        what was sent to all of them they say at once, and what each finds by itself within seconds.
        """
        if not isinstance(error, ValueError):
            return False
        if self.place.step is not None:
            return text.startswith(f"step {self.place.step}:")
        if self._alone:
            return True
        key = "alike/" + hashlib.sha256(text.encode()).hexdigest()
        self._board.add(key, 1)
        until = time.monotonic() + PATIENCE_S
        while True:
            late = time.monotonic() > until or self._board.add("first", 0)  # before the count: once all are, one speaks
            if (self._board.add(key, 0) or self._world_size) >= self._world_size:
                return True
            if late:
                return False
            time.sleep(0.05)

    def _say(self, text: str, status: int) -> int:
        """One line, unless another rank has the word: its line is waited for then. Returns the status to end with."""
        if self.has_word():
            self._board.post("said", status)  # first: the others are to end though nobody take the line
            self._board.post("alarm", True)
            within(PATIENCE_S, partial(self._tell, text, status))
            if self._has_other_nodes:
                time.sleep(2 * TICK_S)  # the store may end with this node's torchrun: once the others have read it
            return status
        said = self._hear(PATIENCE_S)
        return status if said is None else said

    def _hear(self, patience_s: float) -> int | None:
        """The status to end with, once another rank has said its line; None where it does not."""
        said = self._board.wait("said", patience_s)
        return None if said is None else int(said)

    def _find_out(self, kind: Kind, cause: str) -> int:
        """Calls the roll and says who is at fault, unless another rank does. Returns the status to end with."""
        own = self._answer(kind, cause)
        self._board.post("alarm", True)
        if (self._board.add("caller", 1) or 1) > 1:
            said = self._hear(ROLL_CALL_S + PATIENCE_S)
            if said is not None:
                return said  # else the caller has ended too
        found = self._roll_call(own)
        if self._board.lost:
            return self._stopped() if kind == Kind.ASKED else self._cut_off(kind, cause)
        kinds = {each.kind for each in found.values()}
        if len(found) == self._world_size and Kind.ASKED in kinds and Kind.LATE not in kinds:
            return self._stopped()
        seen = {rank: from_json(said) for rank in range(self._world_size) if (said := self._board.read(f"seen/{rank}"))}
        return self._say(verdict(found, seen, own, self._world_size), 1)

    def _cut_off(self, kind: Kind, cause: str) -> int:
        """The board is lost, so that no rank learns of another: the first one of each node says where it is."""
        if int(os.environ.get("LOCAL_RANK", 0)):
            time.sleep(PATIENCE_S)  # torchrun ends all ranks of the node once one has ended: after the one that speaks
            return 1
        store = f"torchrun's store on MASTER_ADDR={os.environ.get('MASTER_ADDR')} {self._board.lost}"
        here = "a collective failed" if kind in (Kind.CLOSED, Kind.LATE) else cause
        return self._say(f"{self._where()}: {here}, and {store} (is that node lost, or stopped?)", 1)

    def _roll_call(self, own: Report) -> dict[int, Report]:
        """The answers by rank, once all are there, or after `ROLL_CALL_S`, or where a rank has the word."""
        found = {self._rank: own}
        until = time.monotonic() + ROLL_CALL_S
        while len(found) < self._world_size and time.monotonic() < until and self._board.add("first", 0) == 0:
            for rank in range(self._world_size):
                if rank not in found and (said := self._board.read(f"found/{rank}")) is not None:
                    found[rank] = from_json(said)
            time.sleep(0.1)
        return found

    def _answer(self, kind: Kind, error: str = "") -> Report:
        """Reports this rank. For one that has not come out, which line it is at."""
        inside = self._main if kind in (Kind.HERE, Kind.STUCK) else None
        said = report(self._rank, kind, self.place, error, inside)
        self._answered = True
        self._board.post(f"found/{self._rank}", as_json(said))
        return said

    def _run(self) -> None:
        """The watching thread."""
        while True:
            readable, _, _ = select.select([self._ours], [], [], TICK_S)
            if readable:
                signals = self._ours.recv(64)
                if not signals:
                    return
                for signum in signals:
                    self.stop.note(signum)
            self._look()

    def _look(self) -> None:
        self.stop.look_for_launcher()
        if self.stop.cause and self.place.step is None:
            self._end(self._asked)
        if self._board.read("alarm"):
            self._heed_alarm()
        self._show()
        if self.stop.cause and self._beats.has_stopped():
            self._end(lambda: self._find_out(Kind.CLOSED, f"stopped by {self.stop.cause}"))
        if self.place.still_s() > self._longest_s() and self.place.bounded:
            self._end(self._stuck)

    def _longest_s(self) -> float:
        """How long the main thread may stay at one place. On CUDA it is to be found before NCCL's watchdog aborts."""
        return 0.8 * self._timeout_s if torch.cuda.is_available() else self._timeout_s + BACKSTOP_S

    def _show(self) -> None:
        """Where this rank is, for the others to find where it cannot answer any more."""
        self._beats.beat()
        said = report(self._rank, Kind.HERE, self.place)
        if said.where != self._seen:
            self._seen = said.where
            self._board.post(f"seen/{self._rank}", as_json(said))

    def _heed_alarm(self) -> None:
        """Another rank has called the roll: answers, and ends this process once the line has been said."""
        if not self._answered:
            self._answer(Kind.HERE)
        said = self._hear(ROLL_CALL_S + 2 * PATIENCE_S)
        time.sleep(GRACE_S)
        if said != 0 and not self._ending.locked():
            self._keep(None)
        self._end(lambda: self._left_alone() if said is None else said)

    def _left_alone(self) -> int:
        if self._board.lost:
            return self._cut_off(Kind.HERE, "another rank called the roll")
        return self._say(f"{self._where()}: another rank called the roll and has ended", 1)

    def _stuck(self) -> int:
        """This rank's main thread has not moved for too long."""
        cause = f"nothing has moved for {self.place.still_s():.0f} s ({self._keep(None)})"
        if self._alone:
            return self._say(f"{self._where()}: {cause}", 1)
        return self._find_out(Kind.STUCK, cause)

    def _asked(self) -> int:
        """A request, and no step to finish. torchrun sends SIGTERM too where another rank has died: the roll tells."""
        return self._stopped() if self._alone or self.stop.cause == LAUNCHER_ENDED else self._find_out(Kind.ASKED, "")

    def _stopped(self) -> int:
        has_board = self._board.is_there and self.stop.cause != LAUNCHER_ENDED
        cause = self.stop.cause or signal.SIGTERM.name  # another rank's
        status = 0 if self._goes_on else 128 + signal.Signals.__members__.get(cause, signal.SIGTERM)
        if not has_board and self._rank != 0:
            return status
        fate = f"; {self.again()}" if self._goes_on else ""
        return self._say(f"stopped by {cause} while {self.place.phase}{fate}", status)

    def _end(self, how: Callable[[], int]) -> None:
        """In the watching thread: ends the process, unless the main thread is about to, and soon."""
        status = how() if self._ending.acquire(timeout=ROLL_CALL_S + 2 * PATIENCE_S) else 1
        leave(status, at_once=True)

    @property
    def _alone(self) -> bool:
        """Whether there never was another rank to speak to."""
        return self._world_size == 1 or not (self._board.is_there or self._board.lost)

    def _where(self) -> str:
        step = self.place.step
        return ("" if step is None else f"step {step}, ") + f"rank {self._rank}, {self.place.phase}"

    def _keep(self, error: BaseException | None) -> str:
        """Writes a traceback, or without an error where the main thread is, into this rank's file; says where."""
        return self._traceback.keep(self._where(), self._main if error is None else error)
