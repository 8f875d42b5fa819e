"""Text from files, folders, patterns and data sets, through tokenizers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import small_tokenizers
from flexsp.data import DataOptions, TokenStore, open_corpus

TEXTS = ["the cat sat on the mat", "héllo", "", "user asks the dog  \n about wörld </s> 漢字", "def main(): return 0"]
KEPT = [text for text in TEXTS if text]


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    return folder, small_tokenizers.byte_pairs(folder)


@pytest.fixture
def opened(tmp_path):
    def open_it(source: str | Path, model_path: str = "", **options) -> TokenStore:
        return open_corpus(
            str(source), DataOptions(cache_dir=str(tmp_path / "cache"), **options), model_path=model_path
        )

    return open_it


def documents(corpus: TokenStore) -> list[list[int]]:
    return [corpus.read(i, 0, int(n))[0].tolist() for i, n in enumerate(corpus.lengths)]


def expected(tokenizer) -> list[list[int]]:
    return [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in KEPT]


def write_all(folder: Path, column: str = "text") -> dict[str, Path]:
    """The same documents in every form."""
    rows = [{column: text, "n": i} for i, text in enumerate(TEXTS)]
    (folder / "text").mkdir()
    for index, text in enumerate(TEXTS):
        (folder / "text" / f"{index}.txt").write_text(text)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet", row_group_size=2)
    (folder / "parts").mkdir()
    for index in range(0, len(rows), 2):
        table = pa.Table.from_pylist(rows[index : index + 2])
        coded = table.column(column).dictionary_encode()
        pq.write_table(table.set_column(0, column, coded), folder / "parts" / f"{index}.parquet")
    return {name: folder / name for name in ("text", "rows.jsonl", "rows.parquet", "parts")}


def test_all_forms_of_the_same_text_are_the_same_documents(tmp_path, opened, bpe):
    folder, tokenizer = bpe
    for name, path in write_all(tmp_path).items():
        corpus = opened(path, tokenizer=str(folder))
        assert documents(corpus) == expected(tokenizer), name
        assert corpus.num_empty == 1
        assert documents(opened(path, tokenizer="bytes")) == [list(text.encode()) for text in KEPT]
    assert documents(opened(tmp_path / "*.jsonl", tokenizer=str(folder))) == expected(tokenizer)
    assert opened(tmp_path / "text", tokenizer="bytes").describe(2) == f"{tmp_path}/text/3.txt"
    assert opened(tmp_path / "parts", tokenizer="bytes").describe(2) == f"{tmp_path}/parts/2.parquet row 1"


def test_where_the_tokenizer_comes_from(tmp_path, opened, bpe):
    folder, tokenizer = bpe
    rows = write_all(tmp_path, "body")["rows.jsonl"]
    assert documents(opened(rows, model_path=str(folder), text="body")) == expected(tokenizer)
    with pytest.raises(ValueError, match=r"column 'body' needs a tokenizer; set data.tokenizer to a folder"):
        opened(rows, text="body")
    with pytest.raises(ValueError, match=r"needs a tokenizer, and model.path='.*cache' holds none"):
        opened(rows, text="body", model_path=str(tmp_path / "cache"))
    with pytest.raises(ValueError, match=r"data.text='boddy': there is no such column; it has \['body', 'n'\]"):
        opened(rows, text="boddy")
    with pytest.raises(ValueError, match=r"data.tokenizer='gpt2' must be 'bytes', a folder .* there is no such path"):
        opened(rows, text="body", tokenizer="gpt2")
    (tmp_path / "no").mkdir()
    with pytest.raises(ValueError, match=r"transformers cannot load it") as raised:
        opened(rows, text="body", tokenizer=str(tmp_path / "no"))
    assert "\n" not in str(raised.value)


def test_what_the_tokenizer_adds_stays_and_the_end_may_be_left_out(tmp_path, opened):
    tokenizer = small_tokenizers.byte_pairs(tmp_path / "first", first=True)
    rows = write_all(tmp_path)["rows.jsonl"]
    without = [tokenizer(text)["input_ids"] for text in KEPT]
    assert all(ids[0] == tokenizer.bos_token_id for ids in without)
    assert documents(opened(rows, tokenizer=str(tmp_path / "first"), eos=False)) == without
    assert documents(opened(rows, tokenizer=str(tmp_path / "first"))) == [
        [*ids, tokenizer.eos_token_id] for ids in without
    ]


def test_a_tokenizer_json_alone_never_truncates_and_has_no_end(tmp_path, opened):
    tokenizer = small_tokenizers.words(tmp_path / "tokenizer.json")
    tokenizer.no_truncation()
    rows = write_all(tmp_path)["rows.jsonl"]
    with pytest.raises(
        ValueError, match=r"row 3: the tokenizer does not take it \(WordLevel error: Missing \[UNK\] token"
    ):
        opened(rows, tokenizer=str(tmp_path / "tokenizer.json"))
    corpus = opened(rows, tokenizer=str(tmp_path / "tokenizer.json"), on_broken="skip")
    assert documents(corpus) == [tokenizer.encode(KEPT[index]).ids for index in (0, 1, 3)]
    assert max(corpus.lengths) > 3


def test_ids_are_taken_before_text_unless_a_tokenizer_is_named(tmp_path, opened, bpe):
    folder, tokenizer = bpe
    (tmp_path / "both.jsonl").write_text(json.dumps({"input_ids": [1, 2], "text": "the cat"}) + "\n")
    assert documents(opened(tmp_path / "both.jsonl", model_path=str(folder))) == [[1, 2]]
    ids = [*tokenizer("the cat")["input_ids"], tokenizer.eos_token_id]
    assert documents(opened(tmp_path / "both.jsonl", tokenizer=str(folder))) == [ids]


def test_invalid_text_is_named_or_counted(tmp_path, opened, bpe):
    folder, tokenizer = bpe
    good = pa.array([b"the cat", b"\xff\xfe", b"the mat"], pa.binary())
    as_text = pa.StringArray.from_buffers(3, good.buffers()[1], good.buffers()[2])
    pq.write_table(pa.table({"text": as_text}), tmp_path / "bad.parquet")
    lines = [json.dumps({"text": "the cat"}), '{"text": "\\ud800"}', json.dumps({"text": "the mat"})]
    (tmp_path / "bad.jsonl").write_text("\n".join(lines))
    (tmp_path / "bad").mkdir()
    for index, raw in enumerate((b"the cat", b"\xff\xfe", b"the mat")):
        (tmp_path / "bad" / f"{index}.txt").write_bytes(raw)
    for name, where in (("bad.parquet", "bad.parquet row 1"), ("bad.jsonl", "bad.jsonl row 1"), ("bad", "bad/1.txt")):
        for cut in (str(folder), "bytes"):
            with pytest.raises(
                ValueError, match=rf"{where}: text is not UTF-8 \(.*\); convert it; or set data.on_broken"
            ):
                opened(tmp_path / name, tokenizer=cut)
        corpus = opened(tmp_path / name, tokenizer=str(folder), on_broken="skip")
        end = tokenizer.eos_token_id
        assert documents(corpus) == [[*tokenizer(text)["input_ids"], end] for text in ("the cat", "the mat")]
        assert corpus.left_out == {"invalid UTF-8": (1, f"{tmp_path}/{where}")}


def test_a_file_or_folder_whose_name_could_be_a_pattern_is_that_file_or_folder(tmp_path, opened):
    (tmp_path / "chats[v2]").mkdir()
    for name, text in (("chats[v2].jsonl", "a"), ("chatsv.jsonl", "b"), ("x*.jsonl", "c"), ("chats[v2]/r.jsonl", "d")):
        (tmp_path / name).write_text(json.dumps({"text": text}) + "\n")
    for name, text in (("chats[v2].jsonl", "a"), ("x*.jsonl", "c"), ("chats[v2]", "d"), ("chat*[v].jsonl", "b")):
        corpus = opened(tmp_path / name, tokenizer="bytes")
        assert documents(corpus) == [[ord(text)]], name
    assert opened(tmp_path / "chats[v2].jsonl", tokenizer="bytes").describe(0) == f"{tmp_path}/chats[v2].jsonl row 0"


def test_sources_that_are_not_clear(tmp_path, opened):
    forms = write_all(tmp_path)
    (forms["parts"] / "x.txt").write_text("x")
    with pytest.raises(ValueError, match=r"parts: holds files of rows \(.*parquet\) and of text \(x.txt\); say which"):
        opened(forms["parts"], tokenizer="bytes")
    assert documents(opened(forms["parts"], tokenizer="bytes", pattern="*.txt")) == [[ord("x")]]
    with pytest.raises(ValueError, match=r"matches files of rows \(.*\) and of text"):
        opened(forms["parts"], tokenizer="bytes", pattern="*")
    with pytest.raises(ValueError, match=r"data.pattern='\*.md' matches no file"):
        opened(forms["text"], tokenizer="bytes", pattern="*.md")
    with pytest.raises(ValueError, match=r"matches no file; correct the pattern"):
        opened(tmp_path / "*.none", tokenizer="bytes")
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"x.json: is neither .jsonl nor .parquet nor text"):
        opened(tmp_path / "*.json", tokenizer="bytes")
    (tmp_path / "two.jsonl").write_text(json.dumps({"text": "a", "messages": []}))
    with pytest.raises(ValueError, match=r"has both columns, 'text' and 'messages'; name one by data.text"):
        opened(tmp_path / "two.jsonl", tokenizer="bytes")
    with pytest.raises(ValueError, match=r"rows are text or chats; give one of the two"):
        opened(tmp_path / "two.jsonl", text="a", messages="b")


def test_data_sets_saved_and_by_name(tmp_path, opened, bpe):
    datasets = pytest.importorskip("datasets")
    folder, tokenizer = bpe
    rows = write_all(tmp_path)["rows.jsonl"]
    both = datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list([{"text": t} for t in TEXTS]),
            "test": datasets.Dataset.from_list([{"text": "x"}]),
        }
    )
    both.save_to_disk(str(tmp_path / "both"))
    both["train"].save_to_disk(str(tmp_path / "one"), num_shards=2)
    for source, options in (("both", {}), ("both", {"split": "train"}), ("one", {})):
        corpus = opened(tmp_path / source, tokenizer=str(folder), **options)
        assert documents(corpus) == expected(tokenizer)
    assert corpus.describe(2) == f"{tmp_path}/one row 3"
    assert opened(tmp_path / "one", tokenizer=str(folder)).num_made == 0
    assert documents(opened(tmp_path / "both", tokenizer="bytes", split="test")) == [[ord("x")]]
    with pytest.raises(ValueError, match=r"data.split='dev': the splits are train, test; name one"):
        opened(tmp_path / "both", tokenizer="bytes", split="dev")
    with pytest.raises(ValueError, match=r"one: data.split='dev': the folder holds one set without splits"):
        opened(tmp_path / "one", tokenizer="bytes", split="dev")
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "train.jsonl").write_text(rows.read_text())
    ids = [{"input_ids": [i, 7], "labels": [-100, 7]} for i in range(600)]
    datasets.Dataset.from_list(ids).save_to_disk(str(tmp_path / "ids"))
    corpus = opened(tmp_path / "ids")
    assert documents(corpus) == [[i, 7] for i in range(600)] and corpus.read(599, 0, 2)[1].tolist() == [-100, 7]


def test_a_data_set_by_name_is_a_folder_too(tmp_path, monkeypatch, opened, bpe):
    pytest.importorskip("datasets")
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "hf"))
    folder, tokenizer = bpe
    (tmp_path / "named").mkdir()
    (tmp_path / "named" / "train.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    assert documents(opened(f"hf:{tmp_path}/named", tokenizer=str(folder))) == expected(tokenizer)
    part = opened(f"hf:{tmp_path}/named", tokenizer=str(folder), split="train[3:]")
    assert documents(part) == expected(tokenizer)[-2:]
    with pytest.raises(ValueError, match=r"hf:.*none: datasets cannot load it") as raised:
        opened(f"hf:{tmp_path}/none", tokenizer=str(folder))
    assert "\n" not in str(raised.value)


def test_without_the_package_the_extra_is_named(tmp_path):
    code = (
        "import sys; sys.modules['datasets'] = None\n"
        "from flexsp.data import DataOptions, open_corpus\n"
        "try: open_corpus('hf:x', DataOptions(cache_dir=sys.argv[1]))\n"
        "except ValueError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, timeout=100
    )
    assert done.stdout == "hf:x: reading data sets needs datasets; pip install 'flexsp[datasets]'\n"
