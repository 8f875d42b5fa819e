"""A kind that does all that an input must not do, for the test of the runner."""

from __future__ import annotations

import os
import time
from pathlib import Path
from random import Random

from fuzzing.attempt import Tried


class Deadly:
    """By the index of its inputs, which it keeps in a file beside its folder: every death begins a new worker."""

    name = "deadly"

    def __init__(self, folder: Path) -> None:
        self.file = folder.parent / "tried"

    def try_one(self, random: Random) -> Tried:
        index = len(self.file.read_text()) if self.file.exists() else 0
        self.file.write_text("x" * (index + 1))
        if index == 1:
            os.abort()
        if index == 2:
            time.sleep(60)
        if index == 3:
            bytearray(1 << 60)
        if index == 4:
            raise KeyError("x")
        return Tried(index == 0, "")
