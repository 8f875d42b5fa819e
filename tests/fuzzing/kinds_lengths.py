"""Lengths as text, standard input, .npy, .jsonl, .parquet, and the names of distributions."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import parquet

from flexsp.lengths import read_lengths
from fuzzing import mutate
from fuzzing.attempt import Broken, Refused, Tried, command, library, written

GOOD = [390, 90, 60, 30, 5]


class LengthsKind:
    """`flexsp lengths` and the library."""

    name = "lengths"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def try_one(self, random: Random) -> Tried:
        how = random.choice((_text, _text, _npy, _rows, _parquet))
        suffix, data, expected, what = how(random)
        if random.random() < (0.3 if suffix != ".txt" else 0.15):
            data, more = mutate.raw(data, random)
            what, expected = f"{what}; {more}", None
        path = written(self.folder / f"lengths{suffix}", data)
        if suffix == ".txt":
            expected = _of_text(data)
        if suffix == ".txt" and random.random() < 0.3:
            said = command(["lengths", "-"], ("standard input",), data)
            self._agrees(said.status != 2, None, expected, what)
            return Tried(said.status != 2, what)
        found = library(lambda: read_lengths(path), (str(path),))
        refused = isinstance(found, Refused)
        self._agrees(not refused, found, expected, what)
        said = command(["lengths", str(path)], (str(path),))
        if refused != (said.status == 2):
            raise Broken(f"the library {'refuses' if refused else 'accepts'}, flexsp lengths ends with {said.status}")
        return Tried(not refused, what)

    def _agrees(self, accepted: bool, found: Any, expected: list[int] | str | None, what: str) -> None:
        """`expected`: the lengths, or `refuse`, or None where only the ending matters."""
        if expected == "refuse" and accepted:
            raise Broken(f"accepted: {what}")
        if isinstance(expected, list):
            if not accepted:
                raise Broken(f"refused: {what}: {getattr(found, 'text', '')}")
            if found is not None and found.tolist() != expected:
                raise Broken(f"read as {found.tolist()[:9]} instead of {expected[:9]}")


def _of_text(data: bytes) -> list[int] | str:
    """What a text of lengths says."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        return "refuse"
    lines = [line.strip() for line in re.split("\r\n|\r|\n", text)]
    lines = [line for line in lines if line]
    if not lines or not all(re.fullmatch("[0-9]{1,40}", line) for line in lines):
        return "refuse"
    values = [int(line) for line in lines]
    return values if min(values) >= 1 and sum(values) < 2**63 else "refuse"


def _text(random: Random) -> tuple[str, bytes, Any, str]:
    lines = [str(length) for length in GOOD]
    hostile = random.choice((*mutate.TEXTS, "0", "-3", "1.5", "9" * 19, "9" * 20, str(2**63 - 1), "12 13", "1,2", "+4"))
    lines.insert(random.randrange(6), hostile)
    end = random.choice(("\n", "\n", "\r\n", "\r", "\n\n"))
    return ".txt", end.join(lines).encode("utf-8", "surrogatepass"), None, f"a line {hostile[:40]!r}"


