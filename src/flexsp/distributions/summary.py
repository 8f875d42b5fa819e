"""What a set of lengths looks like: quantiles, and how sequences, tokens and attention's work spread over lengths."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flexsp.lengths import LengthArray

LEVELS = (0.0, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.999, 1.0)
"""Of the quantiles in a summary; 0 is the shortest, 1 the longest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """The sequences of lengths above `above_tokens` and up to `upto_tokens`."""

    above_tokens: int
    upto_tokens: int
    """A power of two."""
    num_sequences: int
    num_tokens: int
    squared_tokens: float
    """Sum of the squares of the lengths: what attention's work grows with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A set of lengths."""

    num_sequences: int
    num_tokens: int
    squared_tokens: float
    quantiles: dict[float, int]
    """By level, for each of `LEVELS`: the least length that this share of the sequences does not exceed."""
    bands: tuple[Band, ...]
    """By powers of two; together they hold every sequence once. The first one begins at 0 and holds at least 1 %."""

    @property
    def mean_tokens(self) -> float:
        return self.num_tokens / self.num_sequences


@dataclass(frozen=True, slots=True, kw_only=True)
class Excess:
    """The sequences that a context limit touches."""

    max_length: int
    """The limit, in tokens."""
    num_sequences: int
    """How many are longer."""
    num_tokens: int
    """All of their tokens."""
    tokens_beyond: int
    """Those of their tokens that lie beyond the limit."""


def summarise(lengths: LengthArray) -> Summary:
    """The summary of (K,) lengths, each at least 1 token."""
    ascending = np.sort(lengths)
    at = np.quantile(ascending, LEVELS, method="inverted_cdf")
    bands = _bands(ascending)
    return Summary(
        num_sequences=len(ascending),
        num_tokens=int(ascending.sum()),
        squared_tokens=sum(band.squared_tokens for band in bands),
        quantiles={level: int(tokens) for level, tokens in zip(LEVELS, at, strict=True)},
        bands=bands,
    )


def excess(lengths: LengthArray, max_length: int) -> Excess:
    """What of (K,) lengths is longer than `max_length` tokens."""
    longer = lengths[lengths > max_length]
    total = int(longer.sum())
    return Excess(
        max_length=max_length,
        num_sequences=len(longer),
        num_tokens=total,
        tokens_beyond=total - max_length * len(longer),
    )


def _bands(ascending: LengthArray) -> tuple[Band, ...]:
    """From the power of two that at least 1 % do not exceed to the one that none exceeds."""
    first = _power_of_two(int(np.quantile(ascending, 0.01, method="inverted_cdf")))
    bands, above, begin = [], 0, 0
    upto = first
    while begin < len(ascending):
        end = int(np.searchsorted(ascending, upto, side="right"))
        inside = ascending[begin:end]
        bands.append(
            Band(
                above_tokens=above,
                upto_tokens=upto,
                num_sequences=end - begin,
                num_tokens=int(inside.sum()),
                # in floating point: the squares of millions of tokens outgrow 64 bits when summed
                squared_tokens=float(np.square(inside.astype(np.float64)).sum()),
            )
        )
        above, begin, upto = upto, end, upto * 2
    return tuple(bands)


def _power_of_two(tokens: int) -> int:
    """The least power of two that is not below `tokens`."""
    return 1 << (tokens - 1).bit_length()
