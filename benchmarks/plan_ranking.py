"""Does the measured profile order plans rightly? Predicted against measured time of many plans of one batch.

    torchrun --nproc-per-node 4 benchmarks/plan_ranking.py [--output FILE.json]

Takes one global batch of the Python standard library, measures a profile of the quickstart's model on these ranks,
makes plans from good to bad (every degree, flex, two sequences at a time, one rank alone, random groups), runs them
in turns, and prints Spearman's rank correlation of predicted and measured seconds. Two ranks or four. With more ranks
than cores a waiting rank lends its core to the others, which the cost model does not know: it then overrates what
imbalance costs.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import random
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

import flexsp
from flexsp import Plan, Profile, jsonfields
from flexsp.batches import global_batch
from flexsp.data import Overlong, PlannedBatch, apply_context_limit, open_corpus
from flexsp.lengths import LengthArray
from flexsp.parallel import GroupPool
from flexsp.planner.assemble import assemble
from flexsp.profiler import measure_profile, timed_step
from flexsp.train import run_model
from flexsp.train.config import load_config

ROUNDS = 3
LAYOUTS = {2: [[2], [1, 1], [1]], 4: [[4], [2, 2], [2, 1, 1], [1, 1, 1, 1]]}
"""Of one micro-batch, by number of ranks."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--output", help="default: benchmarks/results/plan_ranking_RANKS.json")
    output = arguments.parse_args().output
    config = load_config("configs/quickstart.toml")
    dist.init_process_group("gloo")
    world_size = dist.get_world_size()
    if world_size not in LAYOUTS:
        raise SystemExit(f"world_size={world_size}: run it on two ranks or four, with torchrun --nproc-per-node")
    degrees = [d for d in (1, 2, 4) if d <= world_size]

    model = run_model.prepare(run_model.build_model(config.model, seed=0), config.model)
    groups = GroupPool()
    # every degree holds every sequence here, so that plans differ as much as they can
    limit = int(config.data.max_length)
    profile = measure_profile(model, groups, sp_degrees=degrees, max_tokens_per_rank=limit)
    sequences, _ = apply_context_limit(open_corpus(config.data.source, config.data), limit, Overlong.DROP)
    ids = global_batch(len(sequences.lengths), config.train.batch_size, seed=0, step=0)
    lengths = sequences.lengths[ids]
    plans = make_plans(lengths, profile)
    batch = PlannedBatch(
        step=0, sequence_ids=ids, lengths=lengths, plan=plans["flex"], source=sequences, layouts=profile.layouts
    )

    groups.prepare(plans.values(), profile.layouts)
    taken: dict[str, list[float]] = {name: [] for name in plans}
    timed_step(model, batch, groups)
    for turn in range(ROUNDS):
        names = random.Random(turn).sample(list(plans), len(plans))
        for name in names:
            taken[name].append(timed_step(model, replace(batch, plan=plans[name]), groups))
    if dist.get_rank() == 0:
        report(plans, taken, lengths, output or f"benchmarks/results/plan_ranking_{world_size}.json")
    dist.destroy_process_group()


def make_plans(lengths: LengthArray, profile: Profile) -> dict[str, Plan]:
    """Legal plans from good to bad, the same on every rank."""
    plans = {f"static {d}": flexsp.plan(lengths, profile, "static", sp_degree=d) for d in profile.sp_degrees}
    plans["flex"] = flexsp.plan(lengths, profile, "flex")
    # a rank holds the longest sequence, so the widest group holds any two: many small micro-batches
    pairs = np.array_split(np.argsort(lengths), -(-len(lengths) // 2))
    plans["two at a time"] = assemble(
        "hand", lengths, profile, [[(profile.num_devices, pair.tolist())] for pair in pairs], 0.0
    )
    plans["one rank works"] = assemble("hand", lengths, profile, one_rank(lengths, profile), 0.0)
    for seed in range(8):
        plans[f"random {seed}"] = assemble("random", lengths, profile, random_groups(lengths, profile, seed), 0.0)
    for name, plan in plans.items():
        assert not flexsp.violations(plan, lengths, profile), name
    return plans


def one_rank(lengths: LengthArray, profile: Profile) -> list[list[tuple[int, list[int]]]]:
    """Micro-batches of one group of one rank, filled in order."""
    micro_batches: list[list[tuple[int, list[int]]]] = []
    for i in np.argsort(lengths).tolist():
        last = micro_batches[-1][0][1] if micro_batches else []
        if not last or lengths[last].sum() + lengths[i] > profile.capacity_tokens(1):
            micro_batches.append([(1, [i])])
        else:
            last.append(i)
    return micro_batches


def random_groups(lengths: LengthArray, profile: Profile, seed: int) -> list[list[tuple[int, list[int]]]]:
    """Random layouts; every sequence goes to any group that has room."""
    draw = random.Random(seed)
    layouts = [draw.choice(LAYOUTS[profile.num_devices]) for _ in range(draw.randint(2, 6))]
    slots: list[tuple[int, list[int]]] = [(d, []) for layout in layouts for d in layout]
    for i in draw.sample(range(len(lengths)), len(lengths)):
        open_slots = [s for s in slots if lengths[s[1]].sum() + lengths[i] <= profile.capacity_tokens(s[0])]
        if not open_slots:  # one micro-batch more
            layouts.append([profile.num_devices])
            open_slots = [(profile.num_devices, [])]
            slots += open_slots
        draw.choice(open_slots)[1].append(i)
    groups = iter(slots)
    filled = [[g for g in (next(groups) for _ in layout) if g[1]] for layout in layouts]
    return [layout for layout in filled if layout]


def spearman(a: list[float], b: list[float]) -> float:
    """Rank correlation; times have no ties to speak of."""
    return float(np.corrcoef(np.argsort(np.argsort(a)), np.argsort(np.argsort(b)))[0, 1])


def report(plans: dict[str, Plan], taken: dict[str, list[float]], lengths: LengthArray, output: str) -> None:
    median_s = {name: statistics.median(seconds) for name, seconds in taken.items()}
    predicted_s = {name: plan.predicted_s or 0.0 for name, plan in plans.items()}
    names = sorted(plans, key=lambda name: predicted_s[name])
    correlation = spearman([predicted_s[n] for n in names], [median_s[n] for n in names])
    table = Table(title=f"{len(lengths)} sequences, {int(lengths.sum()):,} tokens, {len(plans)} plans")
    for column in ("plan", "micro-batches", "predicted s", "measured s"):
        table.add_column(column, overflow="fold")
    for name in names:
        table.add_row(name, str(plans[name]), f"{predicted_s[name]:.2f}", f"{median_s[name]:.2f}")
    console = Console(width=110)
    console.print(table)
    console.print(f"Spearman's rank correlation of predicted and measured seconds: {correlation:.3f}", highlight=False)
    jsonfields.write_object(
        Path(output),
        {
            "spearman": correlation,
            "plans": {
                n: {"micro_batches": str(plans[n]), "predicted_s": predicted_s[n], "measured_s": taken[n]}
                for n in names
            },
            "provenance": {
                "machine": f"{platform.machine()}, {os.cpu_count()} cores, {dist.get_world_size()} gloo ranks",
                "date": datetime.date.today().isoformat(),
                "versions": {
                    "python": platform.python_version(), "torch": torch.__version__, "flexsp": flexsp.__version__,
                },
                "rounds": ROUNDS,
            },
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
