"""Predicted time of the peers' planners relative to flex: the table of docs/peers.md.

python benchmarks/peers.py
"""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path
from typing import Any

import numpy as np
from planner_bench_cases import drawn_lengths, larger, published_profile, with_degrees

import flexsp

LIMIT = 192 * 1024
PROFILE = published_profile()
PEERS: list[tuple[str, dict[str, Any]]] = [
    ("megatron-dcp", {}),
    ("megatron-dcp", {"estimate": "attention"}),
    ("flexible-cp", {}),
    ("batch-adaptive", {}),
    ("static", {"max_length": LIMIT}),
]
EIGHT = PROFILE.for_devices(8)
CASES = [
    ("512 on 64 devices", 512, PROFILE, LIMIT, 6),
    ("the same, 16 degrees", 512, with_degrees(PROFILE, (3, 5, 6, 7, 12, 24, 40, 48, 56)), LIMIT, 6),
    ("512 on 8 devices, up to 27K", 512, EIGHT, EIGHT.capacity_tokens(8), 4),
    ("4,096 on 64 devices", 4096, PROFILE, LIMIT, 2),
    ("8,192 on 1,024 devices", 8192, larger(PROFILE, 1024), LIMIT, 2),
]


def main() -> None:
    rows = []
    for name, count, profile, most, draws in CASES:
        for corpus in ("wikipedia", "code"):
            batches = [drawn_lengths(corpus, count, seed, most) for seed in range(draws)]
            flex = [flexsp.plan(batch, profile) for batch in batches]
            for planner, options in PEERS:
                given = {"max_length": most} if planner == "static" else options
                plans = [flexsp.plan(batch, profile, planner, **given) for batch in batches]
                ratios = [p.predicted_s / f.predicted_s for p, f in zip(plans, flex, strict=True)]  # type: ignore[operator]
                rows.append({
                    "case": name, "corpus": corpus, "planner": f"{planner} {options.get('estimate', '')}".strip(),
                    "ratio": float(np.exp(np.log(ratios).mean())), "least": min(ratios), "most": max(ratios),
                    "slowest_solve_s": max(p.solve_s or 0.0 for p in plans),
                    "flex_slowest_solve_s": max(f.solve_s or 0.0 for f in flex),
                })  # fmt: skip
                print("{case:28} {corpus:9} {planner:22} {ratio:.2f} ({least:.2f} to {most:.2f})".format(**rows[-1]))
    machine = {
        "machine": f"{os.cpu_count()} cores {platform.machine()}, one used",
        "python": platform.python_version(),
        "flexsp": flexsp.__version__,
    }
    path = Path(__file__).parent / "results" / "peers.json"
    path.write_text(json.dumps({**machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    print(table(rows))


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown: a column for each case."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    lines = [f"| corpus | planner | {' | '.join(cases)} |", "| --- " * (len(cases) + 2) + "|"]
    for corpus, planner in dict.fromkeys((row["corpus"], row["planner"]) for row in rows):
        cells = [
            f"{row['ratio']:.2f} ({row['least']:.2f} to {row['most']:.2f})"
            for case in cases
            for row in rows
            if (row["case"], row["corpus"], row["planner"]) == (case, corpus, planner)
        ]
        lines.append(f"| {corpus} | `{planner}` | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
