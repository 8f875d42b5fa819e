"""What does a card do on whole models, and how far is the estimate from its data sheet? Meant for one GPU or more.

    python benchmarks/card.py --cluster h100 [--num-devices 8] [--ranks 1] [CONFIG.json ...] [-- FLAGS]

Measures each config (by default Llama-3.2-1B and -3-8B of `examples/models`) with `flexsp profile`, whose wall time
is taken from outside, start and imports included; FLAGS are passed on to it. Says what the fit and its held-out
micro-batches are off by, what TFLOP/s full rows of each length reached, what the largest row held beside what was said
before measuring, and every coefficient that was measured beside what `flexsp estimate` says of the cluster. Writes
results/card_CLUSTER.json, and each profile as results/card_CLUSTER_MODEL.json. Where there is no CUDA it runs as well,
on the CPU: then the comparison means nothing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
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
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="after --: flags of flexsp profile")
    parser.add_argument("models", nargs="*", type=Path, metavar="CONFIG.json", default=MODELS)
    parser.add_argument("--cluster", required=True, help="whose card is at hand")
    parser.add_argument(
        "--num-devices", type=int, default=8, help="of the cluster, for what one card cannot measure (8)"
    )
    parser.add_argument("--ranks", type=int, default=1, help="as many as GPUs (1)")
    parser.add_argument("--folder", type=Path, default=HERE / "results", help="for what is written")
    arguments = parser.parse_args(sys.argv[1:at])
    arguments.flags = sys.argv[at + 1 :]
    cluster = Path(arguments.cluster).stem
    arguments.folder.mkdir(parents=True, exist_ok=True)
    results = [
        one_model(path, arguments, arguments.folder / f"card_{cluster}_{path.stem}.json") for path in arguments.models
    ]
    output = arguments.folder / f"card_{cluster}.json"
    head = {"cluster": cluster, "ranks": arguments.ranks, "flags": arguments.flags}
    jsonfields.write_object(output, {**head, "models": results})
    print(f"written: {output}, and the profile of each model beside")


def one_model(path: Path, arguments: argparse.Namespace, file: Path) -> dict[str, Any]:
    """Measured into `file`, estimated and printed."""
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
    measured, shape = Profile.load(file), load_model_shape(path)
    estimated = estimate_profile(
        shape,
        load_cluster(arguments.cluster),
        num_devices=arguments.num_devices,
        sp_degrees=measured.sp_degrees,
        dtype=measured.provenance["dtype"],
        weights=measured.provenance["weights"],
    )
    found = {
        "model": path.stem,
        "wall_s": round(wall_s, 1),
        "fit": measured.provenance["fit"],
        "tflops_by_length": achieved_tflops(shape, measured.provenance["points"]),
        "memory": said_and_held(shape, measured, arguments.ranks),
        "coefficients": coefficients(measured, estimated),
    }
    show(found, measured.provenance)
    return found


def show(found: dict[str, Any], provenance: Any) -> None:
    console = Console(width=110, markup=False)
    console.print(
        f"{found['model']} on {provenance['device']}, {provenance['dtype']}: {found['wall_s']:.0f} s in all; "
        f"fit {found['fit']}; measuring held, in bytes: {found['memory']}"
    )
    table = Table("full rows of sequences of", "TFLOP/s a rank")
    for row in found["tflops_by_length"]:
        table.add_row(f"{row['length']:,} tokens", f"{row['tflops_per_s']:.4g}")
    console.print(table)
    table = Table("coefficient", "measured", "estimated", "ratio")
    for name, pair in found["coefficients"].items():
        ratio = pair["estimated"] / pair["measured"] if pair["measured"] else float("nan")
        table.add_row(name, f"{pair['measured']:.4g}", f"{pair['estimated']:.4g}", f"{ratio:.3f}")
    console.print(table)


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


def said_and_held(shape: ModelShape, measured: Profile, ranks: int) -> dict[str, float]:
    """Bytes that a rank was said to hold, the process apart, and the peak of the largest row that was timed."""
    from flexsp.estimate.cluster import DTYPES
    from flexsp.profiler.parts import needed_bytes  # needs torch

    told = measured.provenance
    tokens, weight_bytes = told["probe_tokens"], DTYPES[told["weights"]]
    said = needed_bytes(shape, tokens, told["dtype"], weight_bytes=weight_bytes, ranks=ranks)
    held = max(peak["bytes"] for peak in told["peaks"] if peak["tokens"] <= tokens)
    return {"said": said, "held": held}


def coefficients(measured: Profile, estimated: Profile) -> dict[str, dict[str, float]]:
    """Of both, those that were measured: what the file says is estimated or counted would be compared with itself."""
    first, second, where = _flat(measured), _flat(estimated), measured.provenance["fields"]
    return {
        name: {"measured": value, "estimated": second[name]}
        for name, value in first.items()
        if name in second and not _where_from(name, where).startswith(("estimated", "counted"))
    }


def _flat(profile: Profile) -> dict[str, float]:
    """Every number, by its path in the file."""
    document = profile.to_json()
    found: dict[str, float] = {}

    def walk(value: Any, path: str) -> None:
        if isinstance(value, dict):
            for key, each in value.items():
                walk(each, f"{path}.{key}" if path else key)
        elif isinstance(value, (int, float)):
            found[path] = value

    walk({key: document[key] for key in ("compute", "all_to_all", "memory")}, "")
    return found | ({} if profile.optimizer_s is None else {"optimizer_s": profile.optimizer_s})


def _where_from(name: str, where: Any) -> str:
    """What `provenance.fields` says of a number. A latency is from where its degree's bandwidth is."""
    name = name.replace("latency_s", "bandwidth_bytes_per_s")
    return str(where[max((field for field in where if name == field or name.startswith(f"{field}.")), key=len)])


if __name__ == "__main__":
    main()
