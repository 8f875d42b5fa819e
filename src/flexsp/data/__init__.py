"""From a corpus and a plan to the tensors of one rank."""

from flexsp.batches import Overlong, Touched
from flexsp.data.batch import PlannedBatch, RankMicroBatch
from flexsp.data.corpus import Corpus, TokenStore, open_corpus
from flexsp.data.held_out import hold_out
from flexsp.data.loader import PlannedLoader
from flexsp.data.options import DataOptions
from flexsp.data.sequences import Sequences, apply_context_limit

__all__ = [
    "Corpus",
    "DataOptions",
    "Overlong",
    "PlannedBatch",
    "PlannedLoader",
    "RankMicroBatch",
    "Sequences",
    "TokenStore",
    "Touched",
    "apply_context_limit",
    "hold_out",
    "open_corpus",
]
