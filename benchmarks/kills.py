"""Does a run survive being killed, a hundred times, without a sequence lost or trained twice?

    python benchmarks/kills.py [--kills 100] [--seed 0] [--max-ranks 4] [--launcher fork] [--out FILE.json]

Real `flexsp train` runs of a tiny model, mixed degrees, an asynchronous checkpoint every three steps. Each start has a
random number of ranks; at a random moment SIGKILL ends a random part of them, and what is left must end by itself. Then
it starts again in the same folder. Once a run has come to its end, its logs prove that every sequence of each epoch was
trained exactly once and that the losses are those of a run that nothing disturbed (kills_proof.py, which shares nothing
with flexsp). What must hold after every kill is in kills_campaign.py; whatever does not ends the script with 1.

Ranks are forked by a process that has imported everything (nursery.py), which saves nine seconds a start; a tenth is
started by torchrun, and with `--launcher torchrun` all are.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kills_campaign import BATCH, END_S, EVERY, LOST_STEPS, ORPHANS_S, PHASES, STEPS, Campaign, Kill
from kills_ranks import Nursery, nothing_left
from processes import provenance

TORCHRUN_SHARE = 0.1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("--kills", 100), ("--seed", 0), ("--max-ranks", 4), ("--steps", STEPS)):
        parser.add_argument(name, type=int, default=value)
    parser.add_argument("--launcher", choices=["fork", "torchrun"], default="fork")
    parser.add_argument("--folder", help="for the runs, kept; default: a temporary one, kept where something fails")
    parser.add_argument("--out", default=str(Path(__file__).parent / "results" / "kills.json"))
    arguments = parser.parse_args()
    folder = Path(arguments.folder or tempfile.mkdtemp(prefix="kills-"))
    folder.mkdir(parents=True, exist_ok=True)
    share = 1.0 if arguments.launcher == "torchrun" else TORCHRUN_SHARE
    began = time.monotonic()
    try:
        campaign, versions = survived(
            folder, arguments.kills, arguments.seed, arguments.max_ranks, share, arguments.steps
        )
    except AssertionError as failure:
        print(f"FAILED: {failure}\nthe runs are in {folder}", file=sys.stderr)
        return 1
    result = {
        **provenance(versions),
        "seed": arguments.seed,
        "minutes": round((time.monotonic() - began) / 60, 1),
        "steps": arguments.steps, "batch_size": BATCH, "checkpoint_every": EVERY, "max_ranks": arguments.max_ranks,
        **summary(campaign),
        "kills": [asdict(each) for each in campaign.kills],
    }  # fmt: skip
    write(Path(arguments.out), result)
    print(json.dumps({key: value for key, value in result.items() if key != "kills"}, indent=1))
    print(f"saved as {arguments.out}")
    return 0


def survived(
    folder: Path, kills: int, seed: int, max_ranks: int, torchrun_share: float, steps: int
) -> tuple[Campaign, dict[str, str]]:
    """The whole campaign, and the versions of what it ran.

    Raises:
        AssertionError: something that must hold after a kill, or at a run's end, does not.
    """
    mark = uuid.uuid4().hex
    nursery = Nursery(mark)
    with nothing_left(mark, nursery):
        campaign = Campaign(
            folder=folder, nursery=nursery, mark=mark, draw=random.Random(seed), max_ranks=max_ranks,
            torchrun_share=torchrun_share, steps=steps,
        )  # fmt: skip
        campaign.run(kills)
        return campaign, nursery.versions


def summary(campaign: Campaign) -> dict[str, Any]:
    """The figures of docs/reliability.md."""
    kills = campaign.kills
    loaded = [each for each in kills if each.went_on_after is not None]
    part = [each for each in kills if len(each.killed) < each.world_size]
    return {
        "number_of_kills": len(kills),
        "starts": campaign.starts,
        "by_phase": counted((each.phase for each in kills), PHASES),
        "by_world_size": counted(each.world_size for each in kills),
        "by_ranks_killed": counted(f"{len(each.killed)} of {each.world_size}" for each in kills),
        "by_launcher": counted(each.launcher for each in kills),
        "all_ranks_at_once": len(kills) - len(part),
        "exits_of_the_rest": counted(status for each in part for status in each.exits if each.launcher == "fork"),
        "starts_that_loaded_the_last_whole_checkpoint": len(loaded),
        "torn_rows": sum(each.torn_row for each in kills),
        "left_half_written": sum(each.part_left for each in kills),
        "steps_lost": counted(each.lost for each in kills),
        "steps_lost_bound": LOST_STEPS,
        "rest_ended_after_s": spread([each.ended_s for each in part]),
        "rest_ended_bound_s": END_S,
        "rest_ended_worst_s_by_phase": {
            phase: max((each.ended_s for each in part if each.phase == phase), default=None) for phase in PHASES
        },
        "orphans_gone_after_s": spread([each.orphans_s for each in kills]),
        "orphans_bound_s": ORPHANS_S,
        "worst_loss_difference": max(proof["worst_loss_difference"] for proof in campaign.proofs),
        "runs": campaign.proofs,
    }


def counted(values: Iterable[Any], order: Iterable[Any] = ()) -> dict[str, int]:
    counts = Counter(values)
    return {str(key): counts[key] for key in [*order, *sorted(set(counts) - set(order))]}


def spread(seconds: list[float]) -> dict[str, float]:
    if not seconds:
        return {}
    ordered = sorted(seconds)
    return {
        "median": round(statistics.median(ordered), 2),
        "of_ten_nine_within": round(ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))], 2),
        "worst": round(ordered[-1], 2),
    }


def write(path: Path, result: dict[str, Any]) -> None:
    """JSON with one kill a line."""
    kills: list[Kill] = result["kills"]
    text = json.dumps({**result, "kills": "KILLS"}, indent=1)
    rows = ",\n".join("  " + json.dumps(each) for each in kills)
    path.write_text(text.replace('"KILLS"', f"[\n{rows}\n ]") + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
