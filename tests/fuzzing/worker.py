"""The process that tries inputs of one kind: `python -m fuzzing.worker KIND SEED BEGIN END FOLDER TIME_LIMIT_S`.
KIND is a key of `KINDS`, or module:class.

It writes a JSON line before and after each input. A worker that says nothing more has died of the input that it began:
of a signal, of the time limit (which writes where it stood and ends the process), or of memory.
"""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import resource
import shutil
import sys
import time
import traceback
import warnings
from pathlib import Path
from random import Random

KINDS = {
    "profile": ("fuzzing.kinds_documents", "ProfileKind"),
    "plan": ("fuzzing.kinds_documents", "PlanKind"),
    "plan log": ("fuzzing.kinds_documents", "PlanLogKind"),
    "lengths": ("fuzzing.kinds_lengths", "LengthsKind"),
    "cluster": ("fuzzing.kinds_settings", "ClusterKind"),
    "model": ("fuzzing.kinds_settings", "ModelKind"),
    "config": ("fuzzing.kinds_settings", "ConfigKind"),
    "flags": ("fuzzing.kinds_flags", "FlagsKind"),
    "corpus": ("fuzzing.kinds_runs", "CorpusKind"),
    "run folder": ("fuzzing.kinds_runs", "RunFolderKind"),
    "checkpoint": ("fuzzing.kinds_runs", "CheckpointKind"),
}
"""Where the class of each kind is. Those from `flags` on need torch."""
ROOM_BYTES = 3 << 30
"""That a worker may take beyond what it holds when it begins: a file that says 10^18 lengths ends in MemoryError."""


def main(kind: str, seed: int, begin: int, end: int, folder: Path, limit_s: float) -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)  # what a library prints by itself
    os.chdir(folder)
    module, name = KINDS[kind] if kind in KINDS else kind.split(":")
    tried_of = getattr(importlib.import_module(module), name)(folder)
    warnings.simplefilter("ignore")
    held = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_DATA, (held + ROOM_BYTES, resource.RLIM_INFINITY))
    stood = open(folder / "stood.txt", "w")
    faulthandler.enable(file=stood)
    for index in range(begin, end):
        answers.write(json.dumps({"begin": index}) + "\n")
        faulthandler.dump_traceback_later(limit_s, exit=True, file=stood)
        answer: dict[str, object] = {"index": index}
        began_s = time.monotonic()
        try:
            tried = tried_of.try_one(Random(f"{kind}/{seed}/{index}"))
            answer |= {"accepted": tried.accepted, "what": tried.what}
        except BaseException as error:
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(last.filename).name}:{last.lineno}"
            answer |= {"failed": f"{type(error).__name__}: {error}"[:1500], "place": place}
            answer["trace"] = traceback.format_exc()[-3000:]
            keep(folder, kind, seed, index)
        faulthandler.cancel_dump_traceback_later()
        answer["seconds"] = round(time.monotonic() - began_s, 3)
        answers.write(json.dumps(answer) + "\n")


def slug(kind: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in kind)


def keep(folder: Path, kind: str, seed: int, index: int) -> Path:
    """Copies what an input was made of to where it stays."""
    kept = folder.parent / "failed" / f"{slug(kind)}-{seed}-{index}"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(folder, kept, ignore=shutil.ignore_patterns("keep"))
    return kept


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), Path(sys.argv[5]), float(sys.argv[6]))
