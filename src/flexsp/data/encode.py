"""From rows to documents: token ids as they are, text or chats through a tokenizer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from flexsp import jsonfields as jf
from flexsp.data.chat import TOOLS, Chats
from flexsp.data.options import DataOptions
from flexsp.data.packing import IntArray
from flexsp.data.rows import (
    BadRow,
    Document,
    Reason,
    Row,
    attempt,
    cell,
    document_of,
    integers_of,
    text_of,
)
from flexsp.data.tokenizers import BYTES, Tokenizer, has_tokenizer, load_tokenizer, refused

IDS, LABELS = "input_ids", "labels"
TEXT, MESSAGES = "text", "messages"
"""Columns that are looked for where none is named; files of text have the first."""


class Encoder(Protocol):
    """Makes documents of rows."""

    columns: tuple[str, ...]
    """That are read of a row, where they are there."""
    key: str
    """Names what decides about the tokens: two encoders of one key make the same of the same rows."""

    def encode(self, rows: Sequence[Row]) -> list[Document | BadRow]:
        """A document of each row, or what is wrong with it."""
        ...


class IdRows:
    """Rows with `input_ids` and, where there, `labels`."""

    columns: tuple[str, ...] = (IDS, LABELS)
    key = "ids/2"  # shards of before hold rows of which the first label alone counts

    def encode(self, rows: Sequence[Row]) -> list[Document | BadRow]:
        return [attempt(self._document, row) for row in rows]

    def _document(self, row: Mapping[str, Any]) -> Document:
        tokens = integers_of(cell(row, IDS), IDS)
        return document_of(tokens, integers_of(cell(row, LABELS), LABELS) if LABELS in row else None)


class TextRows:
    """Rows with a column of text."""

    def __init__(self, tokenizer: Tokenizer, column: str, eos: bool) -> None:
        self._tokenizer = tokenizer
        self.columns: tuple[str, ...] = (column,)
        self._end = [] if tokenizer.eos is None or not eos else [tokenizer.eos]
        self.key = _key("text", tokenizer.key, column, self._end)

    def encode(self, rows: Sequence[Row]) -> list[Document | BadRow]:
        texts = [attempt(self._text, row) for row in rows]
        cut = iter(self._cut([text for text in texts if isinstance(text, str)]))
        return [text if isinstance(text, BadRow) else attempt(self._document, next(cut)) for text in texts]

    def _cut(self, texts: list[str]) -> list[IntArray | BadRow]:
        """Ids of each text; one by one where the tokenizer does not take one of them."""
        try:
            return list(self._tokenizer.encode(texts))
        except MemoryError:
            raise
        except Exception as error:  # the tokenizers package raises bare ones
            return [refused(error)] if len(texts) == 1 else [found for text in texts for found in self._cut([text])]

    def _text(self, row: Mapping[str, Any]) -> str:
        text = text_of(cell(row, self.columns[0]), self.columns[0])
        if not text:
            raise BadRow(Reason.EMPTY, "there is no token")
        return text

    def _document(self, tokens: IntArray) -> Document:
        whole = document_of(tokens, None)  # no token but the end is no document
        ended = not self._end or tokens[-1] == self._end[0]
        return whole if ended else Document(np.append(tokens, self._end))


class RawRows:
    """The bytes of a row's text as they are, UTF-8 or not: source code of all times."""

    columns: tuple[str, ...] = (TEXT,)
    key = "raw"

    def encode(self, rows: Sequence[Row]) -> list[Document | BadRow]:
        return [attempt(self._document, row) for row in rows]

    def _document(self, row: Mapping[str, Any]) -> Document:
        return document_of(np.frombuffer(cell(row, TEXT), dtype=np.uint8).astype(np.int64), None)


class ChatRows:
    """Rows with a column of chats and, where there, `tools`."""

    def __init__(self, tokenizer: Tokenizer, column: str, train_on: str) -> None:
        self._chats = Chats(tokenizer, train_on)
        self.columns: tuple[str, ...] = tuple(dict.fromkeys((column, TOOLS)))
        # shards of before know no tools ("chat"), or hold rows of which the first label alone counts ("chat" and tools)
        self.key = _key("chat/2", tokenizer.key, self.columns, train_on)

    def encode(self, rows: Sequence[Row]) -> list[Document | BadRow]:
        return [attempt(self._document, row) for row in rows]

    def _document(self, row: Mapping[str, Any]) -> Document:
        return self._chats.document(cell(row, self.columns[0]), *(row.get(column) for column in self.columns[1:]))


def choose_encoder(options: DataOptions, columns: Sequence[str] | None, where: str, model_path: str) -> Encoder:
    """What fits the columns that rows have, or the files of text.

    Args:
        options: of the run.
        columns: of the first row; None where a file is one document of text.
        where: what errors call the source.
        model_path: the model's folder, which may hold a tokenizer; or empty.

    Raises:
        ValueError: nothing says how the source becomes tokens, or several things do.
    """
    if options.text and options.messages:
        raise ValueError(
            f"data.text={options.text!r} and data.messages={options.messages!r}: rows are text or chats; give one of "
            f"the two"
        )
    if columns is None:
        return TextRows(_tokenizer(options, where, model_path, "text"), TEXT, options.eos)
    column = options.text or options.messages
    if column and column not in columns:
        key = "text" if options.text else "messages"
        raise ValueError(
            f"{where}: data.{key}={column!r}: there is no such column; it has {jf.short(sorted(columns))}; name one"
        )
    if not column:
        column = _column(options, columns, where)
    if column == IDS:
        return IdRows()
    chats = column == options.messages or (column == MESSAGES and not options.text)
    tokenizer = _tokenizer(options, where, model_path, f"column {column!r}")
    return ChatRows(tokenizer, column, options.train_on) if chats else TextRows(tokenizer, column, options.eos)


def raw_or_text(options: DataOptions, where: str) -> Encoder:
    """For source code: its bytes, or by the tokenizer that is named."""
    if options.tokenizer in ("", BYTES):
        return RawRows()
    return TextRows(_tokenizer(options, where, "", "text"), TEXT, options.eos)


def _column(options: DataOptions, columns: Sequence[str], where: str) -> str:
    """The column that is there; ids come first unless a tokenizer is named."""
    if IDS in columns and not options.tokenizer:
        return IDS
    found = [name for name in (TEXT, MESSAGES) if name in columns]
    if len(found) == 2:
        raise ValueError(f"{where}: has both columns, 'text' and 'messages'; name one by data.text or data.messages")
    if found:
        return found[0]
    if IDS in columns:
        return IDS
    raise ValueError(
        f"{where}: there is no column 'input_ids', 'text' or 'messages'; it has {jf.short(sorted(columns))}; name the "
        f"column by data.text or data.messages"
    )


def _tokenizer(options: DataOptions, where: str, model_path: str, what: str) -> Tokenizer:
    if options.tokenizer:
        return load_tokenizer(options.tokenizer)
    if has_tokenizer(model_path):
        return load_tokenizer(model_path)
    model = f", and model.path={model_path!r} holds none" if model_path else ""
    raise ValueError(
        f"{where}: {what} needs a tokenizer{model}; set data.tokenizer to a folder or a tokenizer.json, or to 'bytes'"
    )


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
