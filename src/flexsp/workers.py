"""What every worker process of a pool begins with."""

from __future__ import annotations

import multiprocessing
import os
import threading


def end_with_parent() -> None:
    """In a worker: ends it once its parent has ended, however that was killed.

    A worker holds an end of the pipe that tasks come through itself, and would wait there for ever.
    """
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
