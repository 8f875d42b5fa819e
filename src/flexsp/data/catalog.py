"""What a source is made of: which files it has, and the digests of their parts.

The digests of an unchanged file are taken from the catalog of the last time, `sources/NAME.json` in the cache: a file
is read again when its size, the time of its content or that of its entry has changed.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import astuple
from pathlib import Path
from typing import Any

from flexsp.data.formats import Part
from flexsp.data.shards import read_sealed, write_sealed
from flexsp.data.sources import File, Piece, Source, Stat
from flexsp.track import Track, silent

FOLDER = "sources"
FORMAT = "flexsp-source/1"
NOTE_S = 30.0
Scanned = tuple[File, Stat, Sequence[Part]]


class Catalog:
    """That of one source, in a cache."""

    def __init__(self, source: Source, cache: Path) -> None:
        self.name = hashlib.sha256(source.identity.encode(errors="surrogateescape")).hexdigest()[:24]
        self._source, self._path = source, cache / FOLDER / f"{self.name}.json"

    def known(self) -> list[Piece] | None:
        """The pieces of the source; None where a file is new or has changed."""
        before = self._before()
        scanned = [self._unchanged(file, before) for file in self._source.files()]
        return None if None in scanned else self._source.pieces([each for each in scanned if each is not None])

    def renewed(self, track: Track = silent) -> list[Piece]:
        """The pieces of the source, after files that are new or have changed are read and noted.

        Raises:
            ValueError: one cannot be read, or changes while it is.
        """
        before, noted_s = self._before(), time.monotonic()
        scanned: list[Scanned] = []
        for file, _ in track(self._source.files(), "reading files"):
            scanned.append(self._unchanged(file, before) or self._scan(file))
            if time.monotonic() > noted_s + NOTE_S:  # a kill costs no more than that
                self._note({**before, **_as_json(scanned)})
                noted_s = time.monotonic()
        self._note(_as_json(scanned))
        return self._source.pieces(scanned)

    def _note(self, files: dict[str, Any]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_sealed(self._path, {"format": FORMAT, "files": files})

    def _before(self) -> dict[str, Any]:
        body = read_sealed(self._path)
        files: dict[str, Any] = {} if body is None or body.get("format") != FORMAT else body["files"]
        return files

    def _unchanged(self, file: File, before: dict[str, Any]) -> Scanned | None:
        stat = self._source.stat(file)
        found = before.get(file.path)
        if found is None or tuple(found[0]) != stat:
            return None
        return file, stat, [Part(*part) for part in found[1]]

    def _scan(self, file: File) -> Scanned:
        stat = self._source.stat(file)
        parts = self._source.scan(file)
        check_unchanged(self._source, file, stat)
        return file, stat, parts


def _as_json(scanned: Sequence[Scanned]) -> dict[str, Any]:
    return {file.path: [stat, [astuple(part) for part in parts]] for file, stat, parts in scanned}


def check_unchanged(source: Source, file: File, stat: Stat) -> None:
    """
    Raises:
        ValueError: the file has changed since it had this `stat`.
    """
    if source.stat(file) != stat:
        raise ValueError(f"{file.name}: the file has changed while it was read; start again once it is written")
