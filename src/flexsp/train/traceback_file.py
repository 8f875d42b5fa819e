"""A rank's traceback in run.dir, `error-rank-3.txt`; a folder that does not answer keeps no rank."""

from __future__ import annotations

import sys
import traceback
from datetime import datetime
from pathlib import Path

from flexsp.train.leaving import within

WRITE_S = 2.0
"""How long writing it may take: storage that does not answer must not keep a rank that is to end."""


class TracebackFile:
    """That of one rank."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / f"error-rank-{rank}.txt"

    def remove(self) -> None:
        """That of an earlier start."""
        within(WRITE_S, lambda: self.path.unlink(missing_ok=True))

    def keep(self, where: str, error: BaseException | int) -> str:
        """Writes what became of the rank; returns where that is, in words.

        Args:
            where: the rank was.
            error: that ended it; or the ident of the thread of which to write where it is.
        """
        if isinstance(error, int):
            lines = traceback.format_stack(sys._current_frames()[error])
        else:
            lines = traceback.format_exception(error)
        text = f"{datetime.now().astimezone().isoformat(timespec='seconds')} {where}\n{''.join(lines)}"
        said = [f"no traceback: {self.path} cannot be written within {WRITE_S:.0f} s"]
        within(WRITE_S, lambda: said.append(self._write(text)))
        return said[-1]

    def _write(self, text: str) -> str:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(text, encoding="utf-8")
        except OSError as failed:
            return f"no traceback: {self.path} cannot be written, {failed.strerror}"
        return f"traceback in {self.path}"
