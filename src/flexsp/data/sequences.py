"""The length index: which part of which document is one sequence, after the context limit."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from flexsp.data.batch import IntArray
from flexsp.data.corpus import Corpus
from flexsp.data.packing import IGNORE_INDEX
from flexsp.lengths import LengthArray


class Overlong(StrEnum):
    """What happens to a document above the context limit."""

    DROP = "drop"  # left out
    SPLIT = "split"  # cut into sequences of the limit, the last one shorter
    ERROR = "error"  # refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequences:
    """The sequences of a corpus, each a slice of one document; a SequenceSource."""

    corpus: Corpus
    documents: IntArray
    """(n,) which document."""
    offsets: IntArray
    """(n,) first token in it."""
    lengths: LengthArray
    """(n,) tokens."""

    def read(self, sequence: int, start: int, stop: int) -> tuple[IntArray, IntArray]:
        """Tokens [start, stop) of a sequence and the label of each: the next token's, none for the last."""
        document, offset = int(self.documents[sequence]), int(self.offsets[sequence])
        length = int(self.lengths[sequence])
        tokens, labels = self.corpus.read(document, offset + start, offset + min(stop + 1, length))
        shift_labels = labels[1:]
        if stop == length:
            shift_labels = np.append(shift_labels, IGNORE_INDEX)
        return tokens[: stop - start], shift_labels


@dataclass(frozen=True, slots=True)
class Touched:
    """What the context limit did."""

    documents: int
    """Documents above the limit."""
    tokens: int
    """Tokens in them (all of them)."""
    lost_tokens: int
    """Tokens that are not trained."""


def apply_context_limit(corpus: Corpus, max_length: int, overlong: Overlong) -> tuple[Sequences, Touched]:
    """The sequences of a corpus when none may be above `max_length` tokens.

    Raises:
        ValueError: the corpus is empty, or nothing is left of it, or a document is above the limit and `overlong` is
            error.
    """
    lengths = corpus.lengths
    if len(lengths) == 0:
        raise ValueError(f"{corpus.name}: the corpus is empty; give one with at least one document of one token")
    over = lengths > max_length
    touched_tokens = int(lengths[over].sum())
    documents = np.arange(len(lengths))
    if overlong is Overlong.ERROR and over.any():
        first = int(np.argmax(over))
        raise ValueError(
            f"{corpus.describe(first)}: length={lengths[first]} exceeds max_length={max_length}, as do {over.sum()} of "
            f"{len(lengths)} documents; raise data.max_length or set data.overlong to 'drop' or 'split'"
        )
    if overlong is Overlong.DROP:
        kept = documents[~over]
        if len(kept) == 0:
            raise ValueError(
                f"{corpus.name}: all {len(lengths)} documents exceed max_length={max_length}; raise data.max_length or "
                f"set data.overlong to 'split'"
            )
        sequences = Sequences(
            corpus=corpus, documents=kept, offsets=np.zeros(len(kept), np.int64), lengths=lengths[kept]
        )
        return sequences, Touched(int(over.sum()), touched_tokens, touched_tokens)
    pieces = -(-lengths // max_length)
    owner = np.repeat(documents, pieces)
    first_piece = np.repeat(np.cumsum(pieces) - pieces, pieces)
    offsets = (np.arange(len(owner)) - first_piece) * max_length
    sequences = Sequences(
        corpus=corpus, documents=owner, offsets=offsets, lengths=np.minimum(lengths[owner] - offsets, max_length)
    )
    return sequences, Touched(int(over.sum()), touched_tokens, 0)
