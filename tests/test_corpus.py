"""Rows of token ids, the source of the standard library, and the context limit."""

from __future__ import annotations

import copy
import json
import pickle
import random
import sys
import sysconfig
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import flexsp.data.corpus
from flexsp.data import DataOptions, Overlong, TokenStore, apply_context_limit, encode, open_corpus
from flexsp.data.held_out import hold_out
from flexsp.data.packing import IGNORE_INDEX
from flexsp.data.rows import Document
from flexsp.data.sequences import without_unlabelled


@pytest.fixture
def opened(tmp_path):
    """Opens a source with a cache of its own."""

    def open_it(source: str | Path, **options) -> TokenStore:
        return open_corpus(str(source), DataOptions(cache_dir=str(tmp_path / "cache"), **options))

    return open_it


@pytest.fixture
def folder(tmp_path):
    """A folder of five files, one of them empty and one that is not asked for."""
    files = {"b.py": b"0123456789", "a.py": b"\xc3\xa9x", "package/c.py": b"!", "d.py": b"", "e.txt": b"no"}
    for name, content in files.items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "folder"


@pytest.fixture
def corpus(folder, opened):
    return opened(folder, pattern="**/*.py", tokenizer="bytes")


def test_files_are_documents_of_bytes(corpus, folder):
    assert [corpus.describe(i) for i in range(3)] == [f"{folder}/{name}" for name in ("a.py", "b.py", "package/c.py")]
    assert corpus.lengths.tolist() == [3, 10, 1]
    assert corpus.num_empty == 1
    assert corpus.read(1, 2, 5)[0].tolist() == list(b"234")
    (folder / "b.py").write_bytes(b"0")  # a run has the tokens that it began with
    assert corpus.read(1, 2, 5)[0].tolist() == list(b"234")


def test_the_real_library_is_read_as_it_is_and_has_a_long_tail(tmp_path):
    corpus = open_corpus("python-stdlib", DataOptions(cache_dir=str(tmp_path)))
    library = Path(sysconfig.get_path("stdlib"))
    paths = sorted(
        path.relative_to(library).as_posix()
        for path in library.rglob("*.py")
        if "site-packages" not in path.parts and path.stat().st_size
    )
    assert [corpus.describe(i) for i in range(len(corpus.lengths))] == paths
    assert corpus.lengths.tolist() == [(library / path).stat().st_size for path in paths]
    assert corpus.lengths.max() > 20 * np.median(corpus.lengths)
    assert corpus.name == "python-stdlib"
    for document in np.random.default_rng(0).integers(0, len(paths), 20).tolist():
        whole = (library / paths[document]).read_bytes()
        assert corpus.read(document, 0, len(whole))[0].tolist() == list(whole)


def test_limit_drops_splits_or_refuses_and_counts(corpus):
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


def test_pieces_of_a_split_document_read_as_its_parts(corpus):
    split, _ = apply_context_limit(corpus, 4, Overlong.SPLIT)
    tokens, labels = split.read(2, 0, 4)  # the second piece of b.py
    assert tokens.tolist() == list(b"4567")
    assert labels.tolist() == [*b"567", -100]
    tokens, labels = split.read(2, 1, 3)
    assert (tokens.tolist(), labels.tolist()) == (list(b"56"), list(b"67"))


