"""Chats: which tokens have labels."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import small_tokenizers
from flexsp.data import DataOptions, open_corpus

CHATS = [
    [("user", "the cat"), ("assistant", "the mat"), ("user", "and"), ("assistant", "the dog sat")],
    [("system", "user asks"), ("user", " the  cat "), ("assistant", " héllo 漢字 ")],
    [("user", "the end")],
    [("user", "the dog"), ("assistant", "</s><user>")],
]
ROWS = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in CHATS]


def by_hand(tokenizer, chat, all_count: bool = False) -> tuple[list[int], list[int]]:
    """Each turn cut for itself: special tokens stand between them, across which nothing is merged."""
    tokens, labels = [], []
    for role, text in chat:
        head = tokenizer.encode(f"<{role}>", add_special_tokens=False)
        body = tokenizer.encode(f"{text}<end>", add_special_tokens=False)
        if role == "system":  # no special token: merged with what follows
            head, body = [], tokenizer.encode(f"<{role}>{text}<end>", add_special_tokens=False)
        tokens += head + body
        labels += [-100] * len(head) + (body if role == "assistant" or all_count else [-100] * len(body))
    return tokens, (tokens if all_count else labels)


@pytest.fixture
def opened(tmp_path):
    def open_it(source, **options):
        return open_corpus(str(source), DataOptions(cache_dir=str(tmp_path / "cache"), **options))

    return open_it


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "chats.parquet")
    return tmp_path


@pytest.mark.parametrize("name", ["chats.jsonl", "chats.parquet"])
@pytest.mark.parametrize("template", ["PLAIN", "MARKED"])
def test_the_assistants_turns_have_labels(rows, opened, template, name):
    tokenizer = small_tokenizers.byte_pairs(rows / "bpe", getattr(small_tokenizers, template))
    corpus = opened(rows / name, tokenizer=str(rows / "bpe"))
    kept = [chat for chat in CHATS if any(role == "assistant" for role, _ in chat)]
    assert len(corpus.lengths) == len(kept)
    for document, chat in enumerate(kept):
        tokens, labels = corpus.read(document, 0, int(corpus.lengths[document]))
        assert (tokens.tolist(), labels.tolist()) == by_hand(tokenizer, chat)
    assert corpus.left_out == {"no label that counts": (1, f"{rows}/{name} row 2")}
    assert corpus.describe(2).endswith("row 3")


def test_marked_labels_are_those_of_transformers(rows, opened):
    tokenizer = small_tokenizers.byte_pairs(rows / "bpe", small_tokenizers.MARKED)
    corpus = opened(rows / "chats.jsonl", tokenizer=str(rows / "bpe"))
    for document, index in enumerate((0, 1, 3)):
        found = tokenizer.apply_chat_template(
            ROWS[index]["messages"], tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        tokens, labels = corpus.read(document, 0, int(corpus.lengths[document]))
        assert tokens.tolist() == found["input_ids"]
        assert (labels != -100).astype(int).tolist() == found["assistant_masks"]


def test_all_tokens_may_have_labels(rows, opened):
    tokenizer = small_tokenizers.byte_pairs(rows / "bpe")
    corpus = opened(rows / "chats.jsonl", tokenizer=str(rows / "bpe"), train_on="all")
    for document, chat in enumerate(CHATS):
        tokens, labels = corpus.read(document, 0, int(corpus.lengths[document]))
        assert (tokens.tolist(), labels.tolist()) == by_hand(tokenizer, chat, all_count=True)


def test_a_template_that_rewrites_earlier_turns_is_refused_unless_all_count(rows, opened):
    small_tokenizers.byte_pairs(rows / "bpe", small_tokenizers.LAST_ONLY)
    with pytest.raises(
        ValueError, match=r"row 0: turn 1: the chat template writes a chat up to this turn otherwise"
    ) as raised:
        opened(rows / "chats.jsonl", tokenizer=str(rows / "bpe"))
    assert "{% generation %}, or set data.train_on='all'" in str(raised.value) and "\n" not in str(raised.value)
    assert len(opened(rows / "chats.jsonl", tokenizer=str(rows / "bpe"), train_on="all").lengths) == 4


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "hi"}, r"row 1: messages='hi' must be a list of \{role, content\}"),
        ({"messages": []}, r"row 1: messages=\[\] must be a list"),
        ({"messages": [{"role": "user"}]}, r"row 1: turn 0: \{'role': 'user'\} must have content as text"),
        ({"messages": [{"content": "x"}]}, r"row 1: turn 0: .* must have role as text"),
        ({"messages": ["x"]}, r"row 1: turn 0: 'x' must have role as text"),
        ({"messages": None}, r"row 1: messages has a null"),
        ({"text": "x"}, r"row 1: there is no column 'messages'; it has \['text'\]"),
        (
            {"messages": [{"role": "bad", "content": "x"}]},
            r"row 1: the chat template does not take it \(no such role\)",
        ),
    ],
)
def test_broken_chats_are_named_or_counted(tmp_path, opened, row, message):
    template = "{% for m in messages %}{% if m['role'] == 'bad' %}{{ raise_exception('no such role') }}{% endif %}"
    small_tokenizers.byte_pairs(tmp_path / "bpe", template + "<{{ m['role'] }}>{{ m['content'] }}{% endfor %}")
    good = {"messages": [{"role": "assistant", "content": "the cat"}]}
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps(each) for each in (ROWS[2], row, ROWS[2])))
    options = {"tokenizer": str(tmp_path / "bpe"), "train_on": "all", "messages": "messages"}
    with pytest.raises(ValueError, match=message):
        opened(tmp_path / "chats.jsonl", **options)
    assert len(opened(tmp_path / "chats.jsonl", on_broken="skip", **options).lengths) == 2
    assert good


def test_chats_need_a_template(rows, opened):
    small_tokenizers.byte_pairs(rows / "bpe", None)
    with pytest.raises(ValueError, match=r"data.tokenizer '.*bpe' has no chat template"):
        opened(rows / "chats.jsonl", tokenizer=str(rows / "bpe"))
    with pytest.raises(ValueError, match=r"data.tokenizer is 'bytes', which has no chat template"):
        opened(rows / "chats.jsonl", tokenizer="bytes")
