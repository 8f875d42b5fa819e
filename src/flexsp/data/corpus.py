"""Corpora: documents of tokens, of which any part can be read without the rest."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from flexsp.data.packing import IntArray
from flexsp.lengths import JSON_BLOCK_BYTES, LengthArray

PYTHON_STDLIB = "python-stdlib"
"""The source name of the standard library of the Python that runs us."""


class Corpus(Protocol):
    """Documents by index. Two ranks that open one source see the same documents in the same order."""

    name: str
    lengths: LengthArray
    """(documents,) tokens, each at least 1."""
    num_empty: int
    """Documents of no token, which were left out."""
    max_token: int
    """No token id is above it."""

    def read(self, document: int, start: int, stop: int) -> tuple[IntArray, IntArray]:
        """Tokens [start, stop) of a document and the label of each token itself (not shifted)."""
        ...

    def describe(self, document: int) -> str:
        """A name for errors: file, or file and row."""
        ...


def open_corpus(source: str) -> Corpus:
    """The corpus that `source` names: `python-stdlib`, or a `.jsonl` or `.parquet` file of rows with `input_ids`.

    Raises:
        ValueError: an unknown source, or a file that cannot be read as what its name says.
    """
    if source == PYTHON_STDLIB:
        return PythonStdlib()
    if Path(source).suffix in (".jsonl", ".parquet"):
        return _Rows(source)
    raise ValueError(
        f"source={source!r} is unknown; give {PYTHON_STDLIB!r}, or a .jsonl or .parquet file of rows with input_ids"
    )


class PythonStdlib:
    """The source files of the Python standard library, one file a document, one byte a token."""

    name = PYTHON_STDLIB
    max_token = 255

    def __init__(self, folder: str | Path | None = None) -> None:
        """`folder`: by default where the running Python has its library."""
        self.folder = Path(folder or sysconfig.get_path("stdlib"))
        found = sorted(
            path.relative_to(self.folder).as_posix()
            for path in self.folder.rglob("*.py")
            if "site-packages" not in path.parts and path.is_file()
        )
        sizes = [(self.folder / path).stat().st_size for path in found]
        self.paths = [path for path, size in zip(found, sizes, strict=True) if size]
        self.lengths = np.array([size for size in sizes if size], dtype=np.int64)
        self.num_empty = len(found) - len(self.paths)

    def read(self, document: int, start: int, stop: int) -> tuple[IntArray, IntArray]:
        with open(self.folder / self.paths[document], "rb") as file:
            file.seek(start)
            tokens = np.frombuffer(file.read(stop - start), dtype=np.uint8).astype(np.int64)
        if len(tokens) != stop - start:
            raise ValueError(f"{self.describe(document)}: the file has changed since the run began; start it again")
        return tokens, tokens

    def describe(self, document: int) -> str:
        return self.paths[document]


class _Rows:
    """Rows of a JSONL or Parquet file: `input_ids` and, where there, `labels` (-100 where masked), as lists."""

    def __init__(self, path: str) -> None:
        self.name = path
        columns = _read_columns(path)
        if "input_ids" not in columns:
            raise ValueError(f"{path}: there is no column 'input_ids'; it has {sorted(columns)}; name the tokens so")
        self._tokens, offsets = _flatten(path, "input_ids", columns["input_ids"])
        lengths = np.diff(offsets)
        self._labels = self._tokens
        if "labels" in columns:
            self._labels, label_offsets = _flatten(path, "labels", columns["labels"])
            if unequal := np.flatnonzero(np.diff(label_offsets) != lengths).tolist():
                row = unequal[0]
                raise ValueError(
                    f"{path} row {row}: labels={np.diff(label_offsets)[row]} and input_ids={lengths[row]} must be "
                    f"equally many; write one label per token, -100 where it does not count"
                )
        if self._tokens.min(initial=0) < 0:
            least = int(self._tokens.argmin())
            row = int(np.searchsorted(offsets, least, side="right")) - 1
            raise ValueError(f"{path} row {row}: input_ids={self._tokens[least]} must be at least 0; correct the row")
        self._rows = np.flatnonzero(lengths)
        self._offsets = offsets[self._rows]
        self.lengths = lengths[self._rows]
        self.num_empty = len(lengths) - len(self._rows)
        self.max_token = int(self._tokens.max(initial=0))

    def read(self, document: int, start: int, stop: int) -> tuple[IntArray, IntArray]:
        part = slice(int(self._offsets[document]) + start, int(self._offsets[document]) + stop)
        return self._tokens[part].astype(np.int64), self._labels[part].astype(np.int64)

    def describe(self, document: int) -> str:
        return f"{self.name} row {self._rows[document]}"


def _read_columns(path: str) -> dict[str, Any]:
    """The columns that we use of a file, as pyarrow arrays."""
    try:
        import pyarrow
        import pyarrow.json
        import pyarrow.parquet
    except ImportError:
        raise ValueError(f"{path}: reading rows needs pyarrow; pip install 'flexsp[train]'") from None
    try:
        if path.endswith(".parquet"):
            table = pyarrow.parquet.read_table(path, memory_map=True)
        else:
            options = pyarrow.json.ReadOptions(block_size=max(1, min(Path(path).stat().st_size, JSON_BLOCK_BYTES)))
            table = pyarrow.json.read_json(path, read_options=options)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error}); give a file of rows with input_ids") from None
    except pyarrow.ArrowException as error:
        raise ValueError(f"{path}: is malformed ({error}); correct the row") from None
    return {name: table.column(name) for name in table.column_names}


def _flatten(path: str, name: str, column: Any) -> tuple[IntArray, IntArray]:
    """A column of integer lists as all its values and the (rows + 1,) offsets of the rows in them."""
    import pyarrow

    kind = column.type
    if not (pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)) or not (
        pyarrow.types.is_integer(kind.value_type) or pyarrow.types.is_null(kind.value_type)
    ):
        raise ValueError(f"{path}: column {name}={kind} must hold lists of integers; write token ids so")
    whole = column.cast(pyarrow.large_list(pyarrow.int64())).combine_chunks()
    if whole.null_count or whole.values.null_count:
        row = next(i for i, value in enumerate(whole) if not value.is_valid or None in value.as_py())
        raise ValueError(f"{path} row {row}: {name} has a null; give integers")
    return whole.values.to_numpy(zero_copy_only=False), whole.offsets.to_numpy().astype(np.int64)
