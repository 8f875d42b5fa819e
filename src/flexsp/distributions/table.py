"""Distributions of sequence lengths as tables of quantiles, which come with flexsp as small JSON files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib import resources

import numpy as np
import numpy.typing as npt

from flexsp import jsonfields as jf
from flexsp.lengths import LengthArray

KINDS = ("measured", "published")


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """How long sequences of one kind of data are, by quantiles."""

    name: str
    kind: str
    """`measured`: quantiles of lengths that were counted; `published`: fitted to figures that others published."""
    description: str
    source: str
    """Where the figures come from, and for a fit what lies between them."""
    unit: str
    """What was counted, with the tokenizer where it is known."""
    levels: tuple[float, ...]
    """Ascending from 0 to 1; denser towards 1, where the long sequences are."""
    tokens: tuple[int, ...]
    """The length at each level: this share of the sequences is not longer."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} must be one of {', '.join(KINDS)}; correct it")
        if len(self.levels) != len(self.tokens) or self.levels[:1] != (0,) or self.levels[-1:] != (1,):
            raise ValueError(
                f"levels={len(self.levels)} must be as many as tokens={len(self.tokens)} and go from 0 to 1; add some"
            )
        if any(a >= b for a, b in zip(self.levels, self.levels[1:], strict=False)):
            raise ValueError("levels must ascend strictly; sort them and leave out doubles")
        if self.tokens[0] < 1 or any(a > b for a, b in zip(self.tokens, self.tokens[1:], strict=False)):
            raise ValueError("tokens must be at least 1 and never descend; correct them")

    def quantile(self, levels: npt.ArrayLike) -> LengthArray:
        """The length at each of `levels` (from 0 to 1), interpolated between the table's in the logarithm of tokens."""
        logs = np.interp(np.asarray(levels, dtype=np.float64), self.levels, np.log(self.tokens))
        # exp(log(4096)) may come out just below 4096, and lengths are cut to whole tokens
        lengths: LengthArray = (np.exp(logs) * (1 + 1e-12)).astype(np.int64)
        return lengths

    def draw(self, count: int, seed: int) -> LengthArray:
        """(count,) lengths in tokens, independent of each other; the same for the same `count` and `seed`.

        Raises:
            ValueError: `count` below 1 or `seed` below 0.
        """
        if count < 1:
            raise ValueError(f"count={count} must be at least 1; say how many lengths to draw from {self.name}")
        if seed < 0:
            raise ValueError(f"seed={seed} must be at least 0; give another")
        return self.quantile(np.random.default_rng(seed).random(count))


def names() -> tuple[str, ...]:
    """The names of the distributions that come with flexsp, in alphabetical order."""
    return tuple(sorted(_files()))


def find(name: str) -> Distribution:
    """The distribution of that name.

    Raises:
        ValueError: there is none; the message lists them.
    """
    if name not in _files():
        raise ValueError(f"distribution={name!r} is unknown; choose one of {', '.join(names())}")
    return _load(name)


@cache
def _files() -> frozenset[str]:
    folder = resources.files("flexsp.distributions") / "tables"
    return frozenset(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


@cache
def _load(name: str) -> Distribution:
    where = f"{name}.json"
    text = (resources.files("flexsp.distributions") / "tables" / where).read_text(encoding="utf-8")
    fields = jf.as_object(json.loads(text), where)
    levels, tokens = (jf.as_list(jf.required(fields, key, where), f"{where}: {key}") for key in ("levels", "tokens"))
    strings = {
        key: jf.as_string(jf.required(fields, key, where), f"{where}: {key}")
        for key in ("name", "kind", "description", "source", "unit")
    }
    return Distribution(**strings, levels=tuple(map(float, levels)), tokens=tuple(map(int, tokens)))
