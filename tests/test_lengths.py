from __future__ import annotations

import io
import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flexsp.lengths import as_lengths, lengths_sha256, parse_tokens, read_lengths


def test_text_npy_and_standard_input_read_alike(tmp_path, monkeypatch):
    (tmp_path / "l.txt").write_text("5\n\n 17 \n3")
    np.save(tmp_path / "l.npy", np.array([5, 17, 3], dtype=np.int32))
    monkeypatch.setattr("sys.stdin", io.StringIO("5\n17\n3\n"))
    for source in (tmp_path / "l.txt", tmp_path / "l.npy", "-"):
        assert read_lengths(source).tolist() == [5, 17, 3]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("5\nabc\n", r"l.txt:2: length='abc' must be a positive integer"),
        ("0\n", r"l.txt:1: length='0'"),
        ("-4\n", r"l.txt:1: length='-4'"),
        ("3.5\n", r"l.txt:1: length='3.5'"),
        ("99999999999999999999\n", r"l.txt:1: length='99999999999999999999'"),
        ("\n", r"l.txt: there are no lengths"),
    ],
)
def test_malformed_text_names_file_and_line(tmp_path, text, message):
    (tmp_path / "l.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_lengths(tmp_path / "l.txt")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([1.5]), r"l.npy: dtype=float64 must be an integer type"),
        (np.array([[1]]), r"l.npy: shape=\(1, 1\) must have one dimension"),
        (np.array([4, 0]), r"l.npy\[1\]=0 must be at least 1"),
    ],
)
def test_malformed_npy_is_named(tmp_path, array, message):
    np.save(tmp_path / "l.npy", array)
    with pytest.raises(ValueError, match=message):
        read_lengths(tmp_path / "l.npy")


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"none.txt: cannot be read"):
        read_lengths(tmp_path / "none.txt")
    (tmp_path / "bad.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"bad.npy: is no .npy array"):
        read_lengths(tmp_path / "bad.npy")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"binary: is not text"):
        read_lengths(tmp_path / "binary")


def test_digest_names_the_lengths_and_not_their_type():
    assert lengths_sha256([1, 2]) == lengths_sha256(np.array([1, 2], dtype=np.int16)) != lengths_sha256([2, 1])


def test_tokens_with_a_suffix():
    assert [parse_tokens(t, "x") for t in (7, "7", "192K", "4k")] == [7, 7, 196608, 4096]
    for wrong in ("", "K", "-3", "4M", 0, -1, 1.5, True):
        with pytest.raises(ValueError, match=r"x=.* must be a positive number of tokens"):
            parse_tokens(wrong, "x")


def test_empty_lengths_are_refused():
    with pytest.raises(ValueError, match="there are no lengths"):
        as_lengths([])


def test_lengths_beyond_64_bits_are_refused_not_wrapped(tmp_path):
    np.save(tmp_path / "l.npy", np.array([4, 2**63 + 5], dtype=np.uint64))
    with pytest.raises(ValueError, match=r"l.npy\[1\]=9223372036854775813 must be below 2\^63 tokens"):
        read_lengths(tmp_path / "l.npy")


# ---- rows


def jsonl(folder, *rows):
    """A .jsonl file of these rows; a string is a line as it is."""
    path = folder / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def parquet(folder, rows_per_group=2, **columns):
    path = folder / "rows.parquet"
    pq.write_table(pa.table(columns), path, row_group_size=rows_per_group)
    return path


@pytest.mark.parametrize(
    ("columns", "column", "expected"),
    [
        ({"input_ids": [[7, 8], [9], [1, 2, 3]]}, None, [2, 1, 3]),
        ({"length": [5, 17, 3]}, None, [5, 17, 3]),
        ({"length": [5, 17], "input_ids": [[7, 8], [9]]}, None, [2, 1]),
        ({"length": [5, 17], "input_ids": [[7, 8], [9]]}, "length", [5, 17]),
        ({"text": ["a", "b"], "tokens": [[1], [1, 2]]}, "tokens", [1, 2]),
        ({"text": ["a", "b"], "n": [4, 6]}, "n", [4, 6]),
    ],
)
def test_rows_of_both_kinds_read_alike(tmp_path, columns, column, expected):
    rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    for path in (jsonl(tmp_path, *rows), parquet(tmp_path, **columns)):
        read = read_lengths(path, column)
        assert (read.tolist(), read.dtype) == (expected, np.int64)


@pytest.mark.parametrize(
    "array",
    [
        pa.array([[1, 2], [3, 4]], pa.large_list(pa.int32())),
        pa.array([[1, 2], [3, 4]], pa.list_(pa.uint16(), 2)),
        pa.array([2, 2], pa.int8()),
        pa.array([2, 2], pa.uint64()),
    ],
)
def test_any_integer_and_any_list_of_integers_will_do(tmp_path, array):
    assert read_lengths(parquet(tmp_path, x=array), "x").tolist() == [2, 2]


