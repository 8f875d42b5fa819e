"""A log of each rank, run.dir/logs/rank-0003.log: time, level, rank, step, message.

It holds what flexsp's loggers say from INFO on, Python's warnings, and what ended the rank, and is appended to however
often a run begins. Warnings of ranks other than 0, which the display does not show, go to standard error too, tagged
with their rank, each text once.
"""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from logging.handlers import RotatingFileHandler
from pathlib import Path
from types import TracebackType

FOLDER = "logs"
MOST_BYTES = 4 << 20
"""Of a file; then it goes on in a new one, and the one before is kept as .log.1."""
FORMAT = "%(asctime)s %(levelname)s rank %(rank)d step %(step)s: %(message)s"
FLEXSP, PYTHON_WARNINGS = "flexsp", "py.warnings"


class GivesUp(logging.Handler):
    """Part of a handler: what it cannot write to, a full disk say, it leaves alone from then on, after one line.

    logging's own would write a traceback for each thing that is said.
    """

    where = "standard output"
    _gave_up = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self._gave_up:
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):  # a fault of ours
            super().handleError(record)
            return
        self._gave_up = True
        with suppress(OSError):  # in one write: other ranks share the stream, which torchrun leaves unbuffered
            sys.stderr.write(f"{self.where}: cannot be written ({error.strerror}) and gets no more\n")
            sys.stderr.flush()

    def close(self) -> None:
        with suppress(OSError):  # of what could not be written
            super().close()


class Aloud(GivesUp, logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to a stream."""


class File(GivesUp, RotatingFileHandler):
    """Writes to a file of bounded size."""


class RankLog:
    """The log of this process, while inside."""

    def __init__(self, folder: Path, rank: int) -> None:
        """
        Args:
            folder: of the run; it exists.
            rank: of this process.
        """
        self.path = folder / FOLDER / f"rank-{rank:04d}.log"
        self._rank = rank
        self._step: int | None = None
        self._said: set[str] = set()
        self._handlers: list[tuple[str, logging.Handler]] = []

    def begin(self, step: int) -> None:
        """A step begins: what is said from now on is of it."""
        self._step = step

    def __enter__(self) -> RankLog:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = File(self.path, maxBytes=MOST_BYTES, backupCount=1, encoding="utf-8", errors="backslashreplace")
        file.where = str(self.path)
        file.setFormatter(logging.Formatter(FORMAT))
        file.addFilter(self._tag)
        aloud = Aloud(sys.stderr)
        aloud.where = "standard error"
        aloud.setLevel(logging.WARNING)
        aloud.addFilter(self._first_time)
        aloud.setFormatter(logging.Formatter(f"[rank {self._rank}] %(message)s" if self._rank else "%(message)s"))
        self._handlers = [(FLEXSP, file), (PYTHON_WARNINGS, file), (PYTHON_WARNINGS, aloud)]
        if self._rank:  # rank 0's own are the display's
            self._handlers.append((FLEXSP, aloud))
        for name, handler in self._handlers:
            logging.getLogger(name).addHandler(handler)
        logging.captureWarnings(True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _, file = self._handlers[0]
        if kind is not None and error is not None:  # the command says it in one line; here is where it came from
            file.handle(
                logging.LogRecord(FLEXSP, logging.ERROR, __file__, 0, "ended by an error", (), (kind, error, trace))
            )
        logging.captureWarnings(False)
        for name, handler in self._handlers:
            logging.getLogger(name).removeHandler(handler)
        file.close()

    def _tag(self, record: logging.LogRecord) -> bool:
        record.rank, record.step = self._rank, "-" if self._step is None else self._step
        return True

    def _first_time(self, record: logging.LogRecord) -> bool:
        """Whether this text has not been said aloud before."""
        text = record.getMessage()
        new = text not in self._said
        self._said.add(text)
        return new
