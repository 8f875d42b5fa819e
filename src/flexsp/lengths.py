"""Reading the lengths of a global batch, in tokens."""

from __future__ import annotations

import hashlib
import sys
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import numpy.typing as npt

Lengths = Sequence[int] | npt.NDArray[np.integer]
LengthArray = npt.NDArray[np.int64]

MOST_TOKENS = int(np.iinfo(np.int64).max)
ROW_SUFFIXES = (".jsonl", ".parquet")
DEFAULT_COLUMNS = ("input_ids", "length")
"""Of a file of rows, where no column is named: the first of these that is there."""
MOST_DIGITS = 40
MOST_LINE = 4096
"""Characters of a line of text: /dev/zero is one line without end."""
WHITE = b" \t\r\n"
JSON_BLOCK_BYTES = 1 << 26
"""pyarrow reads JSON in blocks, by default of 1 MiB, and no row may outgrow one: these hold 9 million token ids."""
PARQUET_ROWS = 4096
"""Rows of a Parquet file in memory at once: what is kept of each is its length."""


def as_lengths(lengths: Lengths, where: str = "lengths") -> LengthArray:
    """`lengths` as a (K,) int64 array.

    Raises:
        ValueError: no lengths, not one-dimensional, not integers, or one below 1.
    """
    array = np.asarray(lengths)
    if array.ndim != 1:
        raise ValueError(f"{where}: shape={array.shape} must have one dimension; give one length per sequence")
    if array.size == 0:
        raise ValueError(f"{where}: there are no lengths; give at least one")
    if array.dtype.kind not in "iu":
        raise ValueError(f"{where}: dtype={array.dtype} must be an integer type; lengths are counts of tokens")
    if array.min() < 1:
        index = int(np.argmax(array < 1))
        raise ValueError(f"{where}[{index}]={array[index]} must be at least 1 token; remove empty sequences")
    if array.max() > MOST_TOKENS:
        index = int(np.argmax(array > MOST_TOKENS))
        raise ValueError(f"{where}[{index}]={array[index]} must be below 2^63 tokens; correct the length")
    if array.sum(dtype=np.float64) > MOST_TOKENS / 2 and sum(array.tolist()) > MOST_TOKENS:
        raise ValueError(f"{where}: all {len(array)} together must be below 2^63 tokens; correct them")
    return array.astype(np.int64)


def read_lengths(path: str | Path, column: str | None = None) -> LengthArray:
    """Lengths from a file, or from standard input (`-`).

    Args:
        path: text of one integer a line, a `.npy` file, or rows in a `.jsonl` or `.parquet` file. The suffix decides.
        column: of rows: one of integers holds the lengths, one of lists the token ids, whose number is the length.
            None takes `input_ids` where it is there, else `length`.

    Raises:
        ValueError: the file cannot be read, a length is malformed, missing or below 1, or there is no such column; the
            message names file and line (from 1) or row (from 0).
    """
    name = str(path)
    if Path(name).suffix in ROW_SUFFIXES:
        return _read_rows(name, column)
    if column is not None:
        raise ValueError(
            f"{name}: column={column!r} must be left out: only {' and '.join(ROW_SUFFIXES)} files have columns"
        )
    if name.endswith(".npy"):
        return _read_npy(name)
    shown = "standard input" if name == "-" else name
    try:
        if name == "-":
            return _parse_lines(sys.stdin, shown)
        with open(name, encoding="utf-8-sig") as lines:
            return _parse_lines(lines, name)
    except OSError as error:
        raise ValueError(f"{name}: cannot be read ({error.strerror}); give a file of one length a line") from None
    except UnicodeDecodeError:
        raise ValueError(f"{shown}: is not text; give one length a line, or a .npy file named so") from None
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(shown) else f"{name!r}: {text}; give a file") from None


def _read_npy(name: str) -> LengthArray:
    """Mapped, not read: a header may claim more numbers than there are, or than memory holds."""
    try:
        array = np.load(name, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise ValueError(f"{name}: cannot be read ({error.strerror or error}); give a .npy file") from None
    except Exception as error:  # numpy's header is a Python literal: parsing one fails in many ways
        text = " ".join(str(error).split())[:200]
        raise ValueError(f"{name}: is no .npy array ({text}); save it again") from None
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{name}: is no .npy array (an archive of some); save one array")
    return as_lengths(array, name)


def _read_rows(name: str, column: str | None) -> LengthArray:
    """The lengths in a column of a JSONL or Parquet file. Of a Parquet file no other column is read."""
    try:
        import pyarrow
        from pyarrow import json, parquet
    except ImportError:
        raise ValueError(f"{name}: reading rows needs pyarrow; pip install pyarrow") from None
    lengths: list[LengthArray] = []
    begin = 0
    try:
        num_bytes = Path(name).stat().st_size
        if name.endswith(".parquet"):
            with parquet.ParquetFile(name, memory_map=True) as file:
                column = _chosen(file.schema_arrow, column, name)
                for batch in file.iter_batches(PARQUET_ROWS, columns=[column]):
                    lengths.append(_lengths_in(batch.column(column), f"{name} row", begin, column))
                    begin += batch.num_rows
        else:
            check_objects(name)
            # No schema is given: every field is parsed, and a row that does not go with the others is an error.
            block_bytes = max(1, min(num_bytes, JSON_BLOCK_BYTES))
            table = json.read_json(name, read_options=json.ReadOptions(block_size=block_bytes))
            column = _chosen(table.schema, column, name)
            for chunk in table.column(column).chunks:
                lengths.append(_lengths_in(chunk, f"{name} row", begin, column))
                begin += len(chunk)
    except OSError as error:
        text = " ".join(str(error.strerror or error).split())
        raise ValueError(f"{name}: cannot be read ({text}); give a file of rows") from None
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"{name}: is malformed ({text}); correct the file") from None
    return as_lengths(np.concatenate([np.empty(0, dtype=np.int64), *lengths]), name)


