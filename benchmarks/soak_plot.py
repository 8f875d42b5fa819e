"""The figure of docs/reliability.md: what each process of a long run holds, over its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from soak_verdict import WARM_UP


def draw(result: dict[str, Any], figure: Path) -> None:
    figure.parent.mkdir(parents=True, exist_ok=True)
    steps = result["steps"]
    _, panels = plt.subplots(3, 1, figsize=(9, 8), sharex=True, height_ratios=[3, 2, 1.3])
    for number, name in enumerate(result["processes"]):
        at = [sample["step"] for sample in result["samples"] if name in sample["held"]]
        own = [sample["held"][name] for sample in result["samples"] if name in sample["held"]]
        style = {"color": plt.get_cmap("tab10")(number), "linewidth": 1.2, "label": name}
        panels[0].plot(at, [one["rss_bytes"] / 2**20 for one in own], **style)
        panels[1].plot(at, [one["open_files"] for one in own], **style)
    for key, label in (("rank_sets_by_step", "sets of ranks planned"), ("communicators_by_step", "communicators made")):
        points = result[key]
        if points:
            panels[2].step(
                [at for at, _ in points] + [steps],
                [count for _, count in points] + [points[-1][1]],
                where="post",
                label=label,
            )
    if not result["communicators_by_step"]:
        panels[2].plot([steps], [result["communicators"]], "o", clip_on=False, label="communicators made")
    panels[2].axhline(result["communicators_bound"], color="grey", linestyle="--", label="bound")
    panels[0].set(ylabel="resident memory, MiB", ylim=(0, None))
    panels[1].set(ylabel="open files", ylim=(0, None))
    panels[2].set(ylabel="groups", ylim=(0, None), xlabel="step", xlim=(0, steps))
    panels[0].set_title(f"{steps:,} steps on {result['world_size']} ranks: rules hold from a quarter of the steps on")
    for panel in panels:
        panel.axvline(WARM_UP * steps, color="grey", linewidth=0.8, linestyle=":")
        panel.grid(True, alpha=0.3)
    panels[0].legend(ncols=3, fontsize="small")
    panels[2].legend(ncols=3, fontsize="small")
    plt.savefig(figure, dpi=110, bbox_inches="tight")
    plt.close()
