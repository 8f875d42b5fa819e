"""Rows, what may be wrong with one, and the documents of tokens that they become."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

import numpy as np

from flexsp import jsonfields as jf
from flexsp.data.packing import IGNORE_INDEX, IntArray

Made = TypeVar("Made")
Given = TypeVar("Given")
MOST_ID = int(np.iinfo(np.int32).max)
"""No token id is above it: models look them up as int32 or int64."""


class Reason(StrEnum):
    """Why a row is no document."""

    JSON = "malformed JSON"
    UTF8 = "invalid UTF-8"
    COLUMN = "no such column"
    NULL = "null"
    TYPE = "wrong type"
    NEGATIVE = "negative id"
    LARGE = "id too large"
    LABELS = "labels that do not fit"
    TOKENIZER = "text that the tokenizer does not take"
    CHAT = "chat that the template does not take"
    EMPTY = "no token"  # not broken: data.on_empty says what happens
    UNLABELLED = "no label that counts"  # not broken: nothing would be learnt from it


NOT_BROKEN = (Reason.EMPTY, Reason.UNLABELLED)


class BadRow(Exception):
    """A row that is no document."""

    def __init__(self, reason: Reason, text: str) -> None:
        """`text`: what is wrong and what to do, as it stands after the row's name."""
        super().__init__(text)
        self.reason, self.text = reason, text


@dataclass(frozen=True, slots=True)
class Document:
    """What is kept of a row."""

    tokens: IntArray
    """(tokens,) ids."""
    labels: IntArray | None = None
    """(tokens,) the label of each token itself, IGNORE_INDEX where it does not count; None: the tokens."""


Row = Mapping[str, Any] | BadRow
"""Columns by name; text as str, or as bytes that shall be UTF-8."""


def attempt(make: Callable[[Given], Made], row: Given | BadRow) -> Made | BadRow:
    """What `make` makes of a row, or what is wrong with it."""
    if isinstance(row, BadRow):
        return row
    try:
        return make(row)
    except BadRow as bad:
        return bad


def cell(row: Mapping[str, Any], column: str) -> Any:
    """The value of a column, which must be there."""
    if column not in row:
        there = jf.short(sorted(row))
        raise BadRow(Reason.COLUMN, f"there is no column {column!r}; it has {there}; give the tokens or name them so")
    if row[column] is None:
        raise BadRow(Reason.NULL, f"{column} has a null; give one in every row")
    return row[column]


def text_of(value: Any, column: str) -> str:
    """A str that UTF-8 can hold."""
    try:
        if isinstance(value, bytes):
            return value.decode("utf-8")
        if isinstance(value, str):
            value.encode("utf-8")  # JSON may escape half a surrogate pair
            return value
    except UnicodeError as error:
        raise BadRow(Reason.UTF8, f"{column} is not UTF-8 ({error.reason}); convert it") from None  # type: ignore[attr-defined]
    raise BadRow(Reason.TYPE, f"{column}={short(value)} must be text; correct the row")


def integers_of(value: Any, column: str) -> IntArray:
    """A list of integers as (tokens,) int64."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "iu":
        if value.dtype == np.uint64 and value.max(initial=0) > MOST_ID:
            raise _large(int(value.max()), column)
        return np.ascontiguousarray(value, dtype=np.int64)
    if not isinstance(value, list):
        raise BadRow(Reason.TYPE, f"{column}={short(value)} must be a list of integers; write token ids so")
    kinds = set(map(type, value))
    if type(None) in kinds:
        raise BadRow(Reason.NULL, f"{column} has a null in its list; give integers")
    if kinds - {int}:
        wrong = next(item for item in value if type(item) is not int)
        raise BadRow(Reason.TYPE, f"{column} holds {short(wrong)} and must be a list of integers; write token ids so")
    try:
        return np.array(value, dtype=np.int64)
    except OverflowError:
        worst = max(value, key=abs)
        if worst < 0:
            raise BadRow(Reason.NEGATIVE, f"{column} must be at least 0; correct the row") from None
        raise _large(worst, column) from None


def document_of(tokens: IntArray, labels: IntArray | None) -> Document:
    """Ids and labels that are in range and fit one another."""
    if len(tokens) == 0 and (labels is None or len(labels) == 0):
        raise BadRow(Reason.EMPTY, "there is no token")
    if len(tokens) and tokens.view(np.uint64).max() > MOST_ID:  # one pass: as unsigned, negative ones are the largest
        if tokens.min() < 0:
            raise BadRow(Reason.NEGATIVE, f"input_ids={tokens.min()} must be at least 0; correct the row")
        raise _large(int(tokens.max()), "input_ids")
    if labels is None:
        return Document(tokens)
    if len(labels) != len(tokens):
        raise BadRow(
            Reason.LABELS,
            f"labels={len(labels)} and input_ids={len(tokens)} must be equally many; write one label per token, "
            f"{IGNORE_INDEX} where it does not count",
        )
    wrong = labels[((labels < 0) & (labels != IGNORE_INDEX)) | (labels > MOST_ID)]
    if len(wrong):
        raise BadRow(Reason.LABELS, f"labels={wrong[0]} must be a token id, or {IGNORE_INDEX} where it does not count")
    if (labels[1:] == IGNORE_INDEX).all():  # that of the first token counts nowhere: nothing comes before it
        raise BadRow(Reason.UNLABELLED, f"there is no label but {IGNORE_INDEX} after the first token")
    return Document(tokens, None if np.array_equal(labels, tokens) else labels)


def short(value: Any) -> str:
    """A value as an error shows it."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _large(value: int, column: str) -> BadRow:
    shown = str(value) if abs(value) < 10**40 else "a number of many digits"
    return BadRow(Reason.LARGE, f"{column}={shown} is above {MOST_ID}, the most that an id can be; correct the row")
