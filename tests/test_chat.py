"""Chats: which tokens have labels."""

from __future__ import annotations

import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import small_tokenizers
from flexsp.data import DataOptions, open_corpus
from flexsp.data.encode import ChatRows
from flexsp.data.tokenizers import load_tokenizer

CHATS = [
    [("user", "the cat"), ("assistant", "the mat"), ("user", "and"), ("assistant", "the dog sat")],
    [("system", "user asks"), ("user", " the  cat "), ("assistant", " héllo 漢字 ")],
    [("user", "the end")],
    [("user", "the dog"), ("assistant", "</s><user>")],
]
ROWS = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in CHATS]

WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"properties": {"city": {"type": "x"}}}}}
CLOCK = {"type": "function", "function": {"name": "clock", "parameters": {"properties": {"zone": {"type": "x"}}}}}
ASKED, TOLD = {"name": "weather", "arguments": {"city": "héllo"}}, {"name": "clock", "arguments": {"zone": "the mat"}}
TOOL_ROWS = [
    {
        "messages": [
            {"role": "user", "content": "the cat"},
            {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function", "function": ASKED}]},
            {"role": "tool", "content": "the mat", "tool_call_id": "a"},
            {"role": "assistant", "content": "the dog sat"},
        ],
        "tools": [WEATHER, CLOCK],
    },
    {
        "messages": [
            {"role": "user", "content": "and"},
            {"role": "assistant", "content": "the end", "tool_calls": [{"type": "function", "function": TOLD}]},
        ],
        "tools": [CLOCK],
    },
    {"messages": [{"role": "user", "content": "the dog"}, {"role": "assistant", "content": "the cat"}], "tools": None},
]
"""Other keys in each row: Parquet gives them all to each, as nulls."""
TOOL_CHATS = [
    [
        ("user", json.dumps([WEATHER, CLOCK])), ("user", "the cat"),
        ("assistant", json.dumps(ASKED, ensure_ascii=False)), ("tool", "the mat"), ("assistant", "the dog sat"),
    ],
    [("user", json.dumps([CLOCK])), ("user", "and"), ("assistant", "the end" + json.dumps(TOLD))],
    [("user", "the dog"), ("assistant", "the cat")],
]  # fmt: skip


def by_hand(tokenizer, chat, all_count: bool = False) -> tuple[list[int], list[int]]:
    """Each turn cut for itself: special tokens stand between them, across which nothing is merged."""
    tokens, labels = [], []
    for role, text in chat:
        head = tokenizer.encode(f"<{role}>", add_special_tokens=False)
        body = tokenizer.encode(f"{text}<end>", add_special_tokens=False)
        if role in ("system", "tool"):  # no special token: merged with what follows
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


def with_nulls(value, keys=("city", "zone", "tool_calls", "content")):
    """As rows are that were exported with the keys of all."""
    if isinstance(value, dict):
        return {key: with_nulls(each) for key, each in value.items()} | {key: None for key in keys if key not in value}
    return [with_nulls(each) for each in value] if isinstance(value, list) else value


def nested(depth):
    return json.loads("[" * depth + "]" * depth)


TOOL_FILES = {
    "plain.jsonl": TOOL_ROWS,
    "nulls.jsonl": [with_nulls(row) for row in TOOL_ROWS],
    "text.jsonl": [{**row, "tools": json.dumps(row["tools"])} for row in TOOL_ROWS],
    "absent.jsonl": [*TOOL_ROWS[:2], {"messages": TOOL_ROWS[2]["messages"]}],
    "structs.parquet": TOOL_ROWS,
    "text.parquet": [{**row, "tools": row["tools"] and json.dumps(row["tools"])} for row in TOOL_ROWS],
}


def write_rows(path, rows) -> None:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("name", TOOL_FILES)
@pytest.mark.parametrize("template", ["TOOLS", "MARKED_TOOLS"])
def test_tools_are_rendered_and_calls_have_labels(tmp_path, opened, template, name):
    tokenizer = small_tokenizers.byte_pairs(tmp_path / "bpe", getattr(small_tokenizers, template))
    write_rows(tmp_path / name, TOOL_FILES[name])
    corpus = opened(tmp_path / name, tokenizer=str(tmp_path / "bpe"))
    for document, chat in enumerate(TOOL_CHATS):
        tokens, labels = corpus.read(document, 0, int(corpus.lengths[document]))
        assert tokenizer.decode(tokens) == "".join(f"<{role}>{text}<end>" for role, text in chat)
        assert (tokens.tolist(), labels.tolist()) == by_hand(tokenizer, chat)


def test_a_data_sets_tools_are_rendered(tmp_path, opened):
    datasets = pytest.importorskip("datasets")
    tokenizer = small_tokenizers.byte_pairs(tmp_path / "bpe", small_tokenizers.TOOLS)
    datasets.Dataset.from_list(TOOL_ROWS).save_to_disk(str(tmp_path / "set"))
    corpus = opened(tmp_path / "set", tokenizer=str(tmp_path / "bpe"), train_on="all")
    for document, chat in enumerate(TOOL_CHATS):
        tokens, _ = corpus.read(document, 0, int(corpus.lengths[document]))
        assert tokens.tolist() == by_hand(tokenizer, chat)[0]


CALL = [{"type": "function", "function": ASKED}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"tools": "weather"}, r"row 1: tools='weather' is malformed JSON \(Expecting value"),
        ({"tools": '[{"name": 1, "name": 2}]'}, r"row 1: tools=.* is malformed JSON \(the field 'name' is there twice"),
        ({"tools": {"name": "weather"}}, r"row 1: tools=\{'name': 'weather'\} must be a list of JSON schemas, or its"),
        ({"tools": ["weather"]}, r"row 1: tools=\['weather'\] must be a list of JSON schemas"),
        ({"tools": "7"}, r"row 1: tools='7' must be a list of JSON schemas"),
        (
            {"messages": [{"role": "assistant", "content": None}]},
            r"row 1: turn 0: .* must have content as text",
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": []}]},
            r"row 1: turn 0: .* must have content as text",
        ),
        (
            {"messages": [{"role": "assistant", "content": [], "tool_calls": CALL}]},
            r"row 1: turn 0: .* must have content as text",
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": "weather"}]},
            r"row 1: turn 0: tool_calls='weather' must be a list of objects",
        ),
        (
            {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [{"function": 7.5}]}]},
            r"row 1: the chat template does not take it \(no function\)",
        ),
        (
            {"tools": [{"a": nested(900)}]},
            r"row 1: (it is nested too deeply; write it|the chat template does not take)",
        ),
    ],
)
def test_broken_tools_are_named_or_counted(tmp_path, opened, row, message):
    check = "{% if call['function'] is not mapping %}{{ raise_exception('no function') }}{% endif %}"
    template = small_tokenizers.TOOLS.replace("{{ call", check + "{{ call")
    small_tokenizers.byte_pairs(tmp_path / "bpe", template)
    write_rows(tmp_path / "chats.jsonl", [ROWS[0], {**ROWS[0], **row}, ROWS[0]])
    options = {"tokenizer": str(tmp_path / "bpe"), "messages": "messages"}
    with pytest.raises(ValueError, match=message):
        opened(tmp_path / "chats.jsonl", **options)
    assert len(opened(tmp_path / "chats.jsonl", on_broken="skip", **options).lengths) == 2


