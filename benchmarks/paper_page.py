"""docs/paper.md: every number of ours comes from results/paper.json, every one of the paper from `paper_claims`."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from typing import Any

import paper_claims as claims
import paper_tables as tables
import paper_text as text
from paper_ablation import FULL, NUM_BUCKETS
from paper_cases import CORPORA, swept
from paper_plots import over_adaptive
from paper_tables import share, span
from paper_why import differences

Results = dict[str, Any]

WIDTH = 120


def page(results: Results) -> str:
    """All of docs/paper.md."""
    parts = (_intro, _speedups, _cases, _scaling, _ablation, _bucketing, _ending)
    made = "\n".join(part(results) for part in parts)
    if set(results["lengths"]) != set(CORPORA):  # the page is in runs/paper then
        made = re.sub(r"\]\((planner|estimate)\.md\)", r"](../../docs/\1.md)", made)
    return wrapped(made)


def wrapped(page_text: str) -> str:
    """Paragraphs and list items in lines of 120 columns, blocks apart by one empty line."""
    blocks = [block for block in re.split(r"\n\s*\n", page_text.strip()) if block.strip()]
    return "\n\n".join(_wrapped_block(block) for block in blocks) + "\n"


def _wrapped_block(block: str) -> str:
    if block[0] in "#|!`":
        return block
    return "\n".join(_wrapped_item(item) for item in re.split(r"\n(?=- |\d+\. )", block))


def _wrapped_item(item: str) -> str:
    bullet = re.match(r"- |\d+\. ", item)
    return textwrap.fill(
        " ".join(item.split()),
        WIDTH,
        subsequent_indent=" " * len(bullet[0]) if bullet else "",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _intro(results: Results) -> str:
    run, settings, cells = results["run"], results["settings"], results["cells"]
    custom = set(results["lengths"]) != set(CORPORA)
    names = " and ".join(results["lengths"])
    return text.INTRO.format(
        quick="**A quick run: these figures mean nothing.**\n\n" if results.get("quick") else "",
        lengths_said=f"the lengths of {names}" if custom else "lengths drawn from distributions, not the paper's own",
        command=f" with `LENGTHS` naming {names}" if custom else "",
        date=run["date"], minutes=run["seconds"] / 60, machine=run["machine"], python=run["python"],
        ortools=run["ortools"],
        over_static=span(map(tables.over_static, cells)), paper_static=claims.OVER_STATIC,
        over_adaptive=span(map(over_adaptive, cells)), paper_adaptive=claims.OVER_ADAPTIVE,
        gap=share(max(cell["gap"] for cell in cells), 1), example="FILE" if custom else swept(results["lengths"]),
        stored="paper.json" if custom else "benchmarks/results/paper.json",
        lengths=tables.lengths(results),
        sources="\n".join(f"- **{name}**: {each['source']}" for name, each in results["lengths"].items()),
        batch_size=settings["batch_size"], iterations=settings["iterations"], paper_batch=claims.BATCH_SIZE,
        paper_iterations=claims.ITERATIONS,
    )  # fmt: skip


def _speedups(results: Results) -> str:
    cells = results["cells"]
    return text.SPEEDUPS.format(
        extremes=tables.extremes(results), cells=tables.cells(results),
        published_degree=claims.PUBLISHED_SP_DEGREE, fill=claims.PUBLISHED_FILL,
        static_ratio=span(c["published"]["static_s"] / c["planners"]["static"]["total_s"] for c in cells),
        adaptive_ratio=span(
            c["published"]["batch_adaptive_s"] / c["planners"]["batch-adaptive"]["total_s"] for c in cells
        ),
        by_corpus=_by_corpus(results),
    )  # fmt: skip


def _by_corpus(results: Results) -> str:
    """Which corpora gain most, over static and over batch-adaptive."""

    def ordered(ratio: Callable[[Results], float]) -> list[str]:
        best = {c: max(ratio(x) for x in results["cells"] if x["corpus"] == c) for c in results["lengths"]}
        return sorted(best, key=lambda corpus: -best[corpus])

    static, adaptive = ordered(tables.over_static), ordered(over_adaptive)
    if len(static) == 1:
        return ""
    paper = sorted(claims.OVER_EITHER, key=lambda corpus: -claims.OVER_EITHER[corpus])
    as_there = ", as in the paper" if static == paper else ""
    said = f"From the largest gain over static to the smallest: {', '.join(static)}{as_there}."
    if adaptive[-1] == static[0]:
        gains = [tables.adaptive_over_static(cell) for cell in results["cells"] if cell["corpus"] == static[0]]
        said += (
            f" Over batch-adaptive {static[0]} gains least: there one degree for each batch is {span(gains)} times as "
            f"fast as static already."
        )
    return said


def _cases(results: Results) -> str:
    said = []
    for row in results["cases"]:
        static, flex = row["steps"]["static"], row["steps"]["flex"]
        less = static["step_s"] * static["exchange_share"] / max(1e-9, flex["step_s"] * flex["exchange_share"])
        faster = static["step_s"] / flex["step_s"]
        said.append(f"{less:.1f} times less exchange and {faster:.2f} times as fast in {row['case']}")
    return text.CASES.format(
        context_k=max(results["settings"]["contexts_k"]), layouts=tables.layouts(results),
        static_exchange=share(claims.STATIC_EXCHANGE), adaptive_exchange=share(claims.ADAPTIVE_EXCHANGE),
        mixed_exchange=share(claims.MIXED_EXCHANGE), reduction=claims.EXCHANGE_REDUCTION,
        case_speedup=claims.CASE_SPEEDUP, cases_said=", ".join(said), assigned=tables.assigned(results),
    )  # fmt: skip


def _scaling(results: Results) -> str:
    document, settings = results["scaling"], results["settings"]
    by = {along: [r for r in document["rows"] if r["along"] == along] for along in ("devices", "contexts")}
    few = [row for row in by["devices"] if row["value"] <= 64] or by["devices"]
    gains = {row["value"]: tables.over_static(row) for row in by["contexts"]}
    shape = ""
    if {64, 256, 384} <= set(gains) and gains[256] > max(gains[64], gains[384]):
        shape = "As in the paper, 64K and 384K gain less than 256K."
    misfits = [
        f"- {each['num_devices']:,} devices, {each['context_k']}K, {each['activation_bytes_per_token'] / 1e6:.2f} MB "
        f"of activations a token: {each['reason']}"
        for each in document["misfits"]
    ]
    return text.SCALING.format(
        corpus=document["corpus"], context_k=settings["devices_context_k"],
        devices=tables.scaling(results, "devices"), contexts=tables.scaling(results, "contexts"),
        adaptive=_adaptive(by["devices"]),
        paper_devices=claims.BY_DEVICES, ours_devices=span(map(tables.over_static, few)),
        from_16=claims.FROM_16, from_32=claims.FROM_32, static_from_16=claims.STATIC_FROM_16,
        grown=_grown(by["devices"]),
        paper_contexts=span(claims.BY_CONTEXT), ours_contexts=span(gains.values()), shape=shape,
        assumptions="; ".join(document["assumptions"]), per_device=settings["batch_size"] // 64,
        bytes_16=f"{claims.ACTIVATION_BYTES_16 / 1e6:.2f}",
        misfits="Does not fit, or cannot be simulated:\n\n" + "\n".join(misfits) if misfits else "",
    )  # fmt: skip


def _grown(rows: list[Results]) -> str:
    """Throughput gained by doubling few devices, of flex and static."""
    tokens = {row["value"]: {n: each["tokens_per_s"] for n, each in row["planners"].items()} for row in rows}
    said = [
        f"{tokens[2 * n]['flex'] / tokens[n]['flex']:.2f} times from {n} to {2 * n} "
        f"(static: {tokens[2 * n]['static'] / tokens[n]['static']:.2f})"
        for n in (16, 32)
        if n in tokens and 2 * n in tokens
    ]
    return " and ".join(said) or "in the table"


def _adaptive(rows: list[Results]) -> str:
    """What becomes of one degree for each batch when batches grow."""
    few, many = (row["planners"]["batch-adaptive"]["speedup"] for row in (rows[0], rows[-1]))
    largest = rows[-1]["batch_size"]
    if len(rows) < 2 or many >= few:
        return ""
    return (
        f"Batch-adaptive is {few:.2f} times as fast as static on {rows[0]['value']:,} devices and {many:.2f} times on "
        f"{rows[-1]['value']:,}: nearly every batch of {largest:,} has a sequence that needs static's degree."
    )


def _ablation(results: Results) -> str:
    rows = results["ablation"]

    def over(variant: str) -> str:
        values = [r["over_full"] for r in rows if r["variant"] == variant and r["over_full"] is not None]
        return span(values) if values else "no plan"

    cold = [row for row in rows if row["variant"] == "cold"]
    planned, batches = (sum(row[key] for row in cold) for key in ("planned", "batches"))
    return text.ABLATION.format(
        corpus=rows[0]["corpus"], batches=rows[0]["batches"], limit=results["settings"]["milp_limit_s"],
        ablation=tables.ablation(results), unsorted=over("unsorted_dp"), naive=over("sorted_naive"),
        none=over("sorted_none"),
        cold=f"Without these groups to begin with, the full planner plans {planned} of {batches} batches in this time.",
    )  # fmt: skip


def _bucketing(results: Results) -> str:
    return text.BUCKETING.format(
        num_buckets=NUM_BUCKETS, iterations=results["settings"]["iterations"], rounded_to=claims.ROUNDED_TO,
        bucketing=tables.bucketing(results), said=_errors(results["bucketing"]),
    )  # fmt: skip


def _errors(rows: list[Results]) -> str:
    ratios = [
        row[f"{how}_naive"]["mean"] / (row[f"{how}_dp"]["mean"] or 1e-9) for row in rows for how in ("rounded", "exact")
    ]
    said = f"In the mean, naive buckets add {span(ratios, '{:.1f}')} times as many tokens as DP buckets."
    most = max(rows, key=lambda row: float(row["rounded_naive"]["largest"]))["corpus"]
    paper = max(claims.TOKEN_ERROR["naive"], key=lambda corpus: claims.TOKEN_ERROR["naive"][corpus])
    return f"{said} As in the paper, they err most on {most}." if most == paper else said


def _ending(results: Results) -> str:
    flex = [cell["planners"]["flex"] for cell in results["cells"]]
    return text.ENDING.format(
        differences="\n".join(f"{number}. {text}" for number, text in enumerate(differences(results, FULL), 1)),
        megatron=claims.OVER_MEGATRON, solve=span(each["median_solve_s"] for each in flex),
        slowest=f"{max(each['slowest_solve_s'] for each in flex):.2f}", solver=" to ".join(map(str, claims.SOLVE_S)),
        found="\n".join(f"- {text}" for text in claims.FOUND),
        not_found="\n".join(f"- {text}" for text in claims.NOT_FOUND),
    )  # fmt: skip