def test_pieces_of_which_no_label_counts_are_left_out(tmp_path, opened):
    labels = [-100] * 9 + [1, 2, -100, 3]  # pieces of 4: none, none, one of its own first token alone, the last
    rows = [{"input_ids": list(range(13)), "labels": labels}, {"input_ids": [5, 6], "labels": [-100, 6]}]
    path = tmp_path / "masked.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = opened(path)
    split, _ = apply_context_limit(corpus, 4, Overlong.SPLIT)
    left, number = without_unlabelled(split)
    assert list(zip(left.documents, left.offsets, left.lengths, strict=True)) == [(0, 8, 4), (1, 0, 2)]
    assert number == 3  # of the last piece, one token, no label is left once they are shifted
    assert split.lengths.tolist() == [4, 4, 4, 1, 2]
    for sequence, length in enumerate(left.lengths):
        assert (left.read(sequence, 0, int(length))[1] != IGNORE_INDEX).any()
    trained, held = hold_out(corpus, 1, seed=0)
    for part in (trained, held):  # by its own count of documents
        pieces, _ = without_unlabelled(apply_context_limit(part, 4, Overlong.SPLIT)[0])
        assert len(pieces.lengths) == 1
    with pytest.raises(ValueError, match=r"no label counts in any of 2 sequences; give documents .*, raise max_length"):
        only = apply_context_limit(opened(path), 2, Overlong.SPLIT)[0]
        without_unlabelled(replace(only, **{k: getattr(only, k)[:2] for k in ("documents", "offsets", "lengths")}))


def test_what_has_no_label_once_labels_are_shifted_is_left_out(tmp_path, opened, monkeypatch):
    """Documents of one token when the data is opened; those whose first label alone counts when rows become documents,
    though an earlier version, which kept them, made a store of the same rows."""
    rows = [
        {"input_ids": [1, 2, 3]},
        {"input_ids": [5]},
        {"input_ids": [5, 6, 7], "labels": [5, -100, -100]},
        {"input_ids": [8, 9], "labels": [-100, 9]},
        {"input_ids": [7], "labels": [7]},
    ]
    path = tmp_path / "ones.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with monkeypatch.context() as before:
        before.setattr(encode.IdRows, "key", "ids")
        before.setattr(encode, "document_of", lambda tokens, labels: Document(tokens, labels))
        assert opened(path).lengths.tolist() == [3, 1, 3, 2, 1]
    corpus = opened(path)
    assert corpus.lengths.tolist() == [3, 1, 2]
    assert corpus.left_out == {"no label that counts": (2, f"{path} row 2")} and corpus.num_broken == 0
    sequences, number = without_unlabelled(apply_context_limit(corpus, 8, Overlong.ERROR)[0])
    assert (sequences.documents.tolist(), sequences.lengths.tolist(), number) == ([0, 2], [3, 2], 1)
    cut, number = without_unlabelled(apply_context_limit(corpus, 2, Overlong.SPLIT)[0])
    assert (cut.documents.tolist(), cut.lengths.tolist(), number) == ([0, 2], [2, 2], 2)
    with pytest.raises(ValueError, match=r"no label counts in any of 6 sequences; give documents of two tokens"):
        without_unlabelled(apply_context_limit(corpus, 1, Overlong.SPLIT)[0])


