from __future__ import annotations

import io

import numpy as np
import pytest

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
