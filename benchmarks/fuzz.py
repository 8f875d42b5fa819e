"""Bad input, tried by machine: every kind of file and flag, as many inputs as wanted, counted by how they ended.

    python benchmarks/fuzz.py [--inputs 20000] [--seed 0] [--only profile,plan] [--time-limit-s 60] [--jobs 2]
    python benchmarks/fuzz.py --only plan --seed 0 --begin 1234 --inputs 1      # one input again

`--inputs` is for each kind; a checkpoint takes a fiftieth of them, since each is a folder that is loaded. The mutators
and what must hold are in tests/fuzzing. Exit status 1 where an input failed; it is kept in runs/fuzz/failed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import flexsp  # noqa: E402
from flexsp import jsonfields  # noqa: E402
from fuzzing.runner import TIME_LIMIT_S, Count, run_kind  # noqa: E402
from fuzzing.worker import KINDS, ROOM_BYTES  # noqa: E402

SHARES = {"checkpoint": 50, "config": 2}
"""Kinds of which fewer are tried, because each takes longer."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=20_000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--begin", type=int, default=0, help="index of the first input")
    parser.add_argument("--only", help="kinds, with commas between: " + ", ".join(KINDS))
    parser.add_argument("--time-limit-s", type=float, default=TIME_LIMIT_S, help="for one input")
    parser.add_argument("--jobs", type=int, default=2, help="kinds tried at once")
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/fuzz"), help="where inputs lie, and those that failed"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks/results/fuzz.json")
    arguments = parser.parse_args()
    kinds = list(KINDS) if arguments.only is None else [name.strip() for name in arguments.only.split(",")]
    if unknown := sorted(set(kinds) - set(KINDS)):
        parser.error(f"--only={unknown[0]} is unknown; choose of {', '.join(KINDS)}")
    counts: dict[str, Any] = {}
    failures: list[dict[str, object]] = []
    print(f"{'kind':12} {'tried':>8} {'refused':>8} {'accepted':>8} {'failed':>8} {'slowest':>8} {'s':>8}")

    def tried(kind: str) -> tuple[Count, float]:
        begun = time.monotonic()
        inputs = max(1, arguments.inputs // SHARES.get(kind, 1))
        count = run_kind(
            kind, inputs, arguments.seed, arguments.folder.resolve(),
            begin=arguments.begin, limit_s=arguments.time_limit_s, tell=lambda line: print(line[:600], file=sys.stderr),
        )  # fmt: skip
        return count, round(time.monotonic() - begun, 1)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        for kind, (count, seconds) in zip(kinds, pool.map(tried, kinds), strict=True):
            failures += count.failures
            counts[kind] = {
                "tried": count.tried, "refused": count.refused, "accepted": count.accepted,
                "failed": len(count.failures), "slowest_s": count.slowest_s, "seconds": seconds,
            }  # fmt: skip
            print(f"  the slowest: {count.slowest}"[:200], file=sys.stderr)
            print(f"{kind:12} {' '.join(f'{value:>8}' for value in counts[kind].values())}", flush=True)
    if arguments.only is None:
        jsonfields.write_object(arguments.output, _document(arguments, counts, failures))
    return 1 if failures else 0


def _document(
    arguments: argparse.Namespace, counts: dict[str, Any], failures: list[dict[str, object]]
) -> dict[str, Any]:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    names = ("numpy", "pyarrow", "torch", "transformers")
    return {
        "format": "flexsp-fuzz/1",
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "python": platform.python_version(),
        "versions": {"flexsp": flexsp.__version__, **{name: version(name) for name in names}},
        "commit": commit,
        "seed": arguments.seed,
        "time_limit_s": arguments.time_limit_s,
        "room_bytes": ROOM_BYTES,
        "tried": sum(count["tried"] for count in counts.values()),
        "kinds": counts,
        "failures": [{key: failure.get(key) for key in ("kind", "index", "failed", "place")} for failure in failures],
    }


if __name__ == "__main__":
    sys.exit(main())
