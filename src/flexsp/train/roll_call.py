"""What the ranks report when a run cannot go on, and what follows from it: who is at fault, in one line."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from types import FrameType
from typing import Any

CLOSED = (
    "closed by peer", "reset by peer", "Broken pipe", "Connection refused", "Connection was likely closed",
    "failed to recv", "Failed to recv", "caused pair closure", "remote process exited", "ncclRemoteError",
    "ncclSystemError", "NCCL communicator was aborted",
)  # fmt: skip
"""What gloo, TCPStore and NCCL say where another rank's process has ended."""
LATE = ("Timed out waiting", "timed out after", "wait timeout after", "Socket Timeout", "Watchdog caught collective")
"""What they say where another rank has not come."""
WAITS = ("/torch/distributed/", "/torch/_ops.py", "/torch/cuda/__init__.py", "/flexsp/parallel/channels.py")
"""Files whose code waits for other ranks; on CUDA where it waits for the device, whose collectives do."""


class Kind(StrEnum):
    """How a rank was found."""

    CLOSED = "closed"  # its collective failed: another rank's process has ended
    LATE = "late"  # its collective failed: another rank has not come
    HERE = "here"  # its main thread is busy, and its watching thread answers
    STUCK = "stuck"  # as HERE, and the main thread has not moved for longer than it may
    ASKED = "asked"  # to stop, by a signal
    DONE = "done"  # at its end


class Place:
    """Where this rank's main thread is. Setting it costs less than a microsecond; any thread may read it."""

    def __init__(self) -> None:
        self._at: tuple[int | None, str, bool] = (None, "starting", False)
        self._moved: tuple[Any, float] = (None, time.monotonic())
        self.progress: Callable[[], str] = str
        """How far the main thread is in its phase, in words; asked by other threads."""

    def at(self, phase: str, step: int | None = None, bounded: bool = False) -> None:
        """The main thread begins something.

        Args:
            phase: what, in words that follow "rank 2,".
            step: of which step; None before the first and after the last.
            bounded: whether it may take no longer than a collective.
        """
        self._at = (step, phase, bounded)

    @property
    def step(self) -> int | None:
        return self._at[0]

    @property
    def phase(self) -> str:
        return self._at[1]

    @property
    def bounded(self) -> bool:
        return self._at[2]

    def still_s(self) -> float:
        """Seconds since the main thread was first seen where it is now: as fine as this is called."""
        now = (*self._at, self.progress())
        if now != self._moved[0]:
            self._moved = now, time.monotonic()
        return time.monotonic() - self._moved[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """One rank's answer."""

    rank: int
    kind: str
    step: int | None
    phase: str
    still_s: float
    """Seconds since the main thread last moved."""
    frame: str = ""
    """The line that it is at, where it has not come out."""
    waits: bool = False
    """Whether that line waits for other ranks."""
    error: str = ""

    @property
    def where(self) -> str:
        return self.phase if self.step is None else f"step {self.step}, {self.phase}"


def report(rank: int, kind: Kind, place: Place, error: str = "", thread: int | None = None) -> Report:
    """What this rank says of itself. `thread`: the main thread's ident, where it has not come out."""
    frame = sys._current_frames().get(thread) if thread is not None else None
    progress = place.progress()
    return Report(
        rank=rank,
        kind=kind.value,
        step=place.step,
        phase=place.phase + (f", {progress}" if progress else ""),
        still_s=place.still_s(),
        frame="" if frame is None else _line(frame),
        waits=_waits(frame),
        error=error,
    )


def as_json(said: Report) -> dict[str, Any]:
    return asdict(said)


def from_json(document: Mapping[str, Any]) -> Report:
    return Report(**document)


def failed_collective(error: BaseException) -> Kind | None:
    """Whether an error says that another rank did not take part: CLOSED or LATE; None: it is this rank's own."""
    if not isinstance(error, RuntimeError):  # torch's own are
        return None
    said = str(error)
    if any(words in said for words in CLOSED):
        return Kind.CLOSED
    return Kind.LATE if any(words in said for words in LATE) else None


def verdict(found: Mapping[int, Report], seen: Mapping[int, Report], own: Report, world_size: int) -> str:
    """Who is at fault, from what the ranks reported.

    Args:
        found: the reports of those that have answered, the speaker's own among them.
        seen: where those that have not were last, as far as they had said.
        own: of the rank that speaks.
        world_size: how many ranks there are.
    """
    head = own.phase if own.step is None else f"step {own.step}"
    silent = [rank for rank in range(world_size) if rank not in found]
    late = any(each.kind in (Kind.LATE, Kind.STUCK) for each in found.values())
    finders = [each for each in found.values() if each.kind in (Kind.LATE, Kind.CLOSED, Kind.STUCK, Kind.ASKED)]
    if silent and late:
        last = "; ".join(f"{places([seen[r]])}" for r in silent[:4] if r in seen)
        return (
            f"{head}: {ranks_text(silent)} {_s(silent, 'gives', 'give')} no sign (stopped, or cut off?)"
            f"{', last seen: ' if last else ''}{last}; waited for by {places(finders)}"
        )
    if silent:
        return (
            f"{head}: {ranks_text(silent)} ended without a word (killed, or out of memory?); found by {places([own])}"
        )
    stuck = [each for each in found.values() if each.kind in (Kind.HERE, Kind.STUCK) and not each.waits]
    waiting = [each for each in found.values() if each not in stuck]
    if late and stuck and waiting:
        lines = "; ".join(f"{places([s], frames=True)} has not moved for {s.still_s:.0f} s" for s in stuck[:4])
        return f"{head}: {lines}; waited for by {places(waiting)}"
    ended = [each.rank for each in found.values() if each.kind == Kind.DONE]
    if ended and len(ended) < world_size:
        at_work = [each for each in found.values() if each.kind != Kind.DONE]
        return f"{head}: {ranks_text(ended)} had ended already; still at work: {places(at_work)}"
    where = places(list(found.values()), frames=True)
    cause = own.error or f"nothing has moved for {own.still_s:.0f} s"
    return f"{head}, rank {own.rank}: {cause}; the ranks: {where}"


def places(reports: Sequence[Report], frames: bool = False) -> str:
    """Where ranks are, those at one place together: `ranks 0, 1, 3 (step 12, forward and backward)`."""
    by_place: dict[str, list[int]] = {}
    for each in sorted(reports, key=lambda r: r.rank):
        by_place.setdefault(each.where + (f", at {each.frame}" if frames and each.frame else ""), []).append(each.rank)
    said = [f"{ranks_text(ranks)} ({place})" for place, ranks in by_place.items()]
    return "; ".join(said[:4]) + (f"; and {len(said) - 4} more places" if len(said) > 4 else "")


def ranks_text(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'' if len(ranks) == 1 else 's'} {shown}"


def _s(many: Sequence[Any], one: str, more: str) -> str:
    return one if len(many) == 1 else more


def _line(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno} {frame.f_code.co_name}"


def _waits(frame: FrameType | None) -> bool:
    """Whether the innermost frames are of code that waits for other ranks."""
    for _ in range(3):
        if frame is None:
            return False
        if any(part in frame.f_code.co_filename for part in WAITS):
            return True
        frame = frame.f_back
    return False