@pytest.mark.parametrize("train_on", ["assistant", "all"])
def test_what_a_template_would_leave_out_is_refused(tmp_path, opened, train_on):
    """It would be trained on calls of tools that it never saw."""
    small_tokenizers.byte_pairs(tmp_path / "bpe", small_tokenizers.PLAIN)
    options = {"tokenizer": str(tmp_path / "bpe"), "train_on": train_on}
    write_rows(tmp_path / "tools.jsonl", [ROWS[0], {**ROWS[0], "tools": [WEATHER]}])
    with pytest.raises(ValueError, match=r"row 1: the row has tools, which the chat template does not write; give a"):
        opened(tmp_path / "tools.jsonl", **options)
    write_rows(tmp_path / "calls.jsonl", [ROWS[0], {"messages": TOOL_ROWS[1]["messages"]}])
    with pytest.raises(ValueError, match=r"row 1: the row has tool_calls, which the chat template does not write"):
        opened(tmp_path / "calls.jsonl", **options)
    write_rows(tmp_path / "none.jsonl", [{**ROWS[0], "tools": []}, {**ROWS[0], "tools": None}])
    assert len(opened(tmp_path / "none.jsonl", **options).lengths) == 2


def test_tools_that_move_with_the_last_turn_are_refused_unless_all_count(tmp_path, opened):
    small_tokenizers.byte_pairs(tmp_path / "bpe", small_tokenizers.TOOLS_AT_THE_LAST)
    write_rows(tmp_path / "chats.jsonl", [{**ROWS[0], "tools": [WEATHER]}])
    with pytest.raises(ValueError, match=r"row 0: turn 1: the chat template writes a chat up to this turn otherwise"):
        opened(tmp_path / "chats.jsonl", tokenizer=str(tmp_path / "bpe"))
    assert len(opened(tmp_path / "chats.jsonl", tokenizer=str(tmp_path / "bpe"), train_on="all").lengths) == 1


def test_stores_of_chats_from_before_tools_are_made_anew(tmp_path):
    small_tokenizers.byte_pairs(tmp_path / "bpe", small_tokenizers.TOOLS)
    tokenizer = load_tokenizer(str(tmp_path / "bpe"))
    before = hashlib.sha256(json.dumps(["chat", tokenizer.key, "messages", "assistant"]).encode()).hexdigest()
    now = ChatRows(tokenizer, "messages", "assistant")
    assert now.key != before
    assert now.columns == ("messages", "tools")
    assert ChatRows(tokenizer, "tools", "assistant").columns == ("tools",)


def test_chats_need_a_template(rows, opened):
    small_tokenizers.byte_pairs(rows / "bpe", None)
    with pytest.raises(ValueError, match=r"data.tokenizer '.*bpe' has no chat template"):
        opened(rows / "chats.jsonl", tokenizer=str(rows / "bpe"))
    with pytest.raises(ValueError, match=r"data.tokenizer is 'bytes', which has no chat template"):
        opened(rows / "chats.jsonl", tokenizer="bytes")
