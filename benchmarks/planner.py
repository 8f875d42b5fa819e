"""Benchmarks of the planner; each writes a JSON file and prints a table.

    python benchmarks/planner.py reference --reference DIR --profiles DIR   flex against published predictions
    python benchmarks/planner.py milp --reference DIR --profiles DIR        the yardstick against them
    python benchmarks/planner.py scale                                      cost by sequences and devices
    python benchmarks/planner.py degrees                                    what other degrees and policies gain
    python benchmarks/planner.py plots                                      figures from the JSON files

A reference directory holds `*.json` with `name`, `profile` (a file's name in the profiles directory), `lengths` and
`published_solver.micro_batches`: per micro-batch and group, the degree and the lengths.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from planner_bench_cases import drawn_lengths, larger, published_profile, with_degrees, with_policies

import flexsp
from flexsp.profile import Policy, Profile

HERE = Path(__file__).parent
SCALE = [(k, n) for n in (64, 256, 1024, 4096, 12288) for k in (512, 2048, 8192, 32768, 65536) if k <= 512 * n // 8]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("reference", "milp"):
        command = commands.add_parser(name)
        command.add_argument("--reference", type=Path, required=True)
        command.add_argument("--profiles", type=Path, required=True)
    commands.choices["milp"].add_argument("--time-limit-s", type=float, default=60.0)
    commands.add_parser("scale")
    one = commands.add_parser("one", help="one point of scale, in a process of its own")
    one.add_argument("num_sequences", type=int)
    one.add_argument("num_devices", type=int)
    commands.add_parser("degrees")
    commands.add_parser("plots")
    arguments = parser.parse_args()
    if arguments.command == "reference":
        save("planner_reference.json", reference(arguments.reference, arguments.profiles))
    elif arguments.command == "milp":
        save("planner_milp.json", milp(arguments.reference, arguments.profiles, arguments.time_limit_s))
    elif arguments.command == "scale":
        save("planner_scale.json", [point(k, n) for k, n in SCALE])
    elif arguments.command == "one":
        print(json.dumps(measured(arguments.num_sequences, arguments.num_devices)))
    elif arguments.command == "degrees":
        save("planner_degrees.json", degrees())
    else:
        import planner_plots

        planner_plots.draw(HERE / "results", HERE.parent / "docs" / "figures")


def save(name: str, rows: list[dict[str, Any]]) -> None:
    machine = {
        "machine": f"{os.cpu_count()} cores {platform.machine()}, one used",
        "load_at_end": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "flexsp": flexsp.__version__,
    }
    (HERE / "results").mkdir(exist_ok=True)
    (HERE / "results" / name).write_text(json.dumps({**machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def batches(reference: Path, profiles: Path) -> list[tuple[dict[str, Any], Profile, float]]:
    """Each batch, its profile, and the published plan's time by the formula of the cost model."""
    found = []
    for path in sorted(reference.glob("*.json")):
        batch = json.loads(path.read_text(encoding="utf-8"))
        profile = Profile.load(profiles / f"{batch['profile']}.json")
        published_s = sum(
            profile.compute.fixed_s + max(profile.group_s(degree, lengths) for degree, lengths in micro_batch)
            for micro_batch in batch["published_solver"]["micro_batches"]
        )
        found.append((batch, profile, published_s))
    return found


def timed(lengths: Any, profile: Profile, repeats: int, **options: Any) -> tuple[flexsp.Plan, float, float]:
    """The plan, and median and least wall seconds of warm runs."""
    plan = flexsp.plan(lengths, profile, **options)
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        plan = flexsp.plan(lengths, profile, **options)
        seconds.append(time.perf_counter() - began)
    faults = flexsp.violations(plan, lengths, profile)
    assert not faults, faults
    return plan, statistics.median(seconds), min(seconds)


def reference(directory: Path, profiles: Path) -> list[dict[str, Any]]:
    rows = []
    for batch, profile, published_s in batches(directory, profiles):
        lengths = np.array(batch["lengths"])
        plan, median_s, least_s = timed(lengths, profile, 15)
        second = flexsp.plan(lengths, profile, time_limit_s=1.0)
        rows.append({
            "batch": batch["name"], "published_s": published_s, "flex_s": plan.predicted_s,
            "ratio": plan.predicted_s / published_s, "ratio_1s": second.predicted_s / published_s,
            "lower_bound_s": plan.lower_bound_s, "gap": plan.gap, "median_ms": 1e3 * median_s, "min_ms": 1e3 * least_s,
        })  # fmt: skip
        print("{batch:26} {ratio:.4f} {ratio_1s:.4f} gap {gap:.2%} median {median_ms:.1f} ms".format(**rows[-1]))
    for key in ("ratio", "ratio_1s"):
        print(f"{key}: geometric mean {np.exp(np.mean([np.log(row[key]) for row in rows])):.4f}")
    print(f"gap: median {statistics.median(row['gap'] for row in rows):.2%}")
    medians = [row["median_ms"] for row in rows]
    print(f"milliseconds: median {statistics.median(medians):.1f}, slowest {max(medians):.1f}")
    return rows