def check_objects(name: str) -> None:
    """Refuses a JSONL file of which a row is no object: pyarrow dies of a row that is `null`, of a segmentation fault.

    Raises:
        ValueError: the message names file and row (from 0).
        OSError: it cannot be read.
    """
    row = 0
    with open(name, "rb") as lines:
        for line in lines:
            if text := line.strip(WHITE):
                if not text.startswith(b"{"):
                    shown = text[:40].decode(errors="replace")
                    raise ValueError(f"{name} row {row}: {shown!r} must be a JSON object on a line; write {{...}}")
                row += 1


def _chosen(schema: Any, column: str | None, name: str) -> str:
    """The column to read, of integers or of lists of them."""
    from pyarrow import types

    if column is None:
        column = next((each for each in DEFAULT_COLUMNS if each in schema.names), None)
        if column is None:
            raise ValueError(
                f"{name}: there is no column {' or '.join(map(repr, DEFAULT_COLUMNS))}; it has {sorted(schema.names)}; "
                f"name the column of lengths or token ids"
            )
    if schema.names.count(column) != 1:
        raise ValueError(
            f"{name}: column={column!r} must be there once; it has {sorted(schema.names)}; name one of them"
        )
    kind = schema.field(column).type
    if types.is_string(kind) or types.is_large_string(kind):
        raise ValueError(
            f"{name}: column {column}={kind} is text, whose length in tokens only a tokenizer knows; count the tokens "
            f"first and give them as a column"
        )
    inner = kind.value_type if _is_list(kind) else kind
    if not (types.is_integer(inner) or types.is_null(inner)):
        raise ValueError(
            f"{name}: column {column}={kind} must hold integers (lengths) or lists of them (token ids); name another"
        )
    return column


def _lengths_in(values: Any, where: str, begin: int, column: str) -> LengthArray:
    """The lengths that a pyarrow array of integers or of lists of integers says, the first row of which is `begin`."""
    from pyarrow import compute

    counted = _is_list(values.type)
    rows = compute.list_value_length(values) if counted else values
    if rows.null_count:
        row = begin + int(np.argmax(rows.is_null().to_numpy(zero_copy_only=False)))
        raise ValueError(f"{where} {row}: {column} is missing or null; give one in every row")
    lengths: LengthArray = rows.cast("int64").to_numpy(zero_copy_only=False)
    if len(lengths) and lengths.min() < 1:
        row = int(np.argmax(lengths < 1))
        shown = "[]" if counted else lengths[row]
        raise ValueError(f"{where} {begin + row}: {column}={shown} must be at least 1 token; remove empty sequences")
    if counted and compute.list_flatten(values).null_count:
        of_rows = compute.list_parent_indices(values)
        null = int(np.argmax(compute.list_flatten(values).is_null().to_numpy(zero_copy_only=False)))
        raise ValueError(f"{where} {begin + of_rows[null].as_py()}: {column} has a null in its list; give token ids")
    return lengths


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _parse_lines(lines: TextIO, name: str) -> LengthArray:
    lengths = array("q")  # 8 bytes a length, where a list takes 36
    for number, line in enumerate(iter(lambda: lines.readline(MOST_LINE), ""), start=1):
        text = line.strip()
        if not text:
            continue
        if not _is_count(text) or not 1 <= int(text) <= MOST_TOKENS:
            raise ValueError(f"{name}:{number}: length={text[:40]!r} must be a positive integer; give one a line")
        lengths.append(int(text))
    return as_lengths(np.frombuffer(lengths, dtype=np.int64) if lengths else np.empty(0, np.int64), name)


def _is_count(text: str) -> bool:
    """Whether it is digits alone, and not so many that Python refuses to read them."""
    return text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS


def parse_tokens(text: str | int, where: str) -> int:
    """A number of tokens: an integer, or one with the suffix K (1024 tokens), e.g. 192K."""
    if isinstance(text, int) and not isinstance(text, bool) and 0 < text <= MOST_TOKENS:
        return text
    digits = str(text)
    factor = 1
    if digits[-1:] in ("K", "k"):
        digits, factor = digits[:-1], 1024
    if not _is_count(digits) or not 1 <= int(digits) * factor <= MOST_TOKENS:
        raise ValueError(
            f"{where}={text!r:.60} must be a positive number of tokens; write it like 4096 or 4K (1024 each)"
        )
    return int(digits) * factor


def length_text(tokens: int) -> str:
    """Tokens as on a command line: 4096 is 4K; what is no multiple of 1024 stays as it is."""
    return f"{tokens // 1024}K" if tokens % 1024 == 0 else str(tokens)


def lengths_sha256(lengths: Lengths) -> str:
    """SHA-256 of the lengths as little-endian 64-bit integers: names the batch a plan was made for."""
    return hashlib.sha256(as_lengths(lengths).astype("<i8").tobytes()).hexdigest()
