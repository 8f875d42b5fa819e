"""The paper reproduced by simulation: measures, writes results/paper.json, docs/paper.md and its pictures.

    python benchmarks/paper.py                    on the distributions of GitHub, CommonCrawl and Wikipedia
    python benchmarks/paper.py --lengths FILE     on your lengths, into runs/paper
    python benchmarks/paper.py --render           the page and its pictures anew, from the results that are there
    python benchmarks/paper.py --quick            a small run that shows that it works, into runs/paper

About ten minutes on two cores, a third of it in the MILPs of the ablation.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import sys
import time
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import paper_page
import paper_plots
from paper_ablation import ablation, bucketing
from paper_cases import QUICK, Settings, corpora, describe
from paper_measure import cells, scaling

import flexsp
from flexsp.distributions import find
from flexsp.distributions.source import is_distribution

ROOT = Path(__file__).parents[1]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lengths", metavar="FILE", help="lengths (a file or a named distribution) instead of the paper's corpora"
    )
    parser.add_argument("--render", action="store_true", help="only write the page anew")
    parser.add_argument("--quick", action="store_true", help="a small run; its figures mean nothing")
    parser.add_argument("--output", type=Path, metavar="DIR", help="of a run that is not the committed page's")
    options = parser.parse_args(arguments)
    own = options.lengths or options.quick or options.output
    folder = options.output or ROOT / "runs" / "paper"
    stored = folder / "paper.json" if own else ROOT / "benchmarks" / "results" / "paper.json"
    pages = folder if own else ROOT / "docs"
    try:
        if not options.render:
            write(stored, json.dumps(measure(options.lengths, QUICK if options.quick else Settings()), indent=1) + "\n")
        render(stored, pages)
    except (ValueError, OSError) as error:
        print(f"paper: {error}", file=sys.stderr)
        return 2
    print(pages / "paper.md")
    return 0


def measure(lengths: str | None, settings: Settings) -> dict[str, Any]:
    """All figures of the page.

    Raises:
        ValueError: the file of lengths is wrong, or too small for a batch.
    """
    began = time.perf_counter()
    found = corpora(lengths, settings)
    rows, studied = cells(found, settings)
    return {
        "lengths": {name: {**described(name, lengths), **describe(tokens)} for name, tokens in found.items()},
        "settings": asdict(settings),
        "quick": settings == QUICK,
        "cells": rows,
        "cases": studied,
        "scaling": scaling(found, settings),
        "bucketing": bucketing(found, settings),
        "ablation": ablation(found, settings),
        "run": {
            "date": datetime.date.today().isoformat(),
            "machine": f"{os.cpu_count()} cores {platform.machine()}",
            "load_at_end": round(os.getloadavg()[0], 2),
            "seconds": round(time.perf_counter() - began),
            "python": platform.python_version(),
            "flexsp": flexsp.__version__,
            **{name: metadata.version(name) for name in ("numpy", "numba", "ortools")},
        },
    }


def described(name: str, lengths: str | None) -> dict[str, str]:
    """Where lengths come from; of a file its name alone."""
    if lengths is not None and not is_distribution(lengths):
        return {"kind": "file", "source": f"the file {Path(lengths).name}, read whole"}
    distribution = find(name)
    return {"kind": distribution.kind, "source": distribution.source}


def render(stored: Path, folder: Path) -> None:
    """Writes paper.md and its pictures into `folder` from the results in `stored`."""
    results = json.loads(stored.read_text(encoding="utf-8"))
    write(folder / "paper.md", paper_page.page(results))
    paper_plots.draw(results, folder / "figures")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
