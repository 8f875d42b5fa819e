"""Where rows come from: files by name, folder or pattern, the standard library's source, or a data set."""

from __future__ import annotations

import glob
import hashlib
import itertools
import json
import os
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flexsp.data.encode import Encoder, IdRows, choose_encoder, raw_or_text
from flexsp.data.formats import FORMATS, PART_BYTES, Part, Text, format_of
from flexsp.data.options import DataOptions
from flexsp.data.rows import Row

PYTHON_STDLIB = "python-stdlib"
"""The source name of the standard library of the Python that runs us."""
HUB = "hf:"
MOST_FILES = 4096
"""Small files that one shard may hold, on average."""
NO_TEXT = (".json", ".csv", ".tsv", ".gz", ".zst", ".zip", ".arrow", ".npy", ".bin", ".pt", ".safetensors")
Stat = tuple[int, ...]
"""What changes when a file does: bytes, and the times of its content and of its entry in nanoseconds."""


@dataclass(frozen=True, slots=True)
class File:
    """A file of a source, or what stands for one."""

    name: str
    """What errors call it."""
    path: str


@dataclass(frozen=True, slots=True)
class Piece:
    """What one shard is made of: a part of a file, or several small files whole."""

    content: str
    """A digest."""
    files: tuple[File, ...]
    parts: tuple[Part, ...]
    """One of each file."""
    stats: tuple[Stat, ...]
    """Of each file when it was scanned."""


class Source(Protocol):
    """Rows in an order that is always the same."""

    name: str
    identity: str
    """Names the source among others on this machine."""

    def files(self) -> list[File]:
        """All that there are, in order."""
        ...

    def encoder(self, options: DataOptions, model_path: str) -> Encoder:
        """What makes documents of the rows."""
        ...

    def stat(self, file: File) -> Stat:
        """Of a file now."""
        ...

    def scan(self, file: File) -> list[Part]:
        """Reads a file and cuts it."""
        ...

    def pieces(self, scanned: Sequence[tuple[File, Stat, Sequence[Part]]]) -> list[Piece]:
        """What the shards are made of."""
        ...

    def read(self, piece: Piece, columns: Sequence[str]) -> Iterator[list[Row]]:
        """The rows of a piece, in order, a few at a time."""
        ...

    def describe(self, piece: Piece, row: int) -> str:
        """A row of a piece, for errors."""
        ...


class Files:
    """Rows of .jsonl and .parquet files, or files of text."""

    def __init__(self, name: str, identity: str, files: Sequence[File], raw: bool = False) -> None:
        """`raw`: whether text is bytes of any kind, UTF-8 or not."""
        self.name, self.identity, self._files, self._raw = name, identity, list(files), raw
        self._is_text = not files or isinstance(format_of(files[0].path), Text)

    def files(self) -> list[File]:
        return self._files

    def encoder(self, options: DataOptions, model_path: str) -> Encoder:
        if self._raw:
            return raw_or_text(options, self.name)
        if self._is_text:
            return choose_encoder(options, None, self.name, model_path)
        for file in self._files:
            with readable(file.name):
                if columns := format_of(file.path).columns(file.path, file.name):
                    return choose_encoder(options, columns, self.name, model_path)
        return IdRows()  # there is no row that could be read: which is said once they are counted

    def stat(self, file: File) -> Stat:
        with readable(file.name):
            found = os.stat(file.path)
        return found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def scan(self, file: File) -> list[Part]:
        with readable(file.name):
            return format_of(file.path).scan(file.path, file.name)

    def pieces(self, scanned: Sequence[tuple[File, Stat, Sequence[Part]]]) -> list[Piece]:
        if self._is_text:
            return list(_grouped(scanned))
        return [Piece(part.content, (file,), (part,), (stat,)) for file, stat, parts in scanned for part in parts]

    def read(self, piece: Piece, columns: Sequence[str]) -> Iterator[list[Row]]:
        for file, part in zip(piece.files, piece.parts, strict=True):
            with readable(file.name):
                yield from format_of(file.path).read(file.path, file.name, part, columns)

    def describe(self, piece: Piece, row: int) -> str:
        return piece.files[row].name if self._is_text else f"{piece.files[0].name} row {piece.parts[0].first_row + row}"


@contextmanager
def readable(name: str) -> Iterator[None]:
    """A file that cannot be read is the user's to mend."""
    try:
        yield
    except OSError as error:
        said = " ".join((error.strerror or str(error)).split())  # pyarrow's have several lines
        raise ValueError(f"{name}: cannot be read ({said}); correct data.source") from None


