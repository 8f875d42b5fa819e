"""How far are predicted step times from measured ones? On batches of real text that no profile has seen.

    torchrun --nproc-per-node 2 benchmarks/profile_error.py [--output FILE.json]

Measures the quickstart's model twice, as `flexsp train` does (the whole model) and as `flexsp profile` does (few of its
layers), plans batches of the Python standard library with flex and static, runs every plan in turns, and compares its
median seconds with what three profiles say of it: the two, and the first one after the correction has watched the first
half of the batches. Errors are of the second half, in which none of them has seen a step.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

import flexsp
from flexsp import Plan, Profile, jsonfields
from flexsp.batches import global_batch
from flexsp.data import Overlong, PlannedBatch, apply_context_limit, open_corpus
from flexsp.lengths import LengthArray
from flexsp.parallel import GroupPool, forward_backward
from flexsp.profiler import measure_profile
from flexsp.profiler.correct import Correction, corrected, times_of
from flexsp.profiler.layers import measure_layers
from flexsp.train import run_model
from flexsp.train.config import load_config

BATCHES = 12
ROUNDS = 3


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("--output", help="default: benchmarks/results/profile_error_RANKS.json")
    output = arguments.parse_args().output
    config = load_config("configs/quickstart.toml")
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    world_size = dist.get_world_size()
    degrees = [d for d in (1, 2, 4) if d <= world_size]
    limit = int(config.data.max_length)

    bare = run_model.build_model(config.model, seed=0)
    groups = GroupPool()
    few = measure_layers(
        bare.config, groups, sp_degrees=degrees, probe_tokens=limit // 2, device=torch.device("cpu"),
        max_tokens_per_rank=limit // 2, shard_layers=config.model.shard_layers,
    )  # fmt: skip
    model = run_model.prepare(bare, config.model)
    whole = measure_profile(model, groups, sp_degrees=degrees, max_tokens_per_rank=limit // 2)

    sequences, _ = apply_context_limit(open_corpus(config.data.source, config.data), limit, Overlong.DROP)
    work: list[tuple[PlannedBatch, list[float]]] = []
    correction = Correction(whole)
    for step in range(BATCHES):
        ids = global_batch(len(sequences.lengths), config.train.batch_size, seed=1, step=step)
        lengths = sequences.lengths[ids]
        for planner in ("flex", "static"):
            plan = flexsp.plan(lengths, whole, planner)
            batch = PlannedBatch(
                step=step, sequence_ids=ids, lengths=lengths, plan=plan, source=sequences, layouts=whole.layouts
            )
            groups.prepare([plan], whole.layouts)
            run(model, batch, groups)
            taken = []
            for _ in range(ROUNDS):
                elapsed_s, times = run(model, batch, groups)
                taken.append(elapsed_s)
                if step < BATCHES // 2:
                    correction.observe(plan, lengths, times_of(plan, *times))
            work.append((batch, taken))
    if dist.get_rank() == 0:
        learned = corrected(whole, correction.ratios)
        report(work, {"whole": whole, "few layers": few, "corrected": learned}, correction.ratios, output)
    dist.destroy_process_group()


def run(model: Any, batch: PlannedBatch, groups: GroupPool) -> tuple[float, list[list[list[float]]]]:
    """Seconds of all micro-batches of the slowest rank; and elapsed and busy seconds by rank and micro-batch."""
    model.zero_grad()
    dist.barrier(group=groups.control)
    result = forward_backward(model, batch, groups)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [(t.elapsed_s, t.busy_s) for t in result.times], group=groups.control)
    elapsed, busy = ([[row[k] for row in rank] for rank in everyone] for k in (0, 1))
    return max(sum(rank) for rank in elapsed), [elapsed, busy]


def predicted_s(profile: Profile, plan: Plan, lengths: LengthArray, tables: bool = False) -> float:
    """What a profile says of any plan."""
    group_s = profile.group_table_s if tables else profile.group_s
    return sum(
        profile.compute.fixed_s + max(group_s(g.sp_degree, lengths[list(g.sequences)].tolist()) for g in m.groups)
        for m in plan.micro_batches
    )


def report(
    work: Sequence[tuple[PlannedBatch, list[float]]],
    profiles: dict[str, Profile],
    ratios: dict[str, float],
    output: str | None,
) -> None:
    world_size = dist.get_world_size()
    unseen = [(batch, taken) for batch, taken in work if batch.step >= BATCHES // 2]
    measured = [statistics.median(taken) for _, taken in unseen]
    kinds: list[tuple[str, Profile, bool]] = [(name, profile, False) for name, profile in profiles.items()]
    if profiles["whole"].tables:
        kinds.append(("whole, by its tables", profiles["whole"], True))
    table = Table(title=f"{len(unseen)} plans of {BATCHES - BATCHES // 2} batches, {world_size} ranks")
    for column in ("profile", "median error", "worst", "bias"):
        table.add_column(column)
    errors = {}
    for name, profile, by_tables in kinds:
        found = [
            predicted_s(profile, batch.plan, batch.lengths, by_tables) / s - 1.0
            for (batch, _), s in zip(unseen, measured, strict=True)
        ]
        absolute = [abs(error) for error in found]
        errors[name] = {
            "median": statistics.median(absolute),
            "worst": max(absolute),
            "bias": statistics.fmean(found),
            "errors": [round(error, 4) for error in found],
        }
        table.add_row(name, *(f"{100 * errors[name][key]:.1f} %" for key in ("median", "worst", "bias")))
    Console(width=100).print(table)
    document = {
        "errors": errors,
        "ratios": ratios,
        "profile_fits": {name: profile.provenance["fit"] for name, profile in profiles.items()},
        "plans": [
            {"step": b.step, "planner": b.plan.planner, "plan": str(b.plan), "measured_s": taken} for b, taken in work
        ],
        "provenance": {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {world_size} gloo ranks",
            "date": datetime.date.today().isoformat(),
            "versions": {
                "python": platform.python_version(), "torch": torch.__version__, "flexsp": flexsp.__version__,
            },
            "rounds": ROUNDS,
        },
    }  # fmt: skip
    jsonfields.write_object(Path(output or f"benchmarks/results/profile_error_{world_size}.json"), document)


if __name__ == "__main__":
    main()
