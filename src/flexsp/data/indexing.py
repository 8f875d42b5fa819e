"""Building a token store: whoever holds the lock builds, shard by shard, and the others wait for the lock.

1. Look: where no file has changed and all shards are whole, there is nothing to do, and no lock is taken.
2. Take the lock. The system frees it when its holder dies, and the next one goes on with the shards that are there.
3. Read the files that have changed, for the digests of their parts.
4. Compare the shards that are there with their digests, where they are not known to be as they were written.
5. Make the missing shards, in this process or in workers, each written aside and renamed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from multiprocessing.process import BaseProcess
from pathlib import Path

from flexsp.data.build_lock import STOPPED_S, Stopped, build_lock
from flexsp.data.catalog import Catalog, check_unchanged
from flexsp.data.encode import Encoder
from flexsp.data.options import ERROR, SKIP, DataOptions
from flexsp.data.rows import NOT_BROKEN, Reason
from flexsp.data.shards import Shard, ShardWriter, open_shard
from flexsp.data.sources import Piece, Source, find_source
from flexsp.track import Track, silent
from flexsp.workers import end_with_parent

log = logging.getLogger(__name__)

FORMAT = "flexsp-store/2"
"""Another one makes other shards of the same files."""
SHARDS, BUILDING, LOCKS = "shards", "building", "locks"
HEAD_START_S = 1.0
LOOK_S = 1.0
"""How often workers are looked at, whether they are stopped."""
SAY_S = 5.0
"""How often a build says how far it is, where there is no bar."""


@dataclass(frozen=True)
class Recipe:
    """What a store is made of and how: all that a worker must know."""

    source_name: str
    options: DataOptions
    model_path: str = ""

    @property
    def cache(self) -> Path:
        return Path(os.path.expanduser(self.options.cache_dir))

    @cached_property
    def source(self) -> Source:
        return find_source(self.source_name, self.options)

    @cached_property
    def encoder(self) -> Encoder:
        return self.source.encoder(self.options, self.model_path)

    @property
    def key(self) -> str:
        """A digest of all but the source's content that decides which shards are made, and which rows are errors."""
        text = json.dumps([FORMAT, self.encoder.key, asdict(self.options)], default=str)
        return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()

    def folder(self, piece: Piece) -> Path:
        """Where the shard of a piece lies."""
        key = hashlib.sha256(json.dumps([FORMAT, self.encoder.key, piece.content]).encode()).hexdigest()
        return self.cache / SHARDS / key[:2] / key

    def make(self, piece: Piece, part: Path) -> None:
        """Writes the shard of a piece, by way of the folder `part`.

        Raises:
            ValueError: a file cannot be read or has changed, or the shard cannot be written.
        """
        with ShardWriter(part) as writer:
            for rows in self.source.read(piece, self.encoder.columns):
                writer.add(self.encoder.encode(rows))
            for file, stat in zip(piece.files, piece.stats, strict=True):
                check_unchanged(self.source, file, stat)
            writer.finish(self.folder(piece))


@dataclass(frozen=True)
class Built:
    """The shards of a source, in order."""

    pieces: Sequence[Piece]
    shards: Sequence[Shard]
    num_made: int
    """By this call; the others were there."""


def built(recipe: Recipe, track: Track = silent, patient: bool = False) -> Built:
    """All shards of a source, after those that are missing are made.

    Args:
        recipe: the source and how it is read.
        track: shows progress.
        patient: leaves it to another process to build, if there is one that begins now.

    Raises:
        ValueError: a file cannot be read, a row is broken where that is an error, a worker died, or the cache cannot be
            written.
        BuilderStoppedError: the process that builds, on this machine, has been stopped for long.
    """
    try:
        catalog = Catalog(recipe.source, recipe.cache)
        if (found := _opened(recipe, catalog.known())) is not None:
            if _checked(found):
                return found
            if not os.access(recipe.cache, os.W_OK):  # each rank would read it all, at each start
                log.warning("data: %s cannot be written: its tokens are not compared with their digests", recipe.cache)
                return found
        if patient:
            time.sleep(HEAD_START_S)
        with build_lock(recipe.cache / LOCKS / catalog.name, recipe.key):
            if (found := _opened(recipe, catalog.known())) is not None and _checked(found):
                return found
            return _build(recipe, catalog, track)
    except OSError as error:  # of the sources' files it would be a ValueError
        raise ValueError(
            f"data.cache_dir={recipe.options.cache_dir!r}: cannot be written ({error.strerror or error}); free some "
            f"room or give another folder; a start goes on where this one was"
        ) from None


def check_rows(recipe: Recipe, piece: Piece, shard: Shard) -> None:
    """
    Raises:
        ValueError: a row of the shard is broken or empty, and the options make that an error.
    """
    found: list[tuple[int, str]] = []
    for reason, left_out in shard.left_out.items():
        key, rule = "on_broken", recipe.options.on_broken
        if reason in NOT_BROKEN:
            key, rule = "on_empty", recipe.options.on_empty if reason == Reason.EMPTY else SKIP
        if rule == ERROR:
            found += [(row, f"{text}; or set data.{key}='skip' to leave such rows out") for row, text in left_out.first]
    if found:
        row, text = min(found)
        raise ValueError(f"{recipe.source.describe(piece, row)}: {text}")


