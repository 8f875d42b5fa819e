"""Shards of a token store: folders that are written once, whole or not at all, and memory-mapped by the ranks.

tokens.bin    ids end to end, of the least unsigned type that holds them
labels.bin    as long, only where some label is not the token itself
offsets.npy   (documents + 1,) where each document begins
largest.npy   (documents,) its largest id
rows.npy      (documents,) which row it was, only where rows were left out
shard.json    sizes and digests of the files, a digest of the content, and what was left out
checked.json  size and times that tokens.bin and labels.bin had when they were last found to be as written

Files of numbers about documents are compared with their digests whenever a shard is opened. Those of tokens are large:
they are read for that where size or times are not those of checked.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flexsp.data.packing import IntArray
from flexsp.data.rows import BadRow, Document

HEAD, CHECKED = "shard.json", "checked.json"
TOKENS, LABELS, OFFSETS, LARGEST, ROWS = "tokens.bin", "labels.bin", "offsets.npy", "largest.npy", "rows.npy"
TOKEN_TYPES = ("uint8", "uint16", "uint32")
LABEL_TYPES = ("int8", "int16", "int32")
SHOWN = 5
"""Rows of each kind that were left out, of which a shard keeps what was wrong."""
COPY_VALUES = 1 << 20


@dataclass(frozen=True, slots=True)
class LeftOut:
    """Rows that are no documents, for one reason."""

    count: int
    first: tuple[tuple[int, str], ...]
    """The first few: row in the shard, what is wrong."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """The head of a whole shard."""

    folder: Path
    documents: int
    tokens: int
    token_type: str
    label_type: str | None
    """None: every label is its token."""
    digest: str
    """Of tokens, labels and where documents begin: two shards of one digest hold the same documents."""
    left_out: Mapping[str, LeftOut]
    """By reason."""
    digests: Mapping[str, str]
    """Of each file, by name."""

    def offsets(self) -> IntArray:
        """(documents + 1,) first tokens."""
        return self._load(OFFSETS, self.documents + 1).astype(np.int64, copy=False)

    def largest(self) -> npt.NDArray[np.uint32]:
        """(documents,) the largest id or label of each."""
        return self._load(LARGEST, self.documents).astype(np.uint32, copy=False)

    def row(self, document: int) -> int:
        """The row in the shard that a document was."""
        return int(self._load(ROWS, self.documents)[document]) if ROWS in self.digests else document

    def map(self) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """All tokens and labels, memory-mapped."""
        tokens = np.memmap(self.folder / TOKENS, dtype=self.token_type, mode="r", shape=(self.tokens,))
        if self.label_type is None:
            return tokens, tokens
        return tokens, np.memmap(self.folder / LABELS, dtype=self.label_type, mode="r", shape=(self.tokens,))

    def is_checked(self) -> bool:
        """Whether tokens and labels are what they were when they were last compared with their digests."""
        return bool(read_sealed(self.folder / CHECKED) == self._stats())

    def check(self) -> bool:
        """Reads tokens and labels and compares them with their digests; where they are as written, that is noted.

        Raises:
            OSError: it cannot be read or noted.
        """
        stats = self._stats()  # before: what changes meanwhile is read again
        if not all(_digest(self.folder / name) == self.digests[name] for name in stats):
            return False
        write_sealed(self.folder / CHECKED, stats)
        return True

    def _stats(self) -> dict[str, list[int]]:
        return _stats(self.folder, [name for name in (TOKENS, LABELS) if name in self.digests])

    def _load(self, name: str, count: int) -> npt.NDArray[Any]:
        found: npt.NDArray[Any] = np.load(self.folder / name, allow_pickle=False)
        if found.shape != (count,):
            raise ValueError(f"{self.folder / name}: shape={found.shape} must be ({count},); remove the folder")
        return found


class Column:
    """A file of integers that grows, and whose type widens when one does not fit."""

    def __init__(self, path: Path, types: tuple[str, ...]) -> None:
        self._path, self._types = path, list(types)
        self._file = open(path, "wb")

    @property
    def type(self) -> str:
        return self._types[0]

    def append(self, values: IntArray) -> None:
        if len(values) == 0:
            return
        while values.max() > np.iinfo(self.type).max:
            self._widen()
        self._file.write(values.astype(self.type).tobytes())

    def written(self) -> Iterator[IntArray]:
        """All values so far, some at a time."""
        self._file.flush()
        with open(self._path, "rb") as file:
            while (values := np.fromfile(file, dtype=self.type, count=COPY_VALUES)).size:
                yield values.astype(np.int64)

    def _widen(self) -> None:
        wide = self._path.with_suffix(".wide")
        with open(wide, "wb") as file:
            for values in self.written():
                file.write(values.astype(self._types[1]).tobytes())
        self._file.close()
        self._types.pop(0)
        os.replace(wide, self._path)
        self._file = open(self._path, "ab")

    def close(self) -> None:
        self._file.close()


class ShardWriter:
    """Writes one shard, a document at a time."""

    def __init__(self, part: Path) -> None:
        """`part`: a folder of its own, which is not there yet."""
        part.mkdir(parents=True)
        self._part = part
        self._tokens = Column(part / TOKENS, TOKEN_TYPES)
        self._labels: Column | None = None
        self._offsets, self._largest, self._rows = [0], list[int](), list[int]()
        self._num_rows = 0
        self._left_out: dict[str, tuple[int, list[tuple[int, str]]]] = {}

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_: object) -> None:
        for column in (self._tokens, self._labels):
            if column is not None:
                column.close()

    def add(self, rows: Sequence[Document | BadRow]) -> None:
        """The next rows."""
        documents: list[Document] = []
        for number, row in enumerate(rows, start=self._num_rows):
            if isinstance(row, BadRow):
                count, first = self._left_out.get(row.reason, (0, []))
                self._left_out[row.reason] = count + 1, [*first, (number, row.text)][:SHOWN]
            else:
                documents.append(row)
                self._rows.append(number)
        self._num_rows += len(rows)
        if documents:
            self._add(documents)

    def _add(self, documents: Sequence[Document]) -> None:
        """All at once: rows may be short and many."""
        ends = np.cumsum([len(document.tokens) for document in documents])
        starts = np.concatenate([[0], ends[:-1]])
        tokens = np.concatenate([document.tokens for document in documents])
        if self._labels is None and any(document.labels is not None for document in documents):
            self._labels = self._labels_so_far()
        self._tokens.append(tokens)
        largest = np.maximum.reduceat(tokens, starts)
        if self._labels is not None:
            labels = np.concatenate([each.tokens if each.labels is None else each.labels for each in documents])
            self._labels.append(labels)
            largest = np.maximum(largest, np.maximum.reduceat(labels, starts))
        self._largest += largest.tolist()
        self._offsets += (self._offsets[-1] + ends).tolist()

    def _labels_so_far(self) -> Column:
        """Labels of the documents before the first whose labels differ: their tokens."""
        labels = Column(self._part / LABELS, LABEL_TYPES)
        for values in self._tokens.written():
            labels.append(values)
        return labels

    def finish(self, folder: Path) -> None:
        """Gives the shard its name; another process may have been there first."""
        columns = {TOKENS: self._tokens} | ({} if self._labels is None else {LABELS: self._labels})
        for column in columns.values():
            column.close()
        arrays: dict[str, npt.NDArray[Any]] = {
            OFFSETS: np.array(self._offsets, dtype=np.int64),
            LARGEST: np.array(self._largest, dtype=np.uint32),
        }
        if len(self._rows) != self._num_rows:
            arrays[ROWS] = np.array(self._rows, dtype=np.int64)
        for name, array in arrays.items():
            np.save(self._part / name, array, allow_pickle=False)
        digests = {name: _digest(self._part / name) for name in (*columns, *arrays)}
        digest = hashlib.sha256(json.dumps([column.type for column in columns.values()]).encode())
        for name in (*columns, OFFSETS):
            digest.update(bytes.fromhex(digests[name]))
        body = {
            "documents": len(self._rows), "tokens": self._offsets[-1], "token_type": self._tokens.type,
            "label_type": None if self._labels is None else self._labels.type, "digest": digest.hexdigest(),
            "left_out": {reason: [count, first] for reason, (count, first) in self._left_out.items()},
            "files": {name: [(self._part / name).stat().st_size, each] for name, each in digests.items()},
        }  # fmt: skip
        write_sealed(self._part / CHECKED, _stats(self._part, list(columns)))
        write_sealed(self._part / HEAD, body)
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.replace(self._part, folder)
        except OSError:
            if open_shard(folder) is None:
                raise
            shutil.rmtree(self._part)


def open_shard(folder: Path) -> Shard | None:
    """A whole shard; None where it is missing or damaged. What its tokens are `Shard.check` looks at."""
    body = read_sealed(folder / HEAD)
    if body is None:
        return None
    try:
        for name, (size, digest) in body["files"].items():
            if (folder / name).stat().st_size != size:
                return None
            if name not in (TOKENS, LABELS) and _digest(folder / name) != digest:
                return None
    except OSError:
        return None
    left_out = {
        reason: LeftOut(count, tuple((row, text) for row, text in first))
        for reason, (count, first) in body["left_out"].items()
    }
    return Shard(
        folder=folder,
        documents=body["documents"],
        tokens=body["tokens"],
        token_type=body["token_type"],
        label_type=body["label_type"],
        digest=body["digest"],
        left_out=left_out,
        digests={name: digest for name, (_, digest) in body["files"].items()},
    )


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stats(folder: Path, names: Sequence[str]) -> dict[str, list[int]]:
    """Size, and the times of content and entry in nanoseconds, by name."""
    found = {name: (folder / name).stat() for name in names}
    return {name: [each.st_size, each.st_mtime_ns, each.st_ctime_ns] for name, each in found.items()}


def write_sealed(path: Path, body: Mapping[str, Any]) -> None:
    """JSON with a digest of itself, written aside and renamed."""
    text = json.dumps(body)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(f"{hashlib.sha256(text.encode()).hexdigest()}\n{text}\n", encoding="utf-8")
    os.replace(aside, path)


def read_sealed(path: Path) -> Any:
    """What `write_sealed` wrote; None where there is none or it is damaged."""
    try:
        digest, _, text = path.read_bytes().rstrip(b"\n").partition(b"\n")
    except OSError:
        return None
    return json.loads(text) if hashlib.sha256(text).hexdigest().encode() == digest else None