def _npy(random: Random) -> tuple[str, bytes, Any, str]:
    arrays: dict[str, tuple[Any, Any]] = {
        "int64": (np.array(GOOD), GOOD),
        "uint8": (np.array([1, 255], np.uint8), [1, 255]),
        "big endian": (np.array(GOOD, ">i4"), GOOD),
        "uint64 beyond int64": (np.array([1, 2**64 - 1], np.uint64), "refuse"),
        "sum beyond int64": (np.array([2**62, 2**62, 2**62]), "refuse"),
        "float": (np.array([1.0, 2.0]), "refuse"),
        "bool": (np.array([True]), "refuse"),
        "complex": (np.array([1j]), "refuse"),
        "text": (np.array(["12"]), "refuse"),
        "times": (np.array([5], "m8[s]"), "refuse"),
        "no dimension": (np.array(7), "refuse"),
        "two dimensions": (np.array([GOOD, GOOD]), "refuse"),
        "empty": (np.array([], np.int64), "refuse"),
        "zero": (np.array([5, 0]), "refuse"),
        "negative": (np.array([5, -(2**63)]), "refuse"),
        "fields": (np.array([(1, 2)], [("a", int), ("b", int)]), "refuse"),
        "objects": (np.array([1, None], object), "refuse"),
    }
    what = random.choice([*arrays, "header", "header", "zip", "other version"])
    file = io.BytesIO()
    if what == "zip":
        np.savez(file, lengths=np.array(GOOD))
        return ".npy", file.getvalue(), "refuse", what
    if what == "header":
        np.save(file, np.array(GOOD))
        claim = random.choice((b"(10**18,)", b"(-1,)", b"(999999999999999999,)", b"(5,5)", b"()", b"(4,)", b"open(1)"))
        data = file.getvalue()
        begin = data.index(b"(5,)")
        data = data[:begin] + claim + data[begin + 4 :]
        grown = len(claim) - 4
        data = data[: data.index(b"\n") - grown] + b"\n" + data[data.index(b"\n") + 1 :]  # its spaces make room
        return ".npy", data, None if claim == b"(4,)" else "refuse", f"a header of shape {claim.decode()}"
    array, expected = arrays.get(what, (np.array(GOOD), GOOD))
    if what == "other version":
        np.lib.format.write_array(file, array, version=random.choice(((2, 0), (3, 0))))
    else:
        np.save(file, array, allow_pickle=True)
    return ".npy", file.getvalue(), expected, what


ROWS: dict[str, tuple[str, Any]] = {
    "length": ('{"length": %d}', GOOD),
    "ids": ('{"input_ids": [%d, 1], "text": "x"}', [2] * 5),
    "text": ('{"text": "%d"}', "refuse"),
    "nested": ('{"length": {"a": %d}}', "refuse"),
    "list of text": ('{"input_ids": ["%d"]}', "refuse"),
    "float": ('{"length": %d.5}', "refuse"),
    "quoted": ('{"length": "%d"}', "refuse"),
    "array": ("[%d]", "refuse"),
    "number": ("%d", "refuse"),
}
BAD_ROWS = (
    '{"length": 0}', '{"length": -1}', '{"length": null}', '{"length": 1e3}', '{"length": true}', "{}", "null", "[]",
    '{"length": 99999999999999999999}', '{"length": NaN}', '{"length": 5, "length": 6}', '{"length": [1]}', "{", "x",
    '{"Length": 5}',
)  # fmt: skip


def _rows(random: Random) -> tuple[str, bytes, Any, str]:
    what = random.choice(list(ROWS))
    form, expected = ROWS[what]
    lines = [form % length for length in GOOD]
    if what == "length" and random.random() < 0.7:
        row = random.choice(BAD_ROWS)
        lines.insert(random.randrange(6), row)
        return ".jsonl", "\n".join(lines).encode(), "refuse", f"a row {row}"
    if what == "ids" and random.random() < 0.5:
        row = random.choice(('{"input_ids": []}', '{"input_ids": [null]}', '{"input_ids": null}', '{"input_ids": 7}'))
        lines.insert(random.randrange(6), row)
        return ".jsonl", "\n".join(lines).encode(), "refuse", f"a row {row}"
    return ".jsonl", "\n".join(lines).encode(), expected, f"rows of {what}"


