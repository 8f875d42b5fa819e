"""Does a long run grow? Two thousand steps with changing plans; what every process holds is watched from outside.

    python benchmarks/soak.py [--steps 2000] [--out FILE.json] [--figure FILE.png]
    python benchmarks/soak.py --draw FILE.json --figure FILE.png

A real `torchrun -m flexsp train` on four gloo ranks: a tiny model, lengths of a wide spread, degrees 1, 2, 3 and 4
mixed, corrections on, checkpoints, no evaluation. Once a second /proc says what the ranks, the planner's process and
torchrun hold. The rules were stated before the first run (soak_verdict.py); where one does not hold the script exits
with 1.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kills_ranks import MARK, ByTorchrun, kill
from processes import command, descendants, environment, held, marked, provenance
from soak_verdict import Series, communicator_bound, verdict

WORLD_SIZE, BATCH, SEQUENCES, LONGEST = 4, 16, 1200, 1024
CHECKPOINT_EVERY = 250
INTERVAL_S = 1.0
KEPT = 250
"""Samples in the result."""
CONFIG = f"""
[model]
config = {{ model_type = "llama", vocab_size = 256, hidden_size = 48, intermediate_size = 96, num_hidden_layers = 2, num_attention_heads = 12, num_key_value_heads = 12, max_position_embeddings = 1024 }}
[data]
source = "rows.jsonl"
cache_dir = "data"
max_length = {LONGEST}
[planner]
profile_dir = "profiles"
max_tokens_per_rank = 400
sp_degrees = [1, 2, 3, 4]
[train]
batch_size = {BATCH}
lr = 1e-3
[checkpoint]
every = {CHECKPOINT_EVERY}
[run]
dir = "out"
save_model = false
"""  # noqa: E501


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--folder", help="for the run; default: a temporary one")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "soak.json"))
    parser.add_argument("--figure", default=str(Path(__file__).parents[1] / "docs" / "figures" / "soak.png"))
    parser.add_argument("--draw", metavar="FILE.json", help="draw the figure of a result, and run nothing")
    arguments = parser.parse_args()
    if arguments.draw:
        result = json.loads(Path(arguments.draw).read_text(encoding="utf-8"))
    else:
        folder = Path(arguments.folder or tempfile.mkdtemp(prefix="soak-"))
        folder.mkdir(parents=True, exist_ok=True)
        result = soaked(folder, arguments.steps)
        write(Path(arguments.out), result)
        print(json.dumps({key: value for key, value in result.items() if key != "samples"}, indent=1))
        print(f"saved as {arguments.out}; the run is in {folder}")
    from soak_plot import draw

    draw(result, Path(arguments.figure))
    return 0 if arguments.draw or result["holds"] else 1


def soaked(folder: Path, steps: int) -> dict[str, Any]:
    """A whole soak: run, samples and verdict.

    Raises:
        RuntimeError: the run failed.
    """
    prepare(folder)
    began = time.monotonic()
    samples = list(watched(folder, steps))
    series = series_of(samples)
    judged = verdict(series, steps)
    plans = plans_of(folder)
    bound = communicator_bound(WORLD_SIZE, (1, 2, 3, 4))
    bounded = plans["communicators"] <= bound and plans["rank_sets"] <= bound
    return {
        **provenance(versions_of(folder)),
        "minutes": round((time.monotonic() - began) / 60, 1),
        "steps": steps, "world_size": WORLD_SIZE, "batch_size": BATCH, "checkpoint_every": CHECKPOINT_EVERY,
        "holds": bounded and all(each["holds"] for each in judged.values()),
        "communicators_bound": bound,
        **plans,
        "processes": judged,
        "samples": samples,
    }  # fmt: skip


def prepare(folder: Path) -> None:
    draw = random.Random(0)
    lengths = [min(LONGEST, max(8, int(draw.lognormvariate(4.3, 1.2)))) for _ in range(SEQUENCES)]
    rows = ({"input_ids": [draw.choice(b"abcdefgh ") for _ in range(length)]} for length in lengths)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "config.toml").write_text(CONFIG)


def watched(folder: Path, steps: int, interval_s: float = INTERVAL_S) -> Iterator[dict[str, Any]]:
    """Trains, and says every `interval_s` what each process holds at which step.

    Raises:
        RuntimeError: the run failed; with the end of what it said.
    """
    mark = uuid.uuid4().hex
    log, metrics = folder / "log", folder / "out" / "metrics.jsonl"
    started = ByTorchrun(folder, WORLD_SIZE, ["train", "config.toml", "--train.steps", str(steps)], log, mark)
    torchrun = started.processes()[0]
    began, seen, step = time.monotonic(), 0, 0
    try:
        while torchrun not in started.statuses():
            time.sleep(interval_s)
            if metrics.exists():
                with open(metrics, "rb") as file:
                    file.seek(seen)
                    text = file.read()
                seen, step = seen + len(text), step + text.count(b"\n")
            if not 0 < step < steps:  # before and after, processes come and go
                continue
            named = {name_of(pid): held(pid) for pid in [torchrun, *descendants(torchrun)]}
            now = {name: asdict(one) for name, one in named.items() if one is not None}
            yield {"step": step, "s": round(time.monotonic() - began, 1), "held": now}
    finally:
        kill(marked(MARK, mark))
    if started.statuses()[torchrun] != 0:
        raise RuntimeError(f"the run failed: {log.read_text(errors='replace')[-3000:]}")


def name_of(pid: int) -> str:
    """What a process of the run is: torchrun, a rank, the planner's, or its command."""
    line = command(pid)
    if "torch.distributed.run" in line:
        return "torchrun"
    if "flexsp.planner.service" in line:
        return "planner"
    rank = environment(pid).get("RANK", "?")
    return f"rank {rank}" if "flexsp train" in line else f"{line.split()[0] if line else 'ended'} of rank {rank}"