def test_an_empty_corpus_is_refused(tmp_path, opened):
    (tmp_path / "none.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="the corpus is empty"):
        apply_context_limit(opened(tmp_path / "none.jsonl"), 4, Overlong.DROP)


ROWS = [
    {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
    {"input_ids": [], "labels": []},
    {"input_ids": [9, 8], "labels": [9, 8]},
    {"input_ids": [3, 4], "labels": [-100, -100]},
]


def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def test_a_row_of_json_may_be_long(tmp_path, opened):
    tokens = list(range(300_000))
    corpus = opened(write(tmp_path / "rows.jsonl", [{"input_ids": [1]}, {"input_ids": tokens}]))
    assert corpus.lengths.tolist() == [1, 300_000] and corpus.read(1, 0, 300_000)[0].tolist() == tokens


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_rows_with_masked_labels(tmp_path, opened, suffix):
    corpus = opened(write(tmp_path / f"rows{suffix}", ROWS))
    assert corpus.lengths.tolist() == [3, 2]
    assert (corpus.num_empty, corpus.largest.max()) == (1, 9)
    assert corpus.left_out["no label that counts"] == (1, f"{tmp_path}/rows{suffix} row 3")
    sequences, _ = apply_context_limit(corpus, 10, Overlong.ERROR)
    tokens, labels = sequences.read(0, 0, 3)
    assert (tokens.tolist(), labels.tolist()) == ([5, 6, 7], [6, 7, -100])
    assert sequences.read(1, 0, 2)[0].tolist() == [9, 8]
    assert corpus.describe(1).endswith("row 2")


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_ids_and_labels_of_any_size_come_back(tmp_path, opened, suffix):
    """Types widen in the middle of a shard, and labels begin to differ there."""
    draw = np.random.default_rng(0)
    rows = []
    for index in range(1200):
        ids = draw.integers(0, 100 if index < 300 else 300 if index < 700 else 2**31, draw.integers(2, 9)).tolist()
        rows.append({"input_ids": ids, "labels": ids if index % 500 < 499 else [*[-100] * (len(ids) - 1), ids[-1]]})
    corpus = opened(write(tmp_path / f"rows{suffix}", rows))
    for index, row in enumerate(rows):
        tokens, labels = corpus.read(index, 0, len(row["input_ids"]))
        assert (tokens.tolist(), labels.tolist()) == (row["input_ids"], row["labels"])
        assert corpus.largest[index] == max(row["input_ids"])


def test_rows_without_labels_learn_their_own_tokens(tmp_path, opened):
    corpus = opened(write(tmp_path / "rows.jsonl", [{"input_ids": [5, 6]}]))
    assert corpus.read(0, 0, 2)[1].tolist() == [5, 6]


BROKEN = [
    ([{"input_ids": "abc"}], r"row 0: input_ids=b?'abc' must be a list of integers"),
    ([{"input_ids": [0.5]}], r"row 0: input_ids holds 0.5 and must be a list of integers"),
    ([{"input_ids": [True]}], r"row 0: input_ids holds True and must be a list of integers"),
    ([{"input_ids": [1]}, {"input_ids": [2, -3]}], r"row 1: input_ids=-3 must be at least 0"),
    ([{"input_ids": [1]}, {"input_ids": None}], r"row 1: input_ids has a null"),
    ([{"input_ids": [1, None]}], r"row 0: input_ids has a null in its list"),
    ([{"input_ids": [1]}, {"input_ids": [2**31]}], r"row 1: input_ids=2147483648 is above 2147483647"),
    ([{"input_ids": [1, 2], "labels": [1]}], r"row 0: labels=1 and input_ids=2 must be equally many"),
    ([{"input_ids": [1, 2], "labels": [1, -1]}], r"row 0: labels=-1 must be a token id, or -100"),
    ([{"input_ids": [1, 2], "labels": [-100, 2**31]}], r"row 0: labels=2147483648 must be a token id, or -100"),
]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(("rows", "message"), BROKEN)
def test_broken_rows_are_named_or_counted(tmp_path, opened, suffix, rows, message):
    path = write(tmp_path / f"rows{suffix}", rows)
    with pytest.raises(ValueError, match=message) as raised:
        opened(path)
    assert "\n" not in str(raised.value)
    assert str(raised.value).endswith("; or set data.on_broken='skip' to leave such rows out")
    corpus = opened(path, on_broken="skip")
    assert (len(corpus.lengths), corpus.num_broken, corpus.num_made) == (len(rows) - 1, 1, 0)
    ((count, first),) = corpus.left_out.values()
    assert count == 1 and first == f"{path} row {len(rows) - 1}"


LINES = [
    (b'{"input_ids": [', r"row 1: malformed JSON \(Expecting value at character 16\)"),
    (b"[1, 2]", r"row 1: no JSON object"),
    (b'{"input_ids": [1], "input_ids": [2]}', r"row 1: malformed JSON \(the field 'input_ids' is there twice\); corr"),
    (b'{"input_ids": [1], "a": {"b": 1, "c": 2, "b": 1}}', r"row 1: malformed JSON \(the field 'b' is there twice\)"),
    (b'{"ids": [1]}', r"row 1: there is no column 'input_ids'; it has \['ids'\]"),
    (b'{"input_ids": [1], "x": "\xff"}', r"row 1: not UTF-8 \(invalid start byte\)"),
    (b'{"input_ids": [1e3]}', r"row 1: input_ids holds 1000.0 and must"),
    (b'{"input_ids": [' + b"9" * 5000 + b"]}", r"row 1: malformed JSON"),
    (b'{"input_ids": [' + b"9" * 30 + b"]}", r"row 1: input_ids=9{30} is above"),
    (b'{"input_ids": [-' + b"9" * 30 + b"]}", r"row 1: input_ids must be at least 0"),
    (b'{"input_ids": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", r"row 1: malformed JSON"),
]


@pytest.mark.parametrize(("line", "message"), LINES, ids=range(len(LINES)))
def test_broken_lines_are_named_or_counted(tmp_path, opened, line, message):
    """Rows are counted from 0, blank lines not; the row after is read."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"input_ids": [1]}\r\n\n' + line + b'\n{"input_ids": [2]}\n')
    with pytest.raises(ValueError, match=message) as raised:
        opened(path)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500
    corpus = opened(path, on_broken="skip")
    assert [corpus.read(i, 0, 1)[0].tolist() for i in range(2)] == [[1], [2]]
    assert corpus.describe(1) == f"{path} row 2" and corpus.num_broken == 1


def test_empty_rows_may_be_an_error(tmp_path, opened):
    path = write(tmp_path / "rows.jsonl", ROWS)
    with pytest.raises(ValueError, match=r"row 1: there is no token; or set data.on_empty='skip'"):
        opened(path, on_empty="error")


def test_sources_that_cannot_be_read(tmp_path, opened):
    (tmp_path / "bad.parquet").write_text("no")
    with pytest.raises(ValueError, match=r"bad.parquet: is malformed"):
        opened(tmp_path / "bad.parquet")
    pq.write_table(pa.table({"input_ids": [[1]]}), tmp_path / "name.parquet")
    named = (tmp_path / "name.parquet").read_bytes()
    (tmp_path / "name.parquet").write_bytes(named.replace(b"input_ids", b"input_id\xff"))
    with pytest.raises(ValueError, match=r"name.parquet: is malformed \('utf-8' codec"):
        opened(tmp_path / "name.parquet")
    with pytest.raises(ValueError, match=r"none.jsonl: cannot be read"):
        opened(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match=r"source='wiki' is unknown"):
        opened("wiki")
    with pytest.raises(ValueError, match=r"there is no column 'input_ids', 'text' or 'messages'; it has \['x'\]"):
        opened(write(tmp_path / "other.jsonl", [{"x": 1}]))


def test_a_store_and_parts_of_it_can_be_copied_and_sent_to_workers(tmp_path, opened):
    corpus = opened(write(tmp_path / "rows.jsonl", [{"input_ids": [index, 1]} for index in range(4)]))
    assert corpus.read(2, 0, 2)[0].tolist() == [2, 1]  # so that something is mapped
    part, _ = hold_out(corpus, 1, seed=0)
    for each, again in ((corpus, pickle.loads(pickle.dumps(corpus))), (part, copy.deepcopy(part))):
        assert again.read(1, 0, 2)[0].tolist() == each.read(1, 0, 2)[0].tolist()


def test_two_threads_read_more_shards_than_are_mapped_at_once(tmp_path, opened, monkeypatch):
    """As the reader's thread does while an evaluation reads held-out documents of the same store."""
    monkeypatch.setattr(flexsp.data.corpus, "MOST_MAPPED", 2)
    for index in range(8):
        write(tmp_path / "many" / f"{index}.jsonl", [{"input_ids": [index] * 5}])
    corpus = opened(tmp_path / "many")
    wrong: list[str] = []

    def read(seed: int) -> None:
        draw = random.Random(seed)
        for _ in range(3000):
            index = draw.randrange(8)
            try:
                tokens = corpus.read(index, 0, 5)[0].tolist()
            except KeyError as error:
                wrong.append(f"KeyError: {error}")
                return
            if tokens != [index] * 5:
                wrong.append(f"document {index}: {tokens}")

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
