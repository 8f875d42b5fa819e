"""Corpora: documents of tokens, of which any part can be read without the rest."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from flexsp.data.indexing import Built, Recipe, built
from flexsp.data.options import DataOptions
from flexsp.data.packing import IntArray
from flexsp.data.rows import NOT_BROKEN, Reason
from flexsp.data.sources import PYTHON_STDLIB
from flexsp.lengths import LengthArray
from flexsp.track import Track, silent

MOST_MAPPED = 64
"""Shards that are memory-mapped at once: each takes open files."""
MOST_NAMED = 1000
"""Files whose digests `identity` names one by one."""


class Corpus(Protocol):
    """Documents by index. Two ranks that open one source see the same documents in the same order.

    Two threads may read at once: one reads ahead while an evaluation reads too.
    """

    name: str
    """What errors and logs call it."""
    lengths: LengthArray
    """(documents,) tokens, each at least 1."""
    num_empty: int
    """Documents of no token, which were left out; for the log."""

    def read(self, document: int, start: int, stop: int) -> tuple[IntArray, IntArray]:
        """Tokens [start, stop) of a document and the label of each token itself (not shifted)."""
        ...

    def describe(self, document: int) -> str:
        """A name for errors: file, or file and row."""
        ...


def open_corpus(
    source: str,
    options: DataOptions | None = None,
    *,
    model_path: str = "",
    track: Track = silent,
    patient: bool = False,
) -> TokenStore:
    """The corpus that `source` names, tokenized into `options.cache_dir` where it is not there yet.

    Every rank may call it: one builds, and the others wait for it, however long it takes. What a killed build had done
    is kept.

    Args:
        source: `python-stdlib`; a `.jsonl` or `.parquet` file; a folder or a pattern of such files, or of files of
            text; a folder that `save_to_disk` of `datasets` wrote; or `hf:NAME`, a data set by name.
        options: how it is read; by default rows have `input_ids`, and python-stdlib is read as bytes.
        model_path: a model's folder, which may hold the tokenizer.
        track: shows progress.
        patient: whether another rank begins now, which had better build.

    Raises:
        ValueError: an unknown source, a file or row that cannot be read as what the options say, or a cache that cannot
            be written; the message is one line and names file and row.
        BuilderStoppedError: the process that builds is on this machine and has been stopped for a minute.
    """
    recipe = Recipe(source, options or DataOptions(), model_path)
    return TokenStore(recipe, built(recipe, track, patient))


class TokenStore:
    """Documents of tokens in memory-mapped files; a Corpus."""

    name: str
    """What `open_corpus` was given."""
    lengths: LengthArray
    """(documents,) tokens, each at least 1."""
    largest: npt.NDArray[np.uint32]
    """(documents,) the largest token id or label of each."""
    left_out: Mapping[str, tuple[int, str]]
    """Rows that are no documents, by reason: how many, and the first as an error would name it."""
    num_empty: int
    """Of these, rows of no token."""
    num_broken: int
    """Of these, rows with something wrong."""
    num_made: int
    """Shards that had to be made; the others were there."""

    def __init__(self, recipe: Recipe, made: Built) -> None:
        self.name = recipe.source.name
        self.num_made = made.num_made
        self._source, self._pieces, self._shards = recipe.source, made.pieces, made.shards
        self._firsts = np.cumsum([0, *(shard.documents for shard in made.shards)])
        self._offsets = [shard.offsets() for shard in made.shards]
        none = np.empty(0, dtype=np.int64)
        self.lengths = np.concatenate([none, *(np.diff(offsets) for offsets in self._offsets)])
        self.largest = np.concatenate([none.astype(np.uint32), *(shard.largest() for shard in made.shards)])
        self.left_out = _left_out(recipe, made)
        self.num_empty = self.left_out.get(Reason.EMPTY, (0, ""))[0]
        self.num_broken = sum(count for reason, (count, _) in self.left_out.items() if reason not in NOT_BROKEN)
        self._begin_maps()

    def _begin_maps(self) -> None:
        self._maps: OrderedDict[int, tuple[npt.NDArray[Any], npt.NDArray[Any]]] = OrderedDict()
        self._mapping = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        """For copies and workers, each of which maps for itself."""
        return {name: value for name, value in self.__dict__.items() if name not in ("_maps", "_mapping")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self._begin_maps()

    def read(self, document: int, start: int, stop: int) -> tuple[IntArray, IntArray]:
        """Tokens [start, stop) of a document and the label of each token itself (not shifted)."""
        index, within = self._place(document)
        begin = int(self._offsets[index][within])
        tokens, labels = self._map(index)
        found = np.array(tokens[begin + start : begin + stop], dtype=np.int64)
        return found, found if labels is tokens else np.array(labels[begin + start : begin + stop], dtype=np.int64)

    def have_own_labels(self, documents: IntArray) -> npt.NDArray[np.bool_]:
        """(n,) of (n,) documents, whether some label of its shard is not the token itself: masked, say."""
        own = np.array([shard.label_type is not None for shard in self._shards], dtype=bool)
        return own[np.searchsorted(self._firsts, documents, side="right") - 1]

    def describe(self, document: int) -> str:
        """A name for errors: file, or file and row."""
        index, within = self._place(document)
        return self._source.describe(self._pieces[index], self._shards[index].row(within))

    @property
    def fingerprint(self) -> str:
        """A digest of all documents: equal on ranks that see the same tokens in the same order."""
        digests = [shard.digest for shard in self._shards if shard.documents]
        return hashlib.sha256(json.dumps(digests).encode()).hexdigest()

    def identity(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data: the fingerprint, and digests of the files unless they are many."""
        files: dict[str, list[str]] = {}
        for piece in self._pieces:
            for file, part in zip(piece.files, piece.parts, strict=True):
                files.setdefault(file.name, []).append(part.content)
        named = {name: hashlib.sha256("".join(parts).encode()).hexdigest()[:16] for name, parts in files.items()}
        return {"fingerprint": self.fingerprint, "files": named if len(named) <= MOST_NAMED else {}}

    def _place(self, document: int) -> tuple[int, int]:
        """The shard of a document, and which of its documents it is."""
        index = int(np.searchsorted(self._firsts, document, side="right")) - 1
        return index, document - int(self._firsts[index])

    def _map(self, index: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        # the reader's thread reads while an evaluation does, and an OrderedDict is not whole between two steps of one
        # call: each waits. What one has in hand the other may drop from here
        with self._mapping:
            found = self._maps.pop(index, None) or self._shards[index].map()
            self._maps[index] = found
            while len(self._maps) > MOST_MAPPED:
                self._maps.popitem(last=False)
            return found


def _left_out(recipe: Recipe, made: Built) -> Mapping[str, tuple[int, str]]:
    counts: dict[str, tuple[int, str]] = {}
    for piece, shard in zip(made.pieces, made.shards, strict=True):
        for reason, left_out in shard.left_out.items():
            row, _ = left_out.first[0]
            count, first = counts.get(reason, (0, recipe.source.describe(piece, row)))
            counts[reason] = count + left_out.count, first
    return counts


__all__ = ["PYTHON_STDLIB", "Corpus", "DataOptions", "TokenStore", "open_corpus"]