def series_of(samples: list[dict[str, Any]]) -> dict[str, Series]:
    """By process: what it held over the steps."""
    names = dict.fromkeys(name for sample in samples for name in sample["held"])
    found = {}
    for name in sorted(names):
        own = [(sample["step"], sample["held"][name]) for sample in samples if name in sample["held"]]
        columns = {key: [one[key] for _, one in own] for key in own[0][1]}
        found[name] = Series(steps=[step for step, _ in own], columns=columns)
    return found


def plans_of(folder: Path) -> dict[str, Any]:
    """How plans changed, and how many communicators the run made."""
    degrees: Counter[int] = Counter()
    patterns, sets, mixed, grown = set(), set(), 0, []
    for line in (folder / "out" / "plans.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        pattern = []
        for micro_batch in row["plan"]["micro_batches"]:
            ranks = [tuple(group["ranks"]) for group in micro_batch["groups"]]
            degrees.update(len(one) for one in ranks)
            sets |= {one for one in ranks if len(one) > 1}
            pattern.append(tuple(sorted(len(one) for one in ranks)))
        mixed += any(len(set(one)) > 1 for one in pattern)
        patterns.add(tuple(pattern))
        if not grown or grown[-1][1] != len(sets):
            grown.append([row["step"], len(sets)])
    said = re.findall(r"(\d+) communicator", (folder / "log").read_text(errors="replace"))
    metrics = [json.loads(line) for line in (folder / "out" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    logged = [[row["step"], row["communicators"]] for row in metrics if isinstance(row.get("communicators"), int)]
    return {
        "groups_by_degree": {str(degree): degrees[degree] for degree in sorted(degrees)},
        "different_plans": len(patterns),
        "mixed_steps": mixed,
        "corrections": sum(bool(row.get("ratios")) for row in metrics),
        "rank_sets": len(sets),
        "rank_sets_by_step": grown,
        "communicators": max([int(text) for text in said] + [count for _, count in logged], default=0),
        "communicators_by_step": [row for i, row in enumerate(logged) if i == 0 or row[1] != logged[i - 1][1]],
    }  # fmt: skip


def versions_of(folder: Path) -> dict[str, str]:
    """Versions as the run's own checkpoint has them, so that this script imports nothing of what it watches."""
    states = sorted((folder / "out" / "checkpoints").glob("step-*/state.json"))
    found: dict[str, str] = json.loads(states[-1].read_text(encoding="utf-8"))["versions"] if states else {}
    return found


def write(path: Path, result: dict[str, Any]) -> None:
    """JSON with one sample a line, some hundreds of them; the verdict is of all."""
    every = -(-len(result["samples"]) // KEPT)
    result = {**result, "samples_taken": len(result["samples"]), "samples": result["samples"][::every]}
    text = json.dumps({**result, "samples": "SAMPLES"}, indent=1)
    rows = ",\n".join("  " + json.dumps(each) for each in result["samples"])
    path.write_text(text.replace('"SAMPLES"', f"[\n{rows}\n ]") + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
