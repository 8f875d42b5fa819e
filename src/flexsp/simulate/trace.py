"""A step as a trace for Perfetto (https://ui.perfetto.dev) and chrome://tracing.

A node is a process, a rank a thread. On each rank complete events ("ph": "X") follow each other without gap or overlap
from the beginning of the step to its end: the fixed cost of a micro-batch, compute, exchange, idle. Times are whole
microseconds: both viewers nest events that overlap, and must not find an overlap where there is but rounding.

Format: "Trace Event Format", https://docs.google.com/document/d/1CvAClvFfyA5R-PhYUmn5OOQtYMH4h6I0nSsKchNAySU.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from flexsp.lengths import LengthArray
from flexsp.simulate.timeline import MicroBatchSpan, Span, Timeline

SUFFIXES = (".json", ".json.gz")


def chrome_trace(timeline: Timeline, lengths: LengthArray, name: str) -> dict[str, Any]:
    """The trace of one plan for a global batch of (K,) `lengths` in tokens; `name` is what its processes are called."""
    return chrome_traces({name: timeline}, lengths)


def chrome_traces(timelines: Mapping[str, Timeline], lengths: LengthArray) -> dict[str, Any]:
    """Several plans for the same (K,) `lengths` (tokens) in one trace, all beginning at 0.

    Each plan has processes of its own, below those of the plans before it. What a group holds is told at its compute on
    each of its ranks, the tokens of each sequence at its first rank alone, so that a trace grows with ranks and with
    sequences, not with both.
    """
    ranks = max((timeline.num_devices for timeline in timelines.values()), default=0)
    nodes = sum(_nodes(timeline) for timeline in timelines.values())
    # A thread whose number is its process's would be taken for its main thread and shown first: threads are numbered
    # above all processes, from a power of ten on, so that their last digits are the rank.
    stride = 10 ** len(str(max(ranks, nodes + 1)))
    letters = _letters(span.sp_degree for timeline in timelines.values() for span in timeline.spans)
    events: list[dict[str, Any]] = []
    first_process = 1
    for place, (name, timeline) in enumerate(timelines.items(), start=1):
        where = [
            {"pid": first_process + rank // timeline.devices_per_node, "tid": place * stride + rank}
            for rank in range(timeline.num_devices)
        ]
        events += _names(" ".join(name.split()), timeline, where)
        for b, micro_batch in enumerate(timeline.micro_batches):
            events += _micro_batch(b, micro_batch, lengths, where, letters)
        first_process += _nodes(timeline)
    return {
        "traceEvents": events,
        "displayTimeUnit": "ms",
        "otherData": {name: {"step_s": timeline.step_s} for name, timeline in timelines.items()},
    }


def save(trace: Mapping[str, Any], path: str | Path) -> None:
    """Writes a trace as JSON, one event a line, or packed with gzip where `path` ends so; both viewers open either.

    Raises:
        ValueError: another suffix, or `path` cannot be written.
    """
    path = Path(path)
    if not path.name.lower().endswith(SUFFIXES):
        raise ValueError(f"{path}: the name must end in {' or '.join(SUFFIXES)}; name the trace so")
    rest = {key: value for key, value in trace.items() if key != "traceEvents"}
    events = ",\n".join(json.dumps(event, separators=(",", ":"), allow_nan=False) for event in trace["traceEvents"])
    text = f'{{"traceEvents":[\n{events}\n],\n{json.dumps(rest, allow_nan=False)[1:]}\n'
    data = text.encode()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # without the time, so that the same trace is the same file
        path.write_bytes(gzip.compress(data, mtime=0) if path.suffix.lower() == ".gz" else data)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror}); give a path in a writable folder") from None


def _nodes(timeline: Timeline) -> int:
    return -(-timeline.num_devices // timeline.devices_per_node)


def _names(name: str, timeline: Timeline, where: Sequence[Mapping[str, int]]) -> Iterator[dict[str, Any]]:
    """Metadata events: what processes and threads are called, and their order."""
    for rank, place in enumerate(where):
        if rank % timeline.devices_per_node == 0:
            last = min(rank + timeline.devices_per_node, timeline.num_devices) - 1
            node = f"{name}: node {rank // timeline.devices_per_node} (ranks {rank}-{last})"
            yield _metadata("process_name", {"name": node}, place)
            yield _metadata("process_sort_index", {"sort_index": place["pid"]}, place)
        yield _metadata("thread_name", {"name": f"rank {rank}"}, place)
        yield _metadata("thread_sort_index", {"sort_index": rank}, place)


def _metadata(name: str, args: dict[str, Any], place: Mapping[str, int]) -> dict[str, Any]:
    return {"name": name, "ph": "M", "ts": 0, **place, "args": args}


def _micro_batch(
    b: int,
    micro_batch: MicroBatchSpan,
    lengths: LengthArray,
    where: Sequence[Mapping[str, int]],
    letters: Mapping[int, str],
) -> Iterator[dict[str, Any]]:
    """The events of micro-batch `b`.

    Beginnings and ends are rounded, not durations: what ends where another begins still does. What ends with the
    micro-batch takes its end, which the sum of a group's own parts can miss by a rounding.
    """
    brief = {"micro_batch": b, "policy": micro_batch.policy}
    groups_us, end_us = _microseconds(micro_batch.begin_s + micro_batch.fixed_s), _microseconds(micro_batch.end_s)
    for place in where:
        yield from _event("fixed cost", "fixed", _microseconds(micro_batch.begin_s), groups_us, place, brief)
    for rank in micro_batch.idle_ranks:
        yield from _event("idle", "idle", groups_us, end_us, where[rank], brief)
    for span in micro_batch.groups:
        degree = f"sp {span.sp_degree} ({letters[span.sp_degree]})"
        done_us = min(_microseconds(span.end_s), end_us) if span.idle_s else end_us
        computed_us = min(_microseconds(span.begin_s + span.compute_s), done_us) if span.exchange_s else done_us
        inside = {"micro_batch": b, "sp_degree": span.sp_degree, "ranks": f"{span.ranks[0]}-{span.ranks[-1]}"}
        for rank in span.ranks:
            held = {**inside, **_held(span, micro_batch.policy, lengths, first=rank == span.ranks[0])}
            yield from _event(f"compute {degree}", "compute", groups_us, computed_us, where[rank], held)
            yield from _event(f"exchange {degree}", "exchange", computed_us, done_us, where[rank], inside)
            yield from _event("idle", "idle", done_us, end_us, where[rank], brief)


def _held(span: Span, policy: str | None, lengths: LengthArray, first: bool) -> dict[str, Any]:
    held: dict[str, Any] = {
        "sequences": len(span.sequences),
        "tokens": span.tokens,
        "longest_tokens": span.longest_tokens,
        "memory_bytes": round(span.memory_bytes),
        "policy": policy,
    }
    if first:
        held["tokens_of_sequence"] = {str(sequence): int(lengths[sequence]) for sequence in span.sequences}
    return held


def _event(
    name: str, category: str, begin_us: int, end_us: int, place: Mapping[str, int], args: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """One complete event, or none where it takes less than a microsecond."""
    if end_us > begin_us:
        yield {
            "name": name,
            "cat": category,
            "ph": "X",
            "ts": begin_us,
            "dur": end_us - begin_us,
            **place,
            "args": args,
        }


def _microseconds(seconds: float) -> int:
    return round(seconds * 1e6)


def _letters(degrees: Iterable[int]) -> dict[int, str]:
    """A letter for each degree: Perfetto colours events by their names without digits."""
    return {degree: chr(ord("a") + index % 26) for index, degree in enumerate(sorted(set(degrees)))}
