"""What does a card do on whole models, and how far is the estimate from its data sheet? Meant for one GPU or more.

    python benchmarks/card.py --cluster h100 [--num-devices 8] [--ranks 1] [CONFIG.json ...] [FLAGS of flexsp profile]

Measures each config (by default Llama-3.2-1B and -3-8B of `examples/models`) with `flexsp profile`, whose wall time
is taken from outside, start and imports included. Says what the fit and its held-out micro-batches are off by, what
TFLOP/s full rows of each length reached, and every coefficient beside what `flexsp estimate` says of the cluster.
Writes results/card_CLUSTER.json. Where there is no CUDA it runs as well, on the CPU: then the comparison means nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from flexsp import Profile, jsonfields
from flexsp.estimate import ModelShape, estimate_profile, load_cluster, load_model_shape

HERE = Path(__file__).parent
MODELS = [HERE.parent / "examples/models" / name for name in ("llama-3.2-1b.json", "llama-3-8b.json")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", type=Path, metavar="CONFIG.json", default=MODELS)
    parser.add_argument("--cluster", required=True, help="whose card is at hand")
    parser.add_argument(
        "--num-devices", type=int, default=8, help="of the cluster, for what one card cannot measure (8)"
    )
    parser.add_argument("--ranks", type=int, default=1, help="as many as GPUs (1)")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/card_CLUSTER.json")
    arguments, arguments.flags = parser.parse_known_args()
    results = [one_model(path, arguments) for path in arguments.models or MODELS]
    output = arguments.output or HERE / f"results/card_{arguments.cluster}.json"
    jsonfields.write_object(output, {"cluster": arguments.cluster, "ranks": arguments.ranks, "models": results})
    print(f"written: {output}")


def one_model(path: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measured, estimated and printed."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "profile.json"
        command = [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(arguments.ranks),
            "-m", "flexsp", "profile", str(path), "--output", str(file),
            "--cluster", arguments.cluster, "--num-devices", str(arguments.num_devices),
            *arguments.flags,
        ]  # fmt: skip
        began = time.perf_counter()
        if status := subprocess.run(command).returncode:
            sys.exit(status)  # it has said why
        wall_s = time.perf_counter() - began
        measured = Profile.load(file)
    shape = load_model_shape(path)
    cluster = load_cluster(arguments.cluster)
    estimated = estimate_profile(shape, cluster, num_devices=arguments.num_devices)
    rates = achieved_tflops(shape, measured.provenance["points"])
    pairs = coefficients(measured, estimated)
    console = Console(width=110)
    console.print(
        f"{path.stem} on {measured.provenance['device']}: {wall_s:.0f} s in all; fit {measured.provenance['fit']}"
    )
    table = Table("full rows of sequences of", "TFLOP/s a rank")
    for row in rates:
        table.add_row(f"{row['length']:,} tokens", f"{row['tflops_per_s']:.4g}")
    console.print(table)
    table = Table("coefficient", "measured", "estimated", "ratio")
    for name, pair in pairs.items():
        ratio = pair["estimated"] / pair["measured"] if pair["measured"] else float("nan")
        table.add_row(name, f"{pair['measured']:.4g}", f"{pair['estimated']:.4g}", f"{ratio:.3f}")
    console.print(table)
    return {
        "model": path.stem, "wall_s": wall_s, "tflops_by_length": rates, "coefficients": pairs,
        "provenance": measured.provenance,
    }  # fmt: skip


def achieved_tflops(shape: ModelShape, points: list[dict[str, Any]]) -> list[dict[str, float]]:
    """Of full rows of like sequences at degree 1, on the part of the model that they ran on: most layers first."""
    most = max(point["layers"] for point in points)
    found = []
    for point in points:
        lengths = point["lengths"]
        if point["degree"] != 1 or point["micro_batches"] != 1 or point["layers"] != most:
            continue
        part = replace(shape, num_layers=most, vocab_size=max(1, round(point["head"] * shape.vocab_size)))
        flops = part.linear_flops_per_token() * sum(lengths)
        flops += part.attention_flops_per_square() * sum(length**2 for length in lengths)
        found.append({"length": lengths[0], "sequences": len(lengths), "tflops_per_s": flops / point["seconds"] / 1e12})
    return found


def coefficients(measured: Profile, estimated: Profile) -> dict[str, dict[str, float]]:
    """Those that a single card measures, and exchange bandwidths where several did."""

    def of(profile: Profile) -> dict[str, float]:
        own = {
            "quadratic_s": profile.compute.quadratic_s,
            "linear_s": profile.compute.linear_s,
            "fixed_s": profile.compute.fixed_s,
            "activation_bytes_per_token": profile.memory.activation_bytes_per_token,
            "model_state_bytes": profile.memory.model_state_bytes,
        }
        bandwidths = profile.all_to_all.bandwidth_bytes_per_s
        return own | {f"bandwidth_bytes_per_s.{degree}": rate for degree, rate in bandwidths.items()}

    first, second, where = of(measured), of(estimated), measured.provenance["fields"]
    names = [name for name in first if name in second and where.get(f"all_to_all.{name}", "measured") == "measured"]
    return {name: {"measured": first[name], "estimated": second[name]} for name in names}


if __name__ == "__main__":
    main()