@settings(derandomize=True, deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60), rows_per_group=st.integers(1, 20))
def test_lengths_and_token_lists_come_back(tmp_path, lengths, rows_per_group):
    ids = [list(range(length)) for length in lengths]
    for path in (
        parquet(tmp_path, rows_per_group, input_ids=ids, other=ids),
        parquet(tmp_path, rows_per_group, length=lengths),
        jsonl(tmp_path, *({"input_ids": each} for each in ids)),
        jsonl(tmp_path, *({"length": each} for each in lengths)),
    ):
        assert read_lengths(path).tolist() == lengths


def test_of_parquet_only_the_column_asked_for_is_read(tmp_path):
    path = parquet(tmp_path, length=[5, 17], text=["spoilt", "bytes"])
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(1)
    assert chunk.path_in_schema == "text"
    with open(path, "r+b") as file:
        file.seek(chunk.dictionary_page_offset or chunk.data_page_offset)
        file.write(b"\xff" * chunk.total_compressed_size)
    with pytest.raises(OSError):
        pq.read_table(path)
    assert read_lengths(path).tolist() == [5, 17]


def test_a_row_longer_than_a_block_of_the_json_reader_is_read(tmp_path):
    long = list(range(300_000))  # 2 MB as text; pyarrow's blocks are 1 MiB unless told otherwise
    assert read_lengths(jsonl(tmp_path, {"input_ids": [1]}, {"input_ids": long})).tolist() == [1, 300_000]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"length": 3}, {"length": None}], r"rows.jsonl row 1: length is missing or null"),
        ([{"length": 3}, {"input_id": [1]}], r"rows.jsonl row 1: length is missing or null"),
        ([{"length": 3, "input_ids": [1]}, {"length": 4}], r"rows.jsonl row 1: input_ids is missing or null"),
        ([{"length": 3}, {"length": 0}], r"rows.jsonl row 1: length=0 must be at least 1"),
        ([{"length": 3}, {"length": -4}], r"rows.jsonl row 1: length=-4 must be at least 1"),
        ([{"length": 3}, {"length": 4.5}], r"column length=double must hold integers"),
        ([{"length": 3}, {"length": 10**20}], r"column length=double must hold integers"),
        ([{"length": 3}, {"length": "4"}], r"rows.jsonl: is malformed .*number to string in row 1"),
        ([{"length": 3}, {"length": True}], r"rows.jsonl: is malformed .*number to boolean in row 1"),
        ([{"length": 3}, {"length": [1, 2]}], r"rows.jsonl: is malformed .*number to array in row 1"),
        (['{"length": 3, "length": 5}'], r"rows.jsonl: is malformed .*twice in row 0"),
        ([{"input_ids": [1]}, {"input_ids": []}], r"rows.jsonl row 1: input_ids=\[\] must be at least 1 token"),
        ([{"input_ids": []}], r"rows.jsonl row 0: input_ids=\[\] must be at least 1 token"),
        ([{"input_ids": [1]}, {"input_ids": [2, None]}], r"rows.jsonl row 1: input_ids has a null in its list"),
        ([{"input_ids": [1]}, {"input_ids": [2, 0.5]}], r"column input_ids=list<item: double> must hold integers"),
        ([{"input_ids": [1]}, {"input_ids": ["a"]}], r"rows.jsonl: is malformed"),
        ([{"input_ids": [[1]]}], r"column input_ids=list<item: list<item: int64>> must hold integers"),
        ([{"text": "a b", "id": 1}], r"no column 'input_ids' or 'length'; it has \['id', 'text'\]"),
        (["[1, 2]"], r"rows.jsonl row 0: .* must be a JSON object on a line; write {...}"),
        (["null", {"length": 3}], r"rows.jsonl row 0: 'null' must be a JSON object"),  # pyarrow dies of it
        (['{"length": 3'], r"rows.jsonl: is malformed"),
        ([], r"rows.jsonl: is malformed \(Empty JSON file\)"),
    ],
)
def test_wrong_rows_of_json_are_named(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read_lengths(jsonl(tmp_path, *rows))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"length": [3, 4, 5, None]}, r"rows.parquet row 3: length is missing or null"),
        ({"length": [3, 4, 5, 0]}, r"rows.parquet row 3: length=0 must be at least 1"),
        ({"input_ids": [[1], [1], None]}, r"rows.parquet row 2: input_ids is missing or null"),
        ({"input_ids": [[1], [1], [1], []]}, r"rows.parquet row 3: input_ids=\[\] must be at least 1"),
        ({"input_ids": [[1], [1], [1], [2], [3, None]]}, r"rows.parquet row 4: input_ids has a null"),
        ({"length": [1.5]}, r"column length=double must hold integers"),
        ({"length": pa.array([2**63 + 1], pa.uint64())}, r"rows.parquet: is malformed .*not in range"),
        ({"length": pa.array([], pa.int32())}, r"rows.parquet: there are no lengths"),
        ({"text": ["a"]}, r"no column 'input_ids' or 'length'; it has \['text'\]"),
    ],
)
def test_wrong_rows_of_parquet_are_named(tmp_path, columns, message):
    with pytest.raises(ValueError, match=message):
        read_lengths(parquet(tmp_path, **columns))


