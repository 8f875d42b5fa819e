"""From the lengths of a corpus to global batches: the context limit, and the order of the data.

Training and simulation form the same batches, since both do it here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from flexsp.lengths import LengthArray

IntArray = npt.NDArray[np.int64]

MOST_PIECES = 1 << 27
"""That splitting adds; more are taken for a slip of the keyboard: their slices alone would take gigabytes."""


class Overlong(StrEnum):
    """What happens to a document above the context limit."""

    DROP = "drop"  # left out
    SPLIT = "split"  # cut into sequences of the limit, the last one shorter
    ERROR = "error"  # refused


@dataclass(frozen=True, slots=True)
class Touched:
    """What the context limit did."""

    documents: int
    """Documents above the limit."""
    tokens: int
    """Tokens in them (all of them)."""
    lost_tokens: int
    """Tokens that are not trained."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Slices:
    """Sequences as slices of documents; (n,) each."""

    documents: IntArray
    """Which document."""
    offsets: IntArray
    """First token in it."""
    lengths: LengthArray
    """Tokens."""


def limit_lengths(
    lengths: LengthArray, max_length: int, overlong: Overlong, where: str, describe: Callable[[int], str]
) -> tuple[Slices, Touched]:
    """The sequences of documents of these `lengths` (tokens) when none may be above `max_length`.

    Args:
        lengths: (documents,) tokens.
        max_length: the context limit in tokens.
        overlong: what to do with a longer one.
        where: what errors call the whole.
        describe: what errors call a document.

    Raises:
        ValueError: nothing is left, a document is above the limit and `overlong` is error, or it would be split into
            more pieces than any corpus has.
    """
    over = lengths > max_length
    touched_tokens = int(lengths[over].sum())
    documents = np.arange(len(lengths))
    if overlong is Overlong.ERROR and over.any():
        first = int(np.argmax(over))
        raise ValueError(
            f"{describe(first)}: length={lengths[first]} exceeds max_length={max_length}, as do {over.sum()} of "
            f"{len(lengths)} documents; raise max_length or set overlong to 'drop' or 'split'"
        )
    if overlong is Overlong.DROP:
        kept = documents[~over]
        if len(kept) == 0:
            raise ValueError(
                f"{where}: all {len(lengths)} documents exceed max_length={max_length}; raise max_length or set "
                f"overlong to 'split'"
            )
        slices = Slices(documents=kept, offsets=np.zeros(len(kept), np.int64), lengths=lengths[kept])
        return slices, Touched(int(over.sum()), touched_tokens, touched_tokens)
    pieces = -(-lengths // max_length)
    total = int(pieces.sum())
    if total - len(lengths) > MOST_PIECES:
        longest = int(np.argmax(pieces))
        raise ValueError(
            f"{describe(longest)}: length={lengths[longest]} is {pieces[longest]:,} pieces of max_length={max_length}, "
            f"{total:,} in all, and more than {MOST_PIECES:,} are not split; correct the length, raise max_length or "
            f"set overlong to 'drop'"
        )
    owner = np.repeat(documents, pieces)
    first_piece = np.repeat(np.cumsum(pieces) - pieces, pieces)
    offsets = (np.arange(len(owner)) - first_piece) * max_length
    slices = Slices(documents=owner, offsets=offsets, lengths=np.minimum(lengths[owner] - offsets, max_length))
    return slices, Touched(int(over.sum()), touched_tokens, 0)


def global_batch(num_sequences: int, batch_size: int, seed: int, step: int) -> IntArray:
    """Ids of the sequences of a step: (batch_size,).

    Every epoch is a permutation of all sequences, and batches follow one another through the epochs without a gap, so
    that the order depends on seed and step alone.
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs, within = np.divmod(places, num_sequences)
    return np.array([_permutation(num_sequences, seed, int(e))[w] for e, w in zip(epochs, within, strict=True)])


@lru_cache(maxsize=2)
def _permutation(num_sequences: int, seed: int, epoch: int) -> IntArray:
    return np.random.default_rng([seed, epoch]).permutation(num_sequences)