def _parquet(random: Random) -> tuple[str, bytes, Any, str]:
    columns: dict[str, tuple[Any, Any]] = {
        "length": ({"length": GOOD}, GOOD),
        "ids": ({"input_ids": [[1] * 3, [2]]}, [3, 1]),
        "uint64": ({"length": pa.array([1, 2**64 - 1], pa.uint64())}, "refuse"),
        "null": ({"length": [1, None]}, "refuse"),
        "nulls": ({"length": pa.nulls(3)}, "refuse"),
        "zero": ({"length": [1, 0]}, "refuse"),
        "empty list": ({"input_ids": [[1], []]}, "refuse"),
        "null in a list": ({"input_ids": [[1], [None]]}, "refuse"),
        "float": ({"length": [1.0]}, "refuse"),
        "text": ({"length": ["1"]}, "refuse"),
        "struct": ({"length": [{"a": 1}]}, "refuse"),
        "list of lists": ({"input_ids": [[[1]]]}, "refuse"),
        "no rows": ({"length": pa.array([], pa.int64())}, "refuse"),
        "dictionary": ({"length": pa.array([1, 2]).dictionary_encode()}, None),
        "decimal": ({"length": pa.array([1, 2]).cast(pa.decimal128(20, 0))}, "refuse"),
        "date": ({"length": pa.array([1, 2], pa.int32()).cast(pa.date32())}, "refuse"),
        "other column": ({"tokens": GOOD}, "refuse"),
        "no columns": ({}, "refuse"),
    }
    what = random.choice(list(columns))
    made, expected = columns[what]
    file = io.BytesIO()
    compression = random.choice(("none", "snappy", "zstd"))
    parquet.write_table(pa.table(made), file, compression=compression)
    return ".parquet", file.getvalue(), expected, f"{what}, {compression}"


BAD_TOKENS = (
    '{"input_ids": null}', "{}", '{"input_ids": 5}', '{"input_ids": "ab"}', '{"input_ids": [1.5]}', 
    '{"input_ids": ["a"]}',
    '{"input_ids": [null]}', '{"input_ids": [-1]}', '{"input_ids": [[1]]}', '{"input_ids": [1, 2], "labels": [1]}',
    '{"input_ids": [99999999999999999999]}', '{"input_ids": {"a": 1}}', "[1]", "null", "{", '{"input_ids": [true]}',
)  # fmt: skip


def corpus_rows(random: Random) -> tuple[str, bytes, Any, str]:
    """Rows of token ids: suffix, file, the documents or `refuse`, and what is in it."""
    good = [[1, 2, 3], [4], [5, 6]]
    if random.random() < 0.5:
        lines = [json.dumps({"input_ids": ids}) for ids in good]
        if random.random() < 0.8:
            row = random.choice(BAD_TOKENS)
            lines.insert(random.randrange(4), row)
            return ".jsonl", "\n".join(lines).encode(), "refuse", f"a row {row}"
        return ".jsonl", "\n".join(lines).encode(), good, "rows"
    columns: dict[str, tuple[Any, Any]] = {
        "ids": ({"input_ids": good}, good),
        "labels": ({"input_ids": good, "labels": [[1, -100, 3], [4], [-100, 6]]}, [good[0], good[2]]),
        "int32": ({"input_ids": pa.array(good, pa.list_(pa.int32()))}, good),
        "uint64": ({"input_ids": pa.array([[1, 2**64 - 1]], pa.list_(pa.uint64()))}, "refuse"),
        "null": ({"input_ids": [[1], None]}, "refuse"),
        "null in a list": ({"input_ids": [[1], [None]]}, "refuse"),
        "negative": ({"input_ids": [[1], [-1]]}, "refuse"),
        "float": ({"input_ids": [[1.0]]}, "refuse"),
        "text": ({"input_ids": ["ab"]}, "refuse"),
        "numbers": ({"input_ids": [1, 2]}, "refuse"),
        "fewer labels": ({"input_ids": good, "labels": [[1], [4], [5, 6]]}, "refuse"),
        "text labels": ({"input_ids": good, "labels": ["a", "b", "c"]}, "refuse"),
        "null labels": ({"input_ids": good, "labels": [[1, 2, 3], None, [5, 6]]}, "refuse"),
        "no rows": ({"input_ids": pa.array([], pa.list_(pa.int64()))}, "refuse"),
        "all empty": ({"input_ids": pa.array([[], []], pa.list_(pa.int64()))}, "refuse"),
        "other column": ({"tokens": good}, "refuse"),
    }
    what = random.choice(list(columns))
    made, expected = columns[what]
    file = io.BytesIO()
    parquet.write_table(pa.table(made), file, compression=random.choice(("none", "snappy", "zstd")))
    return ".parquet", file.getvalue(), expected, what
