"""Which keys some queries of a run see: a run cut into chunks of queries, each with the keys that it needs.

A causal run of 6 tokens with a window of 3, in chunks of 2 queries; x is seen, . is in the chunk and masked:

    keys        0 1 2 3 4 5
    query 0     x .
    query 1     x x
    query 2     x x x .
    query 3     . x x x
    query 4         x x x .
    query 5         . x x x
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from flexsp.parallel.kernels.kernel import Block, Scores

QUERIES = 128
"""Queries of a chunk: few, so that little is computed that causality and windows mask; enough for matrix products."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive queries, and consecutive keys among which are all that they see."""

    queries: slice
    """Rows of the packed queries."""
    keys: slice
    """Rows of the packed keys."""
    seen: Tensor | None
    """(queries, keys) bool, or None where every query sees every key."""


def cutting_window(block: Block, scores: Scores) -> int | None:
    """The window if it takes a key from any query of a block that goes by index, or may, by positions; else None."""
    if scores.window is None or block.by_positions:
        return scores.window
    assert block.sizes_q == block.sizes_k, "a window by index needs the same runs of queries and keys"
    return scores.window if scores.window < max(block.sizes_k, default=0) else None


def chunks(block: Block, scores: Scores, elements: int) -> Iterator[Chunk]:
    """The chunks of every run that has queries and keys; queries that see no key may be left out.

    Args:
        block: who meets whom.
        scores: its window.
        elements: a chunk has at most so many pairs of query and key, or one query where that sees more keys.
    """
    window = cutting_window(block, scores)
    for queries, keys in block.runs():
        num_keys = keys.stop - keys.start
        if window is not None and block.causal and not block.by_positions:
            num_keys = min(num_keys, QUERIES + window - 1)
        step = max(1, min(QUERIES, elements // num_keys))
        for first in range(queries.start, queries.stop, step):
            chunk = slice(first, min(first + step, queries.stop))
            if block.by_positions:
                yield from _by_positions(block, chunk, keys, window)
            else:
                yield _by_index(block, queries.start, chunk, keys, window)


def _by_index(block: Block, run_start: int, chunk: slice, keys: slice, window: int | None) -> Chunk:
    first, end = chunk.start - run_start, chunk.stop - run_start  # in the run
    num_keys = keys.stop - keys.start
    least = 0 if window is None else max(0, first - window + 1)
    most = min(end, num_keys) if block.causal else num_keys
    visible = slice(keys.start + least, keys.start + most)
    masked = (block.causal and end - first > 1) or (window is not None and end - 1 - least >= window)
    if not masked:
        return Chunk(chunk, visible, None)
    device = block.cu_seqlens_q.device
    seen = _seen(
        torch.arange(first, end, device=device), torch.arange(least, most, device=device), block.causal, window
    )
    return Chunk(chunk, visible, seen)


def _by_positions(block: Block, chunk: slice, keys: slice, window: int | None) -> Iterator[Chunk]:
    assert block.positions_q is not None and block.positions_k is not None
    seen = _seen(block.positions_q[chunk], block.positions_k[keys], block.causal, window)
    if seen.device.type == "cpu":  # elsewhere looking would wait for the device
        columns = seen.any(0).nonzero()
        if len(columns) == 0:
            return
        first, end = int(columns[0]), int(columns[-1]) + 1
        keys, seen = slice(keys.start + first, keys.start + end), seen[:, first:end]
        if bool(seen.all()):
            yield Chunk(chunk, keys, None)
            return
    yield Chunk(chunk, keys, seen)


def _seen(positions_q: Tensor, positions_k: Tensor, causal: bool, window: int | None) -> Tensor:
    behind = positions_q[:, None] - positions_k[None, :]  # how far a key is before a query
    seen = behind >= 0 if causal else torch.ones_like(behind, dtype=torch.bool)
    return seen if window is None else seen & (behind < window)
