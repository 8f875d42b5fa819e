"""Proofs from a run's logs, by code that shares nothing with flexsp: files of JSON lines in, verdicts out.

The lineage that survives is the last row of each step (docs/reliability.md). A row that a kill tore is no row.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class Log:
    """One of a run's logs."""

    lineage: dict[int, dict[str, Any]]
    """By step, the last row."""
    steps: list[int]
    """Of every row, in the order of the file."""
    torn: int
    """Lines that are no whole row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Once:
    """What a log of sequence ids proves."""

    epochs: int
    """Complete ones: every sequence was trained exactly once in each."""
    sequences: int
    """Of an epoch."""
    beyond: int
    """Sequences of the epoch that the last step left unfinished: each once at the most."""


def read_log(path: Path) -> Log:
    lineage: dict[int, dict[str, Any]] = {}
    steps, torn = [], 0
    for line in path.read_bytes().split(b"\n"):
        try:
            row = json.loads(line)
            step = row["step"]
        except (ValueError, KeyError, TypeError):
            torn += bool(line)
            continue
        lineage[step] = row
        steps.append(step)
    return Log(lineage=lineage, steps=steps, torn=torn)


def trained_once(log: Log, steps: int, num_sequences: int) -> Once:
    """Proves from sequences.jsonl that the lineage trained every sequence of each complete epoch exactly once.

    Epochs follow one another through the steps without a gap, so an epoch is the next `num_sequences` ids, in whatever
    order; ids are 0 .. num_sequences - 1.

    Raises:
        AssertionError: a step is missing or there is one too many; an id is missing, twice, or unknown.
    """
    expected = set(range(steps))
    if missing := expected - set(log.lineage):
        raise AssertionError(f"{len(missing)} of {steps} steps have no row, the first is {min(missing)}")
    if more := set(log.lineage) - expected:
        raise AssertionError(f"step {min(more)} is beyond the {steps} of the run")
    trained = [(step, i) for step in range(steps) for i in log.lineage[step]["ids"]]
    everything = set(range(num_sequences))
    for begin in range(0, len(trained), num_sequences):
        epoch, seen = begin // num_sequences, set()
        for step, i in trained[begin : begin + num_sequences]:
            if i not in everything:
                raise AssertionError(f"step {step}: id {i} is none of the {num_sequences} sequences")
            if i in seen:
                raise AssertionError(f"epoch {epoch}: sequence {i} is trained twice, the second time in step {step}")
            seen.add(i)
    epochs, beyond = divmod(len(trained), num_sequences)
    return Once(epochs=epochs, sequences=num_sequences, beyond=beyond)


def worst_difference(log: Log, other: Log, key: str = "loss") -> float:
    """The largest difference of two lineages in a metric, over all steps.

    Raises:
        AssertionError: they have other steps.
    """
    if set(log.lineage) != set(other.lineage):
        raise AssertionError(f"{len(log.lineage)} steps against {len(other.lineage)}")
    return max(abs(row[key] - other.lineage[step][key]) for step, row in log.lineage.items())


def begins_at(log: Log, rows_before: int) -> int | None:
    """The first step of the rows beyond `rows_before`, which must follow one another; None where there are none.

    Raises:
        AssertionError: a step is left out or done twice by one start.
    """
    added = log.steps[rows_before:]
    if not added:
        return None
    if added != list(range(added[0], added[0] + len(added))):
        raise AssertionError(f"one start wrote steps {added}")
    return added[0]
