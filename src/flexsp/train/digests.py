"""Digests of a checkpoint's files, so that a damaged one is an error and not other weights.

torch writes a checksum beside each tensor and compares none. Each rank writes the digests of its own files as it writes
them, in the form of sha256sum: `cat *.sha256 | sha256sum --check` in the folder compares them by hand.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

STATE, SUFFIX = "state.json", ".sha256"
ROW = re.compile(r"([0-9a-f]{64})  ([^/\0\n]+)")
MISSING = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
"""What of a disk's errors says that a file is not there."""


class Damaged(ValueError):
    """A checkpoint's files are not what was written; the message says which and how."""


def write_digests(folder: Path, names: Iterable[str], file: str) -> None:
    """Writes the digests of these files of `folder` into another one of it, `file` and `SUFFIX`."""
    rows = [f"{_digest(folder / name)}  {name}\n" for name in sorted(names)]
    with open(folder / f"{file}{SUFFIX}", "w", encoding="utf-8") as listed:
        listed.write("".join(rows))
        listed.flush()
        os.fsync(listed.fileno())


def check_digests(folder: Path, needed: Iterable[str], part: int = 0, parts: int = 1) -> None:
    """Compares one of `parts` of the files: each of the ranks that load takes another.

    Args:
        folder: the checkpoint's.
        needed: names of files that must have a digest.
        part: from 0.
        parts: of all files.

    Raises:
        Damaged: a file has changed, is missing or has no digest; the message names it.
        OSError: the disk does not answer.
    """
    digests: dict[str, str] = {}
    for file in sorted(folder.glob(f"*{SUFFIX}")):
        try:
            rows = file.read_text(encoding="utf-8").splitlines()
        except (UnicodeDecodeError, *MISSING):
            rows = [""]
        for row in rows:
            found = ROW.fullmatch(row)
            if found is None or found[2] in digests:
                raise Damaged(f"{file.name} is not a list of digests, each file once")
            digests[found[2]] = found[1]
    for name in needed:
        if name not in digests:
            raise Damaged(f"{name!r} has no digest in a {SUFFIX} file, so it may be another's")
    for name in sorted(digests)[part::parts]:
        try:
            same = _digest(folder / name) == digests[name]
        except MISSING:
            raise Damaged(f"{folder / name} is missing") from None
        if not same:
            raise Damaged(f"{name} has changed since it was written: its sha256 is another")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
