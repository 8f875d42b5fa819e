"""The tables of docs/paper.md, from results/paper.json."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import paper_claims as claims
from paper_ablation import VARIANTS
from paper_plots import over_adaptive

Results = dict[str, Any]
KINDS = {"published": "fitted to published figures"}
"""Of lengths, where the name that a distribution has for its kind needs more words."""


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; a column in which every cell begins with a figure is aligned to the right."""
    cells = [list(row) for row in rows]
    figures = [all(not row[at] or row[at].lstrip("*")[0].isdigit() for row in cells) for at in range(len(head))]
    rules = ["---:" if figure else "---" for figure in figures]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(head), rules, *cells])


def seconds(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.1f}"


def share(value: float, digits: int = 0) -> str:
    return f"{100 * value:.{digits}f} %"


def span(values: Iterable[float], form: str = "{:.2f}") -> str:
    """`1.41 to 1.85`, or one number where they are alike."""
    found = list(values)
    low, high = form.format(min(found)), form.format(max(found))
    return low if low == high else f"{low} to {high}"


# ---- ratios of the seconds of all steps of a cell


def over_static(cell: Results) -> float:
    return float(cell["planners"]["flex"]["speedup"])


def adaptive_over_static(cell: Results) -> float:
    return float(cell["planners"]["batch-adaptive"]["speedup"])


def over_published_static(cell: Results) -> float:
    return float(cell["published"]["static_s"] / cell["planners"]["flex"]["total_s"])


def over_published_adaptive(cell: Results) -> float:
    return float(cell["published"]["batch_adaptive_s"] / cell["planners"]["flex"]["total_s"])


def published_adaptive_over_static(cell: Results) -> float:
    return float(cell["published"]["static_s"] / cell["published"]["batch_adaptive_s"])


# ---- tables


def lengths(results: Results) -> str:
    rows = []
    for corpus, found in results["lengths"].items():
        own = [cell for cell in results["cells"] if cell["corpus"] == corpus]
        tokens = {cell["context_k"]: cell["tokens_per_batch"] for cell in own}
        left_out = {cell["context_k"]: cell["left_out"] for cell in own}
        rows.append([
            corpus, KINDS.get(found["kind"], found["kind"]), f"{found['median_tokens']:,.0f}",
            share(found["below_8k"], 1), share(found["above_32k"], 2),
            ", ".join(share(left_out[k], 3) for k in left_out),
            ", ".join(f"{tokens[k] / 1e6:.2f}" for k in tokens),
        ])  # fmt: skip
    limits = ", ".join(f"{k}K" for k in results["settings"]["contexts_k"])
    return markdown(
        ["corpus", "kind", "median tokens", "below 8K", "above 32K", f"left out at {limits}",
         f"million tokens a batch at {limits}"],
        rows,
    )  # fmt: skip


def cells(results: Results) -> str:
    rows = []
    for cell in results["cells"]:
        planners = [cell["planners"][name] for name in ("static", "batch-adaptive", "flex")]
        rows.append([
            f"{cell['corpus']}, {cell['model'].upper()}, {cell['context_k']}K", str(cell["static_sp_degree"]),
            *(seconds(each["median_step_s"]) for each in planners),
            f"**{over_static(cell):.2f}**", f"**{over_adaptive(cell):.2f}**",
            " / ".join(f"{100 * each['exchange_share']:.0f}" for each in planners), share(cell["gap"], 1),
        ])  # fmt: skip
    return markdown(
        ["cell", "static degree", "static s", "batch-adaptive s", "flex s", "flex over static",
         "flex over batch-adaptive", "exchange, % of the time", "flex above the bound"],
        rows,
    )  # fmt: skip


def extremes(results: Results) -> str:
    """The paper's largest speedups beside ours, over our baselines and over the published ones."""

    def most(ratio: Callable[[Results], float], corpus: str | None = None) -> str:
        values = [ratio(cell) for cell in results["cells"] if corpus in (None, cell["corpus"])]
        return f"{max(values):.2f}"

    rows = [
        ["flex over static", f"{claims.OVER_STATIC} over DeepSpeed", most(over_static), most(over_published_static)],
        ["flex over batch-adaptive", str(claims.OVER_ADAPTIVE), most(over_adaptive), most(over_published_adaptive)],
        [
            "batch-adaptive over static",
            f"{claims.ADAPTIVE_OVER_STATIC} over DeepSpeed",
            most(adaptive_over_static),
            most(published_adaptive_over_static),
        ],
        *(
            [f"flex over static, {corpus}", f"{claims.OVER_EITHER[corpus]} over either system",
             most(over_static, corpus), most(over_published_static, corpus)]
            for corpus in results["lengths"] if corpus in claims.OVER_EITHER
        ),
        ["flex over Megatron-LM", str(claims.OVER_MEGATRON), "not simulated", "not simulated"],
    ]  # fmt: skip
    return markdown(
        ["largest speedup", "paper, measured", "ours, over our baselines", "ours, over the published baselines"], rows
    )


