"""The length index: which part of which document is one sequence, after the context limit."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flexsp.batches import Overlong, Touched, limit_lengths
from flexsp.data.corpus import Corpus, TokenStore
from flexsp.data.held_out import Documents
from flexsp.data.packing import IGNORE_INDEX, IntArray
from flexsp.lengths import LengthArray


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


def without_unlabelled(sequences: Sequences) -> tuple[Sequences, int]:
    """The sequences of which some label counts, and how many were left out.

    Those of one token, by their length: no label is left once they are shifted. Read are only pieces of split documents
    of which some label is not the token itself: whole documents without a label that counts are no part of a store.

    Raises:
        ValueError: none is left.
    """
    corpus, documents = sequences.corpus, sequences.documents
    kept = sequences.lengths > 1
    if isinstance(corpus, TokenStore | Documents):
        pieces = np.flatnonzero(kept & (sequences.lengths < corpus.lengths[documents]))
        for piece in pieces[corpus.have_own_labels(documents[pieces])]:
            _, labels = sequences.read(int(piece), 0, int(sequences.lengths[piece]))
            kept[piece] = bool((labels != IGNORE_INDEX).any())
    if not kept.any():
        raise ValueError(
            f"{corpus.name}: no label counts in any of {len(kept)} sequences; give documents of two tokens or more, "
            f"and where they are split and their labels masked, raise max_length"
        )
    left = Sequences(
        corpus=corpus,
        documents=documents[kept],
        offsets=sequences.offsets[kept],
        lengths=sequences.lengths[kept],
    )
    return left, int((~kept).sum())


def apply_context_limit(corpus: Corpus, max_length: int, overlong: Overlong) -> tuple[Sequences, Touched]:
    """The sequences of a corpus when none may be above `max_length` tokens.

    Raises:
        ValueError: the corpus is empty, or nothing is left of it, or a document is above the limit and `overlong` is
            error.
    """
    lengths = corpus.lengths
    if len(lengths) == 0:
        raise ValueError(f"{corpus.name}: the corpus is empty; give one with at least one document of one token")
    slices, touched = limit_lengths(lengths, max_length, overlong, corpus.name, corpus.describe)
    sequences = Sequences(corpus=corpus, documents=slices.documents, offsets=slices.offsets, lengths=slices.lengths)
    return sequences, touched
