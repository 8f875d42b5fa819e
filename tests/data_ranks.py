"""What tests/test_store.py runs in other processes."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from flexsp.data import DataOptions, formats, indexing, open_corpus, shards

PART_BYTES = 2000
BEGIN = indexing._begin_worker


def begin_deadly_worker(source: str, options: DataOptions, model_path: str, ends_by: int = signal.SIGKILL) -> None:
    """A worker that is killed at its third shard."""
    BEGIN(source, options, model_path)
    make, made = indexing._recipe.make, []

    def deadly(piece: Any, part: Path) -> None:
        made.append(piece)
        if len(made) == 3:
            os.kill(os.getpid(), ends_by)
        make(piece, part)

    object.__setattr__(indexing._recipe, "make", deadly)


def begin_stopped_worker(source: str, options: DataOptions, model_path: str) -> None:
    """A worker that is stopped at its third shard."""
    begin_deadly_worker(source, options, model_path, signal.SIGSTOP)


def begin_slow_worker(source: str, options: DataOptions, model_path: str) -> None:
    BEGIN(source, options, model_path)
    finish = shards.ShardWriter.finish

    def slow(self: Any, folder: Path) -> None:
        finish(self, folder)
        time.sleep(1.0)

    shards.ShardWriter.finish = slow


def opened_by_rank(source: str, cache: str, by_rank: bool = False) -> tuple[str, int, str]:
    """Fingerprint, shards made, error; `by_rank`: each rank has a source and a cache of its own."""
    from flexsp.train.config import parse_config
    from flexsp.train.run_data import open_on_all_ranks

    formats.PART_BYTES = PART_BYTES
    if by_rank:
        source, cache = f"{source}/{dist.get_rank()}.jsonl", f"{cache}/{dist.get_rank()}"
    config = parse_config(
        {"model": {"config": {"model_type": "llama"}}, "data": {"source": source, "cache_dir": cache}}
    )
    try:
        corpus = open_on_all_ranks(config)
    except ValueError as error:
        return "", 0, str(error)
    return corpus.fingerprint, corpus.num_made, ""


def main() -> None:
    """Opens a source slowly, by workers, and says what came of it; what it logs goes to standard error."""
    import logging

    logging.basicConfig(level=logging.INFO)
    formats.PART_BYTES = PART_BYTES
    source, cache, workers = sys.argv[1:]
    import data_ranks  # by a name that workers can import too

    indexing._begin_worker = data_ranks.begin_slow_worker
    corpus = open_corpus(source, DataOptions(cache_dir=cache, workers=int(workers)))
    print(json.dumps([corpus.fingerprint, corpus.num_made]))


if __name__ == "__main__":
    main()