def test_rows_are_counted_through_all_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("flexsp.lengths.PARQUET_ROWS", 2)
    monkeypatch.setattr("flexsp.lengths.JSON_BLOCK_BYTES", 32)
    for rows, message in (
        ([1, 2, 3, 4, 5, None], "row 5: length is missing"),
        ([1, 2, 3, 4, 5, 0], "row 5: length=0 must"),
    ):
        for path in (parquet(tmp_path, length=rows), jsonl(tmp_path, *({"length": each} for each in rows))):
            with pytest.raises(ValueError, match=message):
                read_lengths(path)
    with pytest.raises(ValueError, match=r"row 4: input_ids has a null"):
        read_lengths(parquet(tmp_path, input_ids=[[1], [1, 2], [1], [3], [None]]))


def test_text_needs_a_tokenizer_first(tmp_path):
    for path in (jsonl(tmp_path, {"text": "a b"}), parquet(tmp_path, text=["a b"])):
        with pytest.raises(ValueError, match=r"column text=string is text, .* tokenizer .* count the tokens first"):
            read_lengths(path, "text")
        with pytest.raises(ValueError, match=r"column='texts' must be there once; it has \['text'\]"):
            read_lengths(path, "texts")


@pytest.mark.parametrize("name", ["l.txt", "l.npy", "-"])
def test_only_rows_have_columns(name):
    with pytest.raises(ValueError, match=rf"{name}: column='length' must be left out: only .jsonl and .parquet"):
        read_lengths(name, "length")


def test_row_files_that_cannot_be_read(tmp_path):
    for name in ("none.jsonl", "none.parquet"):
        with pytest.raises(ValueError, match=rf"{name}: cannot be read \(No such file or directory\)"):
            read_lengths(tmp_path / name)
    (tmp_path / "bad.parquet").write_text("no parquet")
    with pytest.raises(ValueError, match=r"bad.parquet: is malformed"):
        read_lengths(tmp_path / "bad.parquet")


def test_without_pyarrow_it_says_what_to_install(tmp_path, monkeypatch):
    path = jsonl(tmp_path, {"length": 3})
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(ValueError, match=r"rows.jsonl: reading rows needs pyarrow; pip install pyarrow"):
        read_lengths(path)


# ---- found by tests/fuzzing


def npy_of_shape(path, shape):
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": shape})
        file.write(bytes(40))


@pytest.mark.parametrize("shape", [(10**18,), (999999999999999999,), (-1,), (5, 10**9)])
def test_a_header_that_claims_more_numbers_than_there_are_takes_no_memory(tmp_path, shape):
    npy_of_shape(tmp_path / "l.npy", shape)
    with pytest.raises(ValueError, match=r"l.npy: "):
        read_lengths(tmp_path / "l.npy")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([5], "m8[s]"), r"dtype=timedelta64\[s\] must be an integer type"),
        (np.array([2**62, 2**62]), r"all 2 together must be below 2\^63 tokens"),
    ],
)
def test_integers_that_are_no_lengths(array, message):
    with pytest.raises(ValueError, match=message):
        as_lengths(array)


def test_an_archive_and_a_broken_header_are_no_array(tmp_path):
    np.savez(tmp_path / "l.npz", a=np.array([1]))
    (tmp_path / "l.npz").rename(tmp_path / "l.npy")
    with pytest.raises(ValueError, match=r"l.npy: is no .npy array \(an archive of some\)"):
        read_lengths(tmp_path / "l.npy")
    np.save(tmp_path / "m.npy", np.array([1]))
    (tmp_path / "m.npy").write_bytes((tmp_path / "m.npy").read_bytes().replace(b"{'descr'", b"{[[[['de"))
    with pytest.raises(ValueError, match=r"m.npy: is no .npy array \("):
        read_lengths(tmp_path / "m.npy")


def test_text_without_end_or_of_other_bytes(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"/dev/zero:1: length="):
        read_lengths("/dev/zero")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"5\n\xff\n"), encoding="utf-8"))
    with pytest.raises(ValueError, match=r"^standard input: is not text"):
        read_lengths("-")
    with pytest.raises(ValueError, match=r"x='9+.* must be a positive number of tokens"):
        parse_tokens("9" * 5000, "x")
