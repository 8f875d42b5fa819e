"""Corpora and the context limit."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flexsp.data import Overlong, PythonStdlib, apply_context_limit, open_corpus


@pytest.fixture
def library(tmp_path):
    """A folder of five files, one of them empty and one no source."""
    (tmp_path / "package").mkdir()
    files = {"b.py": b"0123456789", "a.py": b"\xff\x00x", "package/c.py": b"!", "d.py": b"", "e.txt": b"no"}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_stdlib_files_are_documents_of_bytes(library):
    corpus = PythonStdlib(library)
    assert corpus.paths == ["a.py", "b.py", "package/c.py"]
    assert corpus.lengths.tolist() == [3, 10, 1]
    assert corpus.num_empty == 1
    assert corpus.read(1, 2, 5)[0].tolist() == list(b"234")
    (library / "b.py").write_bytes(b"0")
    with pytest.raises(ValueError, match=r"b.py: the file has changed since the run began"):
        corpus.read(1, 2, 5)


def test_the_real_library_has_a_long_tail():
    lengths = open_corpus("python-stdlib").lengths
    assert len(lengths) > 500
    assert lengths.max() > 20 * np.median(lengths)


def test_limit_drops_splits_or_refuses_and_counts(library):
    corpus = PythonStdlib(library)
    dropped, touched = apply_context_limit(corpus, 4, Overlong.DROP)
    assert dropped.lengths.tolist() == [3, 1]
    assert (touched.documents, touched.tokens, touched.lost_tokens) == (1, 10, 10)
    split, touched = apply_context_limit(corpus, 4, Overlong.SPLIT)
    assert split.lengths.tolist() == [3, 4, 4, 2, 1]
    assert (touched.documents, touched.tokens, touched.lost_tokens) == (1, 10, 0)
    with pytest.raises(ValueError, match=r"b.py: length=10 exceeds max_length=4, as do 1 of 3 documents; raise"):
        apply_context_limit(corpus, 4, Overlong.ERROR)
    with pytest.raises(ValueError, match=r"all 3 documents exceed max_length=0"):
        apply_context_limit(corpus, 0, Overlong.DROP)


def test_pieces_of_a_split_document_read_as_its_parts(library):
    split, _ = apply_context_limit(PythonStdlib(library), 4, Overlong.SPLIT)
    tokens, labels = split.read(2, 0, 4)  # the second piece of b.py
    assert tokens.tolist() == list(b"4567")
    assert labels.tolist() == [*b"567", -100]
    tokens, labels = split.read(2, 1, 3)
    assert (tokens.tolist(), labels.tolist()) == (list(b"56"), list(b"67"))


def test_an_empty_corpus_is_refused(tmp_path):
    with pytest.raises(ValueError, match="the corpus is empty"):
        apply_context_limit(PythonStdlib(tmp_path), 4, Overlong.DROP)


ROWS = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
    {"input_ids": [], "labels": []},
    {"input_ids": [9], "labels": [9]},
]


def write(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_a_row_of_json_may_be_long(tmp_path):
    # pyarrow's own blocks are 1 MiB, and a row must lie in one
    tokens = list(range(300_000))
    corpus = open_corpus(write(tmp_path / "rows.jsonl", [{"input_ids": [1]}, {"input_ids": tokens}]))
    assert corpus.lengths.tolist() == [1, 300_000] and corpus.read(1, 0, 300_000)[0].tolist() == tokens


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_with_masked_labels(tmp_path, suffix):
    corpus = open_corpus(write(tmp_path / f"rows{suffix}", ROWS))
    assert corpus.lengths.tolist() == [3, 1]
    assert (corpus.num_empty, corpus.max_token) == (1, 9)
    sequences, _ = apply_context_limit(corpus, 10, Overlong.ERROR)
    tokens, labels = sequences.read(0, 0, 3)
    assert (tokens.tolist(), labels.tolist()) == ([5, 6, 7], [6, 7, -100])
    assert sequences.read(1, 0, 1)[0].tolist() == [9]
    assert corpus.describe(1).endswith("row 2")


def test_rows_without_labels_learn_their_own_tokens(tmp_path):
    corpus = open_corpus(write(tmp_path / "rows.jsonl", [{"input_ids": [5, 6]}]))
    assert corpus.read(0, 0, 2)[1].tolist() == [5, 6]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "x"}], r"there is no column 'input_ids'; it has \['text'\]"),
        ([{"input_ids": [0.5]}], r"column input_ids=list<.*double> must hold lists of integers"),
        ([{"input_ids": "abc"}], r"column input_ids=string must hold lists of integers"),
        ([{"input_ids": [1]}, {"input_ids": [2, -3]}], r"row 1: input_ids=-3 must be at least 0"),
        ([{"input_ids": [1]}, {"input_ids": None}], r"row 1: input_ids has a null"),
        ([{"input_ids": [1, None]}], r"row 0: input_ids has a null"),
        ([{"input_ids": [1, 2], "labels": [1]}], r"row 0: labels=1 and input_ids=2 must be equally many"),
    ],
)
def test_malformed_rows_are_named(tmp_path, suffix, rows, message):
    with pytest.raises(ValueError, match=message):
        open_corpus(write(tmp_path / f"rows{suffix}", rows))


def test_sources_that_cannot_be_read(tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"input_ids": [1]}\n{"input_ids": [')
    with pytest.raises(ValueError, match=r"bad.jsonl: is malformed"):
        open_corpus(str(tmp_path / "bad.jsonl"))
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(ValueError, match=r"bad.parquet: is malformed"):
        open_corpus(str(tmp_path / "bad.parquet"))
    with pytest.raises(ValueError, match=r"none.jsonl: cannot be read"):
        open_corpus(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match=r"source='wiki' is unknown"):
        open_corpus("wiki")