def milp(directory: Path, profiles: Path, time_limit_s: float) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    flexsp.plan([1], published_profile())  # compiles
    for batch, profile, published_s in batches(directory, profiles):
        lengths = np.array(batch["lengths"])
        plan = flexsp.plan(lengths, profile, "milp", time_limit_s=time_limit_s)
        assert not flexsp.violations(plan, lengths, profile)
        rows.append({
            "batch": batch["name"], "time_limit_s": time_limit_s, "ratio": plan.predicted_s / published_s,
            "solve_s": plan.solve_s, **plan.extra["milp"],
        })  # fmt: skip
        print("{batch:26} {ratio:.4f} {solve_s:.1f} s error {token_error:.2%} {proven}/{solved}".format(**rows[-1]))
        save("planner_milp.json", rows)
    return rows


def point(num_sequences: int, num_devices: int) -> dict[str, Any]:
    command = [sys.executable, __file__, "one", str(num_sequences), str(num_devices)]
    row: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(
        "{num_sequences:6} {num_devices:6} {median_s:7.3f} s gap {gap:.2%} {peak_mb:.0f} MB".format(**row), flush=True
    )
    return row


def measured(num_sequences: int, num_devices: int) -> dict[str, Any]:
    profile = larger(published_profile(), num_devices)
    lengths = drawn_lengths("wikipedia", num_sequences, 0, 196_608)
    plan, median_s, least_s = timed(lengths, profile, 3)
    return {
        "num_sequences": num_sequences, "num_devices": num_devices, "median_s": median_s, "min_s": least_s,
        "gap": plan.gap, "micro_batches": len(plan.micro_batches),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }  # fmt: skip


def degrees() -> list[dict[str, Any]]:
    """Mean predicted seconds of batches of 512 under the published profile with more degrees, or with policies."""
    plain = published_profile()
    per_token = plain.memory.activation_bytes_per_token
    recompute = {
        f"recompute, activations / 8, compute x {factor}": with_policies(
            plain, {"recompute": Policy(activation_bytes_per_token=per_token / 8, compute_factor=factor)}
        )
        for factor in (1.1, 1.2, 1.33)
    }
    variants = {
        "powers of two": plain,
        "with 3, 6": with_degrees(plain, (3, 6)),
        "with 3, 6, 12, 24, 48": with_degrees(plain, (3, 6, 12, 24, 48)),
        "with 3, 5, 6, 7, 12, 24, 40, 48, 56": with_degrees(plain, (3, 5, 6, 7, 12, 24, 40, 48, 56)),
        **recompute,
    }
    rows: list[dict[str, Any]] = []
    for corpus in ("wikipedia", "code"):
        before: list[float] = []
        for name, profile in variants.items():
            plans = []
            for seed in range(6):
                lengths = drawn_lengths(corpus, 512, seed, 196_608)
                plans.append(flexsp.plan(lengths, profile))
                assert not flexsp.violations(plans[-1], lengths, profile)
            seconds = [plan.predicted_s or 0.0 for plan in plans]
            before = before or seconds
            used = sum(m.policy is not None for plan in plans for m in plan.micro_batches)
            ratio = float(np.exp(np.mean(np.log(seconds) - np.log(before))))
            rows.append({
                "corpus": corpus, "profile": name, "ratio": ratio, "worst": float(np.max(np.divide(seconds, before))),
                "micro_batches_with_policy": used / sum(len(plan.micro_batches) for plan in plans),
                "solve_s": statistics.median(plan.solve_s or 0.0 for plan in plans),
                "gap": statistics.median(plan.gap or 0.0 for plan in plans),
            })  # fmt: skip
            print(
                "{corpus:10} {profile:45} {ratio:.4f} worst {worst:.4f}, {solve_s:.3f} s".format(**rows[-1]), flush=True
            )
    return rows


if __name__ == "__main__":
    main()
