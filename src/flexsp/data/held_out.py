"""Documents kept from training, on which it is evaluated.

Whole documents are chosen, before the context limit cuts any: no piece of one that is held out is ever trained.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from flexsp.data.corpus import Corpus, TokenStore
from flexsp.data.packing import IntArray

STREAM = 1
"""Keeps the choice apart from other draws of the same seed."""


class Documents:
    """Some of the documents of a corpus; a corpus itself."""

    def __init__(self, whole: Corpus, documents: IntArray, name: str) -> None:
        """
        Args:
            whole: the corpus.
            documents: (n,) which of its documents, in the order that they are to have.
            name: of this part.
        """
        self.whole, self.documents, self.name = whole, documents, name
        self.lengths = whole.lengths[documents]
        if isinstance(whole, TokenStore):
            self.largest = whole.largest[documents]
            """(n,) the largest token id or label of each."""

    def read(self, document: int, start: int, stop: int) -> tuple[IntArray, IntArray]:
        return self.whole.read(int(self.documents[document]), start, stop)

    def have_own_labels(self, documents: IntArray) -> npt.NDArray[np.bool_]:
        if isinstance(self.whole, TokenStore):
            return self.whole.have_own_labels(self.documents[documents])
        return np.zeros(len(documents), dtype=bool)

    def describe(self, document: int) -> str:
        return self.whole.describe(int(self.documents[document]))

    def __getattr__(self, name: str) -> Any:
        """What is true of the whole: how many documents were left out, and why."""
        if name.startswith("__") or "whole" not in self.__dict__:  # while it is unpickled
            raise AttributeError(name)
        return getattr(self.whole, name)


def hold_out(corpus: Corpus, count: int, seed: int) -> tuple[Documents, Documents]:
    """The documents to train, and `count` others to evaluate on, both in the corpus's order.

    Which they are depends on the number of documents, `count` and `seed` alone.

    Args:
        corpus: of more than `count` documents.
        count: of documents to hold out.
        seed: of the choice.

    Raises:
        ValueError: none would be left to train, or the count is below 0.
    """
    documents = len(corpus.lengths)
    if not 0 <= count < documents:
        raise ValueError(
            f"held_out={count} must be at least 0 and below the {documents} documents of {corpus.name}; lower it"
        )
    draw = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(STREAM,)))
    held = np.zeros(documents, dtype=bool)
    held[draw.choice(documents, count, replace=False, shuffle=False)] = True
    trained = Documents(corpus, np.flatnonzero(~held), corpus.name)
    return trained, Documents(corpus, np.flatnonzero(held), f"{corpus.name} (held out)")
