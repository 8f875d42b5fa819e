"""The last acts of a process: a line that must not keep it, and its end."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

FLUSH_S = 2.0
"""How long a process that ends waits for what it has printed to be taken."""


def leave(status: int, at_once: bool = False) -> NoReturn:
    """Ends this process. Of several ranks without the interpreter's own end, which waits for threads and collectives.

    Args:
        status: to end with.
        at_once: in any case; for threads, whose exceptions end nothing.

    Raises:
        SystemExit: for a rank alone.
    """
    within(FLUSH_S, _flush)
    if at_once or "RANK" in os.environ:
        os._exit(status)
    raise SystemExit(status)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            if stream.isatty():
                stream.write("\x1b[?25h")  # the cursor, which a progress bar hides
            stream.flush()


def within(patience_s: float, write: Callable[[], None]) -> None:
    """Writes, but waits no longer: a terminal that is held, or a pipe that nobody reads, must not keep a rank alive."""

    def written() -> None:
        with suppress(OSError, ValueError):  # on a full disk; closed
            write()

    thread = threading.Thread(target=written, name="flexsp-last-words", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # memory has run out, of which a thread needs some
        written()
    else:
        thread.join(patience_s)
