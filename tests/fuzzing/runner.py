"""Starts workers, counts how inputs ended, keeps what failed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import flexsp
from fuzzing.worker import keep, slug

TIME_LIMIT_S = 60.0
"""For one input, on a machine with other work; most take a few milliseconds."""
MOST_DEATHS = 20
"""Of a kind's worker, after which the rest of its inputs is left out, and counted as a failure."""


@dataclass
class Count:
    """How the inputs of a kind ended."""

    tried: int = 0
    refused: int = 0
    accepted: int = 0
    slowest_s: float = 0.0
    slowest: str = ""
    """Index of the input that took longest, and what was changed."""
    failures: list[dict[str, object]] = field(default_factory=list)


def run_kind(
    kind: str,
    inputs: int,
    seed: int,
    folder: Path,
    *,
    begin: int = 0,
    limit_s: float = TIME_LIMIT_S,
    tell: Callable[[str], None] = lambda line: None,
) -> Count:
    """Tries inputs `begin` to `begin + inputs` of a kind.

    Args:
        kind: a key of `worker.KINDS`.
        inputs: how many.
        seed: of the inputs.
        folder: for them; those that failed stay in `failed/KIND-SEED-INDEX`.
        begin: the first one's index.
        limit_s: seconds for one input.
        tell: is told of each failure.
    """
    count, at, deaths = Count(), begin, 0
    work = folder / slug(kind)
    while at < begin + inputs and deaths < MOST_DEATHS:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        with _start(kind, seed, at, begin + inputs, work, limit_s) as child:
            begun, at = _counted(child, count, at, kind, seed, folder, tell)
            assert child.stderr is not None
            errors = child.stderr.read()
        status = child.returncode
        if begun is None and at < begin + inputs:
            raise RuntimeError(f"the worker of {kind} ended with {status} before an input: {errors[-3000:]}")
        if begun is not None:
            deaths += 1
            stood = (work / "stood.txt").read_text()
            count.tried += 1
            why = "took too long" if stood.startswith("Timeout") else f"the process ended with {status}"
            keep(work, kind, seed, begun)
            answer = {"index": begun, "failed": why, "place": "", "trace": stood[:3000] or errors[-3000:]}
            _note(count, answer, kind, seed, folder, tell)
            at = begun + 1
    if at < begin + inputs:
        count.failures.append({"kind": kind, "index": at, "failed": f"given up after {deaths} deaths", "place": ""})
    return count


def _counted(
    child: subprocess.Popen[str],
    count: Count,
    at: int,
    kind: str,
    seed: int,
    folder: Path,
    tell: Callable[[str], None],
) -> tuple[int | None, int]:
    """Counts what a worker says until it ends: the input that it died of, if any, and the next one."""
    begun = None
    assert child.stdout is not None
    for line in child.stdout:
        answer = json.loads(line)
        if "begin" in answer:
            begun = answer["begin"]
            continue
        at, begun = answer["index"] + 1, None
        count.tried += 1
        if answer["seconds"] > count.slowest_s:
            count.slowest_s, count.slowest = answer["seconds"], f"{answer['index']}: {answer.get('what', '')}"
        if "failed" in answer:
            _note(count, answer, kind, seed, folder, tell)
        elif answer["accepted"]:
            count.accepted += 1
        else:
            count.refused += 1
    return begun, at


def _start(kind: str, seed: int, begin: int, end: int, work: Path, limit_s: float) -> subprocess.Popen[str]:
    tests, source = Path(__file__).parent.parent, Path(flexsp.__file__).parent.parent
    command = [sys.executable, "-m", "fuzzing.worker", kind, str(seed), str(begin), str(end), str(work), str(limit_s)]
    path = os.pathsep.join((str(tests), str(source)))
    # torch and arrow would start a thread for each core; numpy and matplotlib look for a home
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    return subprocess.Popen(
        command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def _note(
    count: Count, answer: dict[str, object], kind: str, seed: int, folder: Path, tell: Callable[[str], None]
) -> None:
    name = f"{slug(kind)}-{seed}-{answer['index']}"
    failure: dict[str, object] = {"kind": kind, "seed": seed, **answer}
    count.failures.append(failure)
    (folder / "failed" / name / "failure.json").write_text(json.dumps(failure, indent=1))
    tell(f"{name}: {answer['failed']} {answer['place']}")
