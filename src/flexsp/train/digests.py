"""Digests of a checkpoint's files, so that a damaged one is an error and not other weights.

torch writes a checksum beside each tensor and compares none. Each rank writes the digests of its own files as it writes
them, in the form of sha256sum: `cat *.sha256 | sha256sum --check` in the folder compares them by hand.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

STATE, SUFFIX = "state.json", ".sha256"
ROW = re.compile(r"([0-9a-f]{64})  ([^/\0\n]+)")


def write_digests(folder: Path, names: Iterable[str], file: str) -> None:
    """Writes the digests of these files of `folder` into another one of it, `file` and `SUFFIX`."""
    rows = [f"{_digest(folder / name)}  {name}\n" for name in sorted(names)]
    (folder / f"{file}{SUFFIX}").write_text("".join(rows), encoding="utf-8")


def check_digests(folder: Path, needed: Iterable[str], part: int = 0, parts: int = 1) -> None:
    """Compares one of `parts` of the files: each of the ranks that load takes another.

    Args:
        folder: the checkpoint's.
        needed: names of files that must have a digest.
        part: from 0.
        parts: of all files.

    Raises:
        ValueError: a file has changed, is missing or has no digest; the message names it.
    """
    digests: dict[str, str] = {}
    for file in sorted(folder.glob(f"*{SUFFIX}")):
        for row in file.read_text(encoding="utf-8").splitlines():
            found = ROW.fullmatch(row)
            if found is None or found[2] in digests:
                raise ValueError(f"{file.name} is not a list of digests, each file once")
            digests[found[2]] = found[1]
    for name in needed:
        if name not in digests:
            raise ValueError(f"{name!r} has no digest in a {SUFFIX} file, so it may be another's")
    for name in sorted(digests)[part::parts]:
        if _digest(folder / name) != digests[name]:
            raise ValueError(f"{name} has changed since it was written: its sha256 is another")


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