def layouts(results: Results) -> str:
    rows = []
    for case, row in zip(claims.CASES, results["cases"], strict=True):
        for name in ("static", "batch-adaptive", "flex"):
            step = row["steps"][name]
            label = f"{case.name}, {name}" + (f" ({row['corpus']})" if name == "static" else "")
            rows.append([
                label, f"`{case.layouts[name]}`", f"`{row['layouts'][name]}`", seconds(step["step_s"]),
                share(step["exchange_share"]),
            ])  # fmt: skip
    return markdown(["case", "paper", "ours", "ours, s", "exchange"], rows)


def assigned(results: Results) -> str:
    """Sequences by degree in the second case; degrees up to 4 together, as in the paper's figure."""
    bands = results["cases"][-1]["steps"]["flex"]["sequences_by_degree"]
    ours = dict.fromkeys(claims.ASSIGNED, 0)
    for degree, counts in bands.items():
        ours[max(4, int(degree))] += sum(counts.values())
    head = ["sequences at degree", *(f"{'up to ' if d == 4 else ''}{d}" for d in claims.ASSIGNED)]
    return markdown(
        head,
        [["paper, Case 2", *map(str, claims.ASSIGNED.values())], ["ours", *(str(ours[d]) for d in claims.ASSIGNED)]],
    )


def scaling(results: Results, along: str) -> str:
    rows = []
    for row in results["scaling"]["rows"]:
        if row["along"] != along:
            continue
        each = [
            row["planners"][name]["tokens_per_s"] / row["num_devices"] for name in ("static", "batch-adaptive", "flex")
        ]
        rows.append([
            f"{row['value']:,}{'K' if along == 'contexts' else ''}", f"{row['batch_size']:,} x {row['iterations']}",
            str(row["static_sp_degree"]), *(f"{tokens:,.0f}" for tokens in each), f"**{over_static(row):.2f}**",
            f"{over_adaptive(row):.2f}", share(row["gap"], 1), f"{row['planners']['flex']['median_solve_s']:.2f}",
        ])  # fmt: skip
    first = "context limit" if along == "contexts" else "devices"
    return markdown(
        [first, "batches", "static degree", "static", "batch-adaptive", "flex", "flex over static",
         "flex over batch-adaptive", "above the bound", "flex planning s"],
        rows,
    )  # fmt: skip


def ablation(results: Results) -> str:
    rows = []
    for row in results["ablation"]:
        over = [row["over_full"], row["over_flex"], row["over_static"]]
        rows.append([
            f"{VARIANTS[row['variant']]}, {row['context_k']}K", f"{row['planned']} of {row['batches']}",
            *("" if value is None else f"{value:.3f}" for value in over),
            "" if row["token_error"] is None else share(row["token_error"], 1),
            f"{row['proven']} of {row['milps']}" if row["milps"] else "",
        ])  # fmt: skip
    return markdown(
        ["variant", "batches planned", "time over the paper's planner", "over flex", "over static", "token error",
         "MILPs proven"],
        rows,
    )  # fmt: skip


def bucketing(results: Results) -> str:
    """The largest token errors, the paper's beside."""
    rows = []
    for row in results["bucketing"]:
        paper = [claims.TOKEN_ERROR[kind].get(row["corpus"]) for kind in ("dp", "naive")]
        ours = [row[f"{how}_{kind}"] for how in ("rounded", "exact") for kind in ("dp", "naive")]
        rows.append([
            f"{row['corpus']}, {row['context_k']}K", *("" if value is None else share(value, 1) for value in paper),
            *(f"{share(each['largest'], 1)} ({share(each['mean'], 1)})" for each in ours),
        ])  # fmt: skip
    return markdown(
        ["corpus", "paper, DP", "paper, naive", "DP, lengths rounded", "naive, lengths rounded",
         "DP, lengths as they are", "naive, lengths as they are"],
        rows,
    )  # fmt: skip