def _opened(recipe: Recipe, pieces: Sequence[Piece] | None) -> Built | None:
    """What there is; None where something is missing."""
    if pieces is None:
        return None
    shards = []
    for piece in pieces:
        shard = open_shard(recipe.folder(piece))
        if shard is None:
            return None
        check_rows(recipe, piece, shard)
        shards.append(shard)
    return Built(pieces, shards, 0)


def _checked(found: Built) -> bool:
    """Whether the tokens of all shards are known to be as they were written."""
    return all(shard.is_checked() for shard in found.shards)


def _build(recipe: Recipe, catalog: Catalog, track: Track) -> Built:
    """With the lock held."""
    began_s = said_s = time.monotonic()
    aside = recipe.cache / BUILDING / catalog.name
    if aside.exists():  # of a build that was killed
        shutil.rmtree(aside)
    pieces = catalog.renewed(track)
    missing = _missing(recipe, pieces, track)
    if missing:
        log.info("data: %s: tokenizing %d of %d shards", recipe.source.name, len(missing), len(pieces))
    num_made = 0
    with _makers(recipe, aside, missing) as made:
        for piece, say in track(missing, "tokenizing"):
            next(made)
            num_made += 1
            shard = open_shard(recipe.folder(piece))
            assert shard is not None, piece
            check_rows(recipe, piece, shard)
            if time.monotonic() > said_s + SAY_S:
                said_s = time.monotonic()
                say(f"{said_s - began_s:.0f} s")
    found = _opened(recipe, pieces)
    assert found is not None
    if aside.exists():
        aside.rmdir()
    if missing:
        log.info("data: %s: tokenized in %.1f s into %s", recipe.source.name, time.monotonic() - began_s, recipe.cache)
    return Built(found.pieces, found.shards, num_made)


def _missing(recipe: Recipe, pieces: Sequence[Piece], track: Track) -> list[Piece]:
    """The pieces without a whole shard, equal ones once; damaged shards are removed."""
    missing: dict[Path, Piece] = {}
    unchecked: dict[Path, tuple[Piece, Shard]] = {}

    def damaged(folder: Path, piece: Piece) -> None:
        log.warning("data: %s is damaged and is made anew", folder)
        shutil.rmtree(folder)
        missing[folder] = piece

    for piece in pieces:
        folder = recipe.folder(piece)
        shard = open_shard(folder)
        if shard is not None:
            check_rows(recipe, piece, shard)
            if not shard.is_checked():
                unchecked[folder] = piece, shard
        elif folder.exists():
            damaged(folder, piece)
        else:
            missing.setdefault(folder, piece)
    if unchecked:
        log.info("data: %s: comparing %d shards with their digests", recipe.source.name, len(unchecked))
    said_s = began_s = time.monotonic()
    for (folder, (piece, shard)), say in track(list(unchecked.items()), "comparing"):
        if not shard.check():
            damaged(folder, piece)
        if time.monotonic() > said_s + SAY_S:
            said_s = time.monotonic()
            say(f"{said_s - began_s:.0f} s")
    return list(missing.values())


@contextmanager
def _makers(recipe: Recipe, aside: Path, missing: Sequence[Piece]) -> Iterator[Iterator[None]]:
    """An iterator of which every step is one more shard that is there, in order."""
    parts = [aside / str(index) for index in range(len(missing))]
    workers = min(recipe.options.workers, len(missing))
    if workers == 0:
        yield map(recipe.make, missing, parts)
        return
    # workers are started afresh: a rank has threads, and a device that a fork would share
    context = multiprocessing.get_context("spawn")
    arguments = recipe.source_name, recipe.options, recipe.model_path
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(workers, context, initializer=_begin_worker, initargs=arguments) as pool:
        try:
            futures = [pool.submit(_make, *each) for each in zip(missing, parts, strict=True)]
            yield _results(futures, set(multiprocessing.active_children()) - others)
        except BrokenProcessPool:
            raise ValueError(
                f"data.workers={recipe.options.workers}: a worker died (killed, or out of memory); what it had done is "
                f"kept: start again to go on there, with fewer workers if memory is short"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


def _results(futures: Sequence[Future[None]], workers: set[BaseProcess]) -> Iterator[None]:
    """The results in order. A worker that has been stopped for long is killed, which breaks the pool."""
    stopped = Stopped()
    for future in futures:
        while not wait([future], timeout=LOOK_S).done:
            for worker in workers:
                if worker.is_alive() and worker.pid is not None and stopped.for_long(worker.pid):
                    log.warning("data: worker %d has been stopped for %.0f s: killed", worker.pid, STOPPED_S)
                    worker.kill()
        yield future.result()


_recipe: Recipe
"""Of a worker's process."""


def _begin_worker(source_name: str, options: DataOptions, model_path: str) -> None:
    global _recipe
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there are as many workers as there shall be threads
    end_with_parent()
    _recipe = Recipe(source_name, options, model_path)


def _make(piece: Piece, part: Path) -> None:
    _recipe.make(piece, part)
