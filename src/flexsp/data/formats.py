"""What files are made of: rows of JSON lines or Parquet, or one document of text.

A format cuts a file into parts of about `PART_BYTES` and names the content of each, so that a part is read, tokenized
and kept for itself. Nothing here holds more of a file in memory than a part.
"""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from flexsp import jsonfields as jf
from flexsp.data.rows import BadRow, Reason, Row

PART_BYTES = 32 << 20
BATCH_ROWS, BATCH_BYTES = 256, 4 << 20
"""What is handed on at once, the less of the two."""
MOST_ROW_BYTES = 1 << 30
LOOKED_AT = 100
"""Rows at the start of a JSONL file whose columns are looked at."""
DECODER = json.JSONDecoder(object_pairs_hook=jf.each_once)


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a file, or all of it."""

    content: str
    """A digest: equal parts have equal ones."""
    start: int
    stop: int
    """Bytes of JSON lines and text, row groups of Parquet, rows of a data set."""
    first_row: int


class Format(Protocol):
    """How files of a suffix are read. Paths are absolute; `name` is what errors call the file."""

    def columns(self, path: str, name: str) -> list[str] | None:
        """Columns of the rows; None where the file is text. [] where there is no row to tell."""
        ...

    def scan(self, path: str, name: str) -> list[Part]:
        """The parts of a file, which is read whole for that."""
        ...

    def read(self, path: str, name: str, part: Part, columns: Sequence[str]) -> Iterator[list[Row]]:
        """The rows of a part, in order, a few at a time."""
        ...


class Text:
    """One document a file."""

    def columns(self, path: str, name: str) -> None:
        return None

    def scan(self, path: str, name: str) -> list[Part]:
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return [Part(digest, 0, file.tell(), 0)]

    def read(self, path: str, name: str, part: Part, columns: Sequence[str]) -> Iterator[list[Row]]:
        yield [{columns[0]: Path(path).read_bytes()}]


class JsonLines:
    """A JSON object a line; blank lines are no rows."""

    def columns(self, path: str, name: str) -> list[str]:
        found: dict[str, None] = {}
        with open(path, "rb") as file:
            for _ in range(LOOKED_AT):
                row = _parsed(file.readline(MOST_ROW_BYTES).removeprefix(codecs.BOM_UTF8))
                found |= {} if isinstance(row, BadRow) else dict.fromkeys(row)
        return list(found)

    def scan(self, path: str, name: str) -> list[Part]:
        parts: list[Part] = []
        first_row = start = 0
        with open(path, "rb") as file:
            while block := file.read(PART_BYTES):
                if not block.endswith(b"\n"):
                    block += (rest := file.readline(MOST_ROW_BYTES))
                    if len(rest) == MOST_ROW_BYTES and not rest.endswith(b"\n"):
                        raise ValueError(f"{name}: a line is longer than {MOST_ROW_BYTES} bytes; write one row a line")
                part = Part(hashlib.sha256(block).hexdigest(), start, start + len(block), first_row)
                parts.append(part)
                first_row, start = first_row + len(_lines(block)), part.stop
        return parts

    def read(self, path: str, name: str, part: Part, columns: Sequence[str]) -> Iterator[list[Row]]:
        with open(path, "rb") as file:
            file.seek(part.start)
            block = file.read(part.stop - part.start)
        batch: list[Row] = []
        num_bytes = 0
        for line in _lines(block.removeprefix(codecs.BOM_UTF8) if part.start == 0 else block):
            batch.append(_parsed(line))
            num_bytes += len(line)
            if len(batch) == BATCH_ROWS or num_bytes >= BATCH_BYTES:
                yield batch
                batch, num_bytes = [], 0
        yield batch


class Parquet:
    """Row groups are never cut."""

    def columns(self, path: str, name: str) -> list[str]:
        with _parquet(path, name) as file:
            return list(file.schema_arrow.names)

    def scan(self, path: str, name: str) -> list[Part]:
        with open(path, "rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
        parts: list[Part] = []
        with _parquet(path, name) as file:
            start = first_row = num_rows = num_bytes = 0
            for group in range(file.num_row_groups):
                metadata = file.metadata.row_group(group)
                num_rows, num_bytes = num_rows + metadata.num_rows, num_bytes + metadata.total_byte_size
                if num_bytes >= PART_BYTES or group + 1 == file.num_row_groups:
                    parts.append(Part(f"{digest} {start} {group + 1}", start, group + 1, first_row))
                    start, first_row, num_rows, num_bytes = group + 1, first_row + num_rows, 0, 0
        return parts

    def read(self, path: str, name: str, part: Part, columns: Sequence[str]) -> Iterator[list[Row]]:
        import pyarrow

        with _parquet(path, name) as file:
            there = [column for column in columns if column in file.schema_arrow.names]
            try:
                for batch in file.iter_batches(BATCH_ROWS, row_groups=range(part.start, part.stop), columns=there):
                    yield arrow_rows(batch)
            except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
                raise ValueError(f"{name}: is malformed ({_line(error)}); write the file again") from None


FORMATS: dict[str, Format] = {".jsonl": JsonLines(), ".parquet": Parquet()}


def format_of(path: str) -> Format:
    """By the suffix; what has another one is text."""
    return FORMATS.get(Path(path).suffix, Text())


def arrow_rows(batch: Any) -> list[Row]:
    """The rows of a pyarrow batch or table."""
    cells = [_cells(batch.column(index), name) for index, name in enumerate(batch.schema.names)]
    return [_row(batch.schema.names, [column[row] for column in cells]) for row in range(batch.num_rows)]


def _row(names: Sequence[str], values: Sequence[Any]) -> Row:
    return next((value for value in values if isinstance(value, BadRow)), None) or dict(zip(names, values, strict=True))


def _cells(column: Any, name: str) -> list[Any]:
    """Values of a column: text as bytes, lists of integers as arrays, where they have no null."""
    import pyarrow
    from pyarrow import types

    if isinstance(column, pyarrow.ChunkedArray):
        column = column.combine_chunks()
    if types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = column.type
    if types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind):
        return list(column.cast(pyarrow.large_binary()).to_pylist())  # decoded row by row
    if (types.is_list(kind) or types.is_large_list(kind)) and types.is_integer(kind.value_type):
        if not column.values.null_count:
            offsets, values = column.offsets.to_pylist(), column.values.to_numpy()
            valid = column.is_valid().to_pylist()
            return [values[a:b] if v else None for a, b, v in zip(offsets, offsets[1:], valid, strict=False)]
    try:
        return list(column.to_pylist())
    except UnicodeDecodeError:
        return [_value(value, name) for value in column]


def _value(value: Any, name: str) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        return BadRow(Reason.UTF8, f"{name} is not UTF-8 ({error.reason}); convert it")


def _lines(block: bytes) -> list[bytes]:
    return [line for line in block.split(b"\n") if line and not line.isspace()]


def _parsed(line: bytes) -> Row:
    """The object in a line."""
    try:
        row = DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return BadRow(Reason.UTF8, f"not UTF-8 ({error.reason}); convert the file")
    except json.JSONDecodeError as error:
        return BadRow(Reason.JSON, f"malformed JSON ({error.msg} at character {error.colno}); correct the row")
    except (ValueError, RecursionError) as error:  # a key twice; a number of thousands of digits; brackets in brackets
        return BadRow(Reason.JSON, f"malformed JSON ({_line(error)}); correct the row")
    return row if isinstance(row, dict) else BadRow(Reason.TYPE, "no JSON object; write {...}")


def _parquet(path: str, name: str) -> Any:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ValueError(f"{name}: reading Parquet needs pyarrow; pip install 'flexsp[train]'") from None
    try:
        return parquet.ParquetFile(path, memory_map=True)
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # the latter: a column's name
        raise ValueError(f"{name}: is malformed ({_line(error)}); give a Parquet file") from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
