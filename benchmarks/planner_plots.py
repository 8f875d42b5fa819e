"""Figures of docs/planner.md: from the benchmarks' JSON files, and from plans made here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from planner_bench_cases import drawn_lengths, published_profile

import flexsp
from flexsp.lengths import LengthArray
from flexsp.profile import Profile


def draw(results: Path, figures: Path) -> None:
    figures.mkdir(parents=True, exist_ok=True)
    lengths, profile = drawn_lengths("code", 512, 3, 196_608), published_profile()
    drawings: dict[str, Callable[[], None]] = {
        "planner_timeline": lambda: timeline(flexsp.plan(lengths, profile), lengths, profile),
        "planner_scale": lambda: scale(json.loads((results / "planner_scale.json").read_text(encoding="utf-8"))),
        "planner_reference": lambda: gaps(json.loads((results / "planner_reference.json").read_text(encoding="utf-8"))),
    }
    for name, drawing in drawings.items():
        drawing()
        plt.savefig(figures / f"{name}.png", dpi=110, bbox_inches="tight")
        plt.close()


def timeline(plan: flexsp.Plan, lengths: LengthArray, profile: Profile) -> None:
    """Ranks over predicted time: each block is a sequence in its group, coloured by its length."""
    figure, axes = plt.subplots(figsize=(10, 5))
    colour = plt.get_cmap("viridis")
    lowest, highest = np.log(lengths.min()), np.log(lengths.max())
    begin_s = 0.0
    for micro_batch in plan.micro_batches:
        begin_s += profile.compute.fixed_s
        for group in micro_batch.groups:
            at_s = begin_s
            for index in sorted(group.sequences, key=lambda i: -lengths[i]):
                seconds = profile.group_s(group.sp_degree, [int(lengths[index])], micro_batch.policy)
                level = (np.log(lengths[index]) - lowest) / (highest - lowest)
                axes.barh(
                    group.ranks[0], seconds, group.sp_degree, at_s, align="edge", color=colour(level),
                    edgecolor="white", linewidth=0.3,
                )  # fmt: skip
                at_s += seconds
        begin_s += (micro_batch.predicted_s or 0.0) - profile.compute.fixed_s
    axes.set(xlabel="predicted seconds", ylabel="rank", ylim=(0, plan.num_devices), xlim=(0, begin_s))
    axes.set_title(f"{len(lengths)} sequences of code on {plan.num_devices} devices: white is idle, or a fixed cost")
    scale_bar = plt.cm.ScalarMappable(matplotlib.colors.LogNorm(lengths.min(), lengths.max()), colour)
    figure.colorbar(scale_bar, ax=axes, label="tokens of the sequence")


def scale(document: dict[str, Any]) -> None:
    """Planning time over sequences, a line for each number of devices."""
    _, axes = plt.subplots(figsize=(7, 4.5))
    rows = document["rows"]
    for num_devices in sorted({row["num_devices"] for row in rows}):
        own = [row for row in rows if row["num_devices"] == num_devices]
        axes.loglog(
            [row["num_sequences"] for row in own], [row["median_s"] for row in own], "o-", label=f"{num_devices:,}"
        )
    axes.set(xlabel="sequences K", ylabel="seconds for plan and bound", title="Cost of planning, one core, warm")
    axes.grid(True, which="both", alpha=0.3)
    axes.legend(title="devices N")


def gaps(document: dict[str, Any]) -> None:
    """Published prediction, flex, and the lower bound, relative to the published."""
    rows = document["rows"]
    _, axes = plt.subplots(figsize=(9, 4.5))
    at = np.arange(len(rows))
    axes.plot(at, np.ones(len(rows)), "k_", markersize=18, label="published solver at its best")
    flex = [row["ratio"] for row in rows]
    bound = [row["lower_bound_s"] / row["published_s"] for row in rows]
    axes.vlines(at, bound, flex, color="tab:blue", alpha=0.35, linewidth=6)
    axes.plot(at, flex, "o", color="tab:blue", label="flex")
    axes.plot(at, bound, "^", color="tab:red", label="lower bound on every plan")
    axes.set_xticks(at, [row["batch"] for row in rows], rotation=35, ha="right")
    axes.set(ylabel="predicted time, relative", title="The optimum lies inside the bars")
    axes.grid(True, axis="y", alpha=0.3)
    axes.legend()