def _grouped(scanned: Sequence[tuple[File, Stat, Sequence[Part]]]) -> Iterator[Piece]:
    """Files in groups of about `PART_BYTES`.

    Whether a group ends with a file follows from the file's content alone, so that a file that is changed, added or
    removed leaves all groups but its own as they are.
    """
    group: list[tuple[File, Stat, Sequence[Part]]] = []
    for each, after in itertools.zip_longest(scanned, scanned[1:]):
        group.append(each)
        (part,) = each[2]
        draw = int(part.content[:16], 16) / 2**64
        if after is None or draw < max(part.stop / PART_BYTES, 1 / MOST_FILES):
            files, stats, parts = zip(*group, strict=True)
            whole = json.dumps([part.content for (part,) in parts])
            content = hashlib.sha256(whole.encode()).hexdigest()
            yield Piece(content, files, tuple(part for (part,) in parts), stats)
            group = []


def find_source(name: str, options: DataOptions) -> Source:
    """The source that `data.source` names.

    Raises:
        ValueError: there is none, or what it names is not clear; the message says what to do.
    """
    if name == PYTHON_STDLIB:
        return Files(name, f"{name} {sysconfig.get_path('stdlib')}", _standard_library(), raw=True)
    path = Path(os.path.expanduser(name))
    saved = os.path.isdir(path) and any(
        os.path.isfile(path / each) for each in ("dataset_info.json", "dataset_dict.json")
    )
    if name.startswith(HUB) or saved:
        from flexsp.data.hub import HubSet

        return HubSet(name, options)
    if os.path.isdir(path):
        found = _in_folder(name, path, options.pattern)
    elif any(sign in name for sign in "*?[") and not (path.suffix in FORMATS and os.path.isfile(path)):
        found = [File(each, each) for each in sorted(glob.glob(str(path), recursive=True)) if os.path.isfile(each)]
    elif path.suffix in FORMATS:
        found = [File(name, str(path))]
        if not os.path.isfile(path):
            raise ValueError(f"{name}: cannot be read (there is no such file); give a file of rows")
    else:
        raise ValueError(
            f"source={name!r} is unknown; give {PYTHON_STDLIB!r}, a .jsonl or .parquet file, a folder or a pattern of "
            f"files, or 'hf:NAME' for a data set"
        )
    _check_kinds(name, found)
    identity = f"{os.path.abspath(path)} {options.pattern}"
    return Files(name, identity, [File(file.name, os.path.abspath(file.path)) for file in found])


def _standard_library() -> list[File]:
    folder = Path(sysconfig.get_path("stdlib"))
    found: list[str] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in ("site-packages", "__pycache__")]
        found += [os.path.join(parent, name) for name in names if name.endswith(".py")]
    files = [File(Path(path).relative_to(folder).as_posix(), path) for path in found if os.path.isfile(path)]
    return sorted(files, key=lambda file: file.name)


def _in_folder(name: str, folder: Path, pattern: str) -> list[File]:
    def matching(each: str) -> list[str]:
        found = glob.glob(each, root_dir=folder, recursive=True)
        return [path for path in found if os.path.isfile(folder / path)]

    if pattern:
        paths = matching(pattern)
    else:
        paths = [path for suffix in FORMATS for path in matching(f"**/*{suffix}")]
        texts = matching("**/*.txt")
        if paths and texts:
            raise ValueError(
                f"{name}: holds files of rows ({paths[0]}) and of text ({texts[0]}); say which by data.pattern, e.g. "
                f"'**/*.txt'"
            )
        paths = paths or texts
    if not paths:
        what = f"data.pattern={pattern!r} matches" if pattern else "there is"
        raise ValueError(f"{name}: {what} no file of it; give a folder with files, or set data.pattern, e.g. '**/*.md'")
    return [File(f"{name.rstrip('/')}/{path}", str(folder / path)) for path in sorted(paths)]


def _check_kinds(name: str, files: Sequence[File]) -> None:
    if not files:
        raise ValueError(f"{name}: matches no file; correct the pattern")
    rows = next((file.name for file in files if Path(file.path).suffix in FORMATS), None)
    text = next((file.name for file in files if Path(file.path).suffix not in FORMATS), None)
    if rows and text:
        raise ValueError(f"{name}: matches files of rows ({rows}) and of text ({text}); narrow it to one kind")
    odd = next((file.name for file in files if Path(file.path).suffix in NO_TEXT), None)
    if odd:
        raise ValueError(f"{odd}: is neither .jsonl nor .parquet nor text; convert it, or narrow the pattern")
