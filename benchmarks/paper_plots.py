"""Pictures of docs/paper.md, drawn from results/paper.json; bars differ in lightness or hatch, for grey prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import paper_claims as claims
from paper_ablation import VARIANTS

from flexsp.simulate.figures import StepFigures, planner_figures
from flexsp.simulate.pictures import drawing
from flexsp.simulate.pictures.case import assigned

Results = dict[str, Any]

LOOKS = {
    "static": {"color": "#ffffff", "edgecolor": "0.25", "hatch": ""},
    "batch-adaptive": {"color": "#bccbd9", "edgecolor": "0.25", "hatch": "///"},
    "flex": {"color": "#28527a", "edgecolor": "0.25", "hatch": ""},
}
LINES = {
    "static": {"color": "0.45", "marker": "X", "linestyle": ":"},
    "batch-adaptive": {"color": "#e0893f", "marker": "s", "linestyle": "--"},
    "flex": {"color": "#28527a", "marker": "o", "linestyle": "-"},
}
CAPTIONS = {"static": "static: one degree for the run", "batch-adaptive": "batch-adaptive: one a batch", "flex": "flex"}


def draw(results: Results, folder: Path) -> None:
    """Writes paper_*.png into `folder`."""
    drawing.save(speedups(results["cells"]), folder / "paper_speedups.png")
    drawing.save(scaling(results["scaling"]), folder / "paper_scaling.png")
    drawing.save(ablation(results["ablation"], results["settings"]["milp_limit_s"]), folder / "paper_ablation.png")
    drawing.save(case(results["cases"][-1]), folder / "paper_assigned.png")


def speedups(cells: list[Results]) -> Any:
    """Seconds of a step by corpus, a panel for each context limit and model (figure 4 of the paper)."""
    models = list(dict.fromkeys(cell["model"] for cell in cells))
    contexts = list(dict.fromkeys(cell["context_k"] for cell in cells))
    figure = drawing.new_figure(10.5, 1.6 + 2.7 * len(contexts))
    grid = figure.subplots(len(contexts), len(models), squeeze=False)
    for row, context_k in zip(grid, contexts, strict=True):
        for axes, model in zip(row, models, strict=True):
            own = [cell for cell in cells if (cell["model"], cell["context_k"]) == (model, context_k)]
            _cell_bars(axes, own)
            axes.set_title(f"GPT-{model.upper()}, up to {context_k}K tokens", fontsize=10)
    figure.supylabel("predicted seconds of a step, median", fontsize=10)
    handles, labels = grid[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.suptitle("Above flex: times as fast as static, and as batch-adaptive", fontsize=11)
    return figure


def _cell_bars(axes: Any, cells: list[Results]) -> None:
    for index, (name, look) in enumerate(LOOKS.items()):
        seconds = [cell["planners"][name]["median_step_s"] for cell in cells]
        places = [at + 0.27 * (index - 1) for at in range(len(cells))]
        axes.bar(places, seconds, 0.25, label=CAPTIONS[name], linewidth=0.8, **look)
    for at, cell in enumerate(cells):
        planners = cell["planners"]
        text = f"{planners['flex']['speedup']:.2f}\n{over_adaptive(cell):.2f}"
        at_s = planners["flex"]["median_step_s"]
        axes.annotate(text, (at + 0.27, at_s), (0, 2), textcoords="offset points", ha="center", va="bottom", fontsize=8)
    axes.set_xticks(range(len(cells)), [cell["corpus"] for cell in cells], fontsize=9)
    axes.set_xlim(-0.55, len(cells) - 0.45)
    axes.set_ylim(0, 1.12 * max(cell["planners"]["static"]["median_step_s"] for cell in cells))
    axes.spines[["top", "right"]].set_visible(False)


def over_adaptive(cell: Results) -> float:
    """Seconds of all steps, batch-adaptive's over flex's."""
    return float(cell["planners"]["batch-adaptive"]["total_s"] / cell["planners"]["flex"]["total_s"])


def scaling(document: Results) -> Any:
    """Tokens a second and device by number of devices and by context limit (figure 6 of the paper)."""
    figure = drawing.new_figure(10.5, 4.4)
    panels = figure.subplots(1, 2)
    for axes, along in zip(panels, ("devices", "contexts"), strict=True):
        rows = [row for row in document["rows"] if row["along"] == along]
        for name, look in LINES.items():
            each = [row["planners"][name]["tokens_per_s"] / row["num_devices"] for row in rows]
            axes.plot([row["value"] for row in rows], each, label=CAPTIONS[name], markersize=6, **look)
        for row in rows:
            flex = row["planners"]["flex"]
            point = (row["value"], flex["tokens_per_s"] / row["num_devices"])
            axes.annotate(
                f"{flex['speedup']:.2f}", point, (0, 7), textcoords="offset points", ha="center", fontsize=8.5
            )
        axes.set_xscale("log", base=2)
        suffix = "K" if along == "contexts" else ""
        axes.set_xticks([row["value"] for row in rows], [f"{row['value']:,}{suffix}" for row in rows])
        axes.set_xticks([], minor=True)
        axes.margins(x=0.08)
        axes.set_ylim(0, 1.15 * max(axes.dataLim.y1, 1e-9))
        axes.grid(True, axis="y", alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    contexts = sorted({row["context_k"] for row in document["rows"] if row["along"] == "devices"})
    panels[0].set(xlabel="devices", ylabel="tokens per second and device, predicted")
    panels[0].set_title(f"up to {contexts[0]}K tokens" if contexts else "", fontsize=10)
    panels[1].set(xlabel="context limit, tokens (K = 1024)")
    panels[1].set_title("64 devices", fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=9, handlelength=3.2)
    title = f"GPT-7B, {document['corpus']}; numbers: speedup of flex over static"
    figure.suptitle(title, fontsize=11, parse_math=False)
    return figure


def ablation(rows: list[Results], limit_s: float) -> Any:
    """Predicted time of each variant of the paper's planner over the full one (figure 7 of the paper)."""
    contexts = list(dict.fromkeys(row["context_k"] for row in rows))
    figure = drawing.new_figure(9.5, 1.9 + 0.62 * len(VARIANTS))
    axes = figure.subplots()
    looks = ({"color": "#28527a"}, {"color": "#bccbd9", "hatch": "///"})
    height = 0.8 / len(contexts)
    most = max(row["over_full"] or 0 for row in rows)
    for index, context_k in enumerate(contexts):
        for at, name in enumerate(VARIANTS):
            row = next(r for r in rows if (r["context_k"], r["variant"]) == (context_k, name))
            place = at + (index - (len(contexts) - 1) / 2) * height
            label = f"up to {context_k}K tokens" if at == 0 else None
            look = looks[index % len(looks)]
            axes.barh(place, row["over_full"] or 0, 0.9 * height, label=label, edgecolor="0.25", linewidth=0.8, **look)
            end = row["over_full"] or 0
            axes.text(end + 0.01 * most, place, _said(row), va="center", fontsize=8.5)
    axes.set_yticks(range(len(VARIANTS)), list(VARIANTS.values()), fontsize=9)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.32 * most)
    axes.set_xlabel("predicted time over that of the paper's planner (1 is as good, more is worse)")
    axes.axvline(1, color="0.2", linewidth=1, linestyle=":")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False, fontsize=9)
    about = f"{rows[0]['corpus']}, {rows[0]['batches']} batches a limit, {limit_s:g} s of MILPs a batch"
    figure.suptitle(f"The paper's planner with parts taken away: GPT-7B, {about}", fontsize=11, parse_math=False)
    return figure


def _said(row: Results) -> str:
    if not row["planned"]:
        return f"no plan for any of {row['batches']} batches"
    missing = row["batches"] - row["planned"]
    return f"{row['over_full']:.2f}" + (f", no plan for {missing} of {row['batches']}" if missing else "")


def case(row: Results) -> Any:
    """Which lengths each degree was assigned in a batch of the case study (figure 5b of the paper)."""
    flex, static = (step_of(row["steps"][name]) for name in ("flex", "static"))
    about = f"one batch of {flex.sequences} sequences, {row['corpus']}, beside {claims.CASES[-1].name} of the paper"
    return assigned(planner_figures("flex", [flex], [static]), about)


def step_of(document: Results) -> StepFigures:
    """A step's figures from JSON, where keys are strings."""
    bands = {int(d): {int(b): n for b, n in own.items()} for d, own in document["sequences_by_degree"].items()}
    return StepFigures(**{
        **document,
        "tokens_by_degree": {int(d): tokens for d, tokens in document["tokens_by_degree"].items()},
        "sequences_by_degree": bands,
        "process_groups": tuple(tuple(group) for group in document["process_groups"]),
    })  # fmt: skip
