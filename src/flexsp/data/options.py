"""How a source is read: the keys of `[data]` that decide which tokens there are, and where they are kept."""

from __future__ import annotations

from dataclasses import dataclass

ERROR, SKIP = "error", "skip"
ASSISTANT, ALL = "assistant", "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class DataOptions:
    """How a source becomes tokens; see docs/data.md."""

    tokenizer: str = ""
    """`bytes`, a folder that transformers loads a tokenizer from, or a tokenizer.json; local files only. Empty: rows
    have input_ids, python-stdlib is read as bytes, and other text by the tokenizer in model.path."""
    text: str = ""
    """The column of text; empty: `text`, where rows have it."""
    messages: str = ""
    """The column of chats, lists of {role, content}; empty: `messages`, where rows have it. A column `tools` beside it
    holds what the assistant may call."""
    train_on: str = ASSISTANT
    """Which tokens of a chat have labels: assistant (its turns alone) or all."""
    eos: bool = True
    """Append the tokenizer's end-of-text token, where it has one, to each document of text."""
    pattern: str = ""
    """Of a folder: its files, e.g. `**/*.md`; empty: its .jsonl and .parquet files, or else its .txt files."""
    subset: str = ""
    """Of a data set `hf:NAME`: the name of its configuration."""
    split: str = ""
    """Of a data set: which split; empty: the only one, or train."""
    on_broken: str = ERROR
    """Rows that are malformed, or have token ids that the model lacks: error, or skip (left out, and counted)."""
    on_empty: str = SKIP
    """Documents of no token: skip (left out, and counted), or error."""
    cache_dir: str = "~/.cache/flexsp/data"
    """Where token stores are kept."""
    workers: int = 0
    """Processes that tokenize; 0: the rank itself, with the threads that the tokenizer has."""
