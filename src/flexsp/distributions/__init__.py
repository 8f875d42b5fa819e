"""Lengths without a file: distributions of sequence lengths by name, and what a set of lengths looks like.

No torch here. `docs/lengths.md` says where each distribution comes from, and what of it is interpolated.
"""

from flexsp.distributions.source import lengths_of
from flexsp.distributions.summary import Band, Excess, Summary, excess, summarise
from flexsp.distributions.table import Distribution, find, names

__all__ = ["Band", "Distribution", "Excess", "Summary", "excess", "find", "lengths_of", "names", "summarise"]
