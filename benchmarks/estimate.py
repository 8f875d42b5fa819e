"""Estimated against published coefficients: GPT-7B, 13B and 30B on 64 A100-40GB, with one set of efficiencies.

    python benchmarks/estimate.py          prints the tables and writes results/estimate.json
    python benchmarks/estimate.py --check  and exits with 1 where a time is off by more than 25 %

Published are `examples/profiles/gpt-*-64xa100.json`; estimated is what `flexsp estimate` makes of
`examples/models/gpt-*.json` with the cluster `a100-40`, with gradients reduced in bfloat16 (float32 is shown beside),
and with the loss over all tokens at once, as that system computes it: logits are bytes a token, and made once.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import flexsp
from flexsp.estimate import load_cluster, load_model_shape, memory, seconds
from flexsp.estimate.shape import POLICIES
from flexsp.profile import Profile

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
SIZES = ("7b", "13b", "30b")
DTYPE = "bfloat16"
LOGIT_BYTES = 2 + 4 + 4
"""Of one logit there, as far as is known: as computed, in fp32 for the loss, and its gradient."""
FRACTION = 0.9
"""Of a device's memory, as `flexsp estimate` takes it."""
BAND = 0.25
"""How far a time may be off."""


def rows_of(size: str) -> list[dict[str, Any]]:
    """Every coefficient of one model, estimated and published."""
    shape = load_model_shape(EXAMPLES / "models" / f"gpt-{size}.json")
    published = Profile.load(EXAMPLES / "profiles" / f"gpt-{size}-64xa100.json")
    cluster = load_cluster("a100-40").with_devices(published.num_devices)
    linear = seconds.linear_s(shape, cluster, DTYPE, loss_in_chunks=False)
    launches_s = shape.num_layers * cluster.layer_launch_s
    share_bytes, whole_bytes = memory.model_state_bytes(shape, cluster.num_devices, DTYPE, zero_stage=3)
    fixed_s = {
        reduce: seconds.parameter_traffic_s(shape, cluster, DTYPE, 3, reduce)[0] + launches_s
        for reduce in ("bfloat16", "float32")
    }
    pairs: list[tuple[str, float, float, bool]] = [
        ("quadratic_s", seconds.quadratic_s(shape, cluster, DTYPE), published.compute.quadratic_s, True),
        ("linear_s", linear, published.compute.linear_s, True),
        ("fixed_s, gradients in bfloat16", fixed_s["bfloat16"], published.compute.fixed_s, True),
        ("fixed_s, gradients in float32", fixed_s["float32"], published.compute.fixed_s, False),
        ("bytes_per_token", shape.exchange_bytes_per_token(2), published.all_to_all.bytes_per_token, True),
        *(
            (f"bandwidth_bytes_per_s[{d}]", seconds.exchange_bytes_per_s(cluster, d), rate, True)
            for d, rate in published.all_to_all.bandwidth_bytes_per_s.items()
        ),
        ("memory_bytes", FRACTION * cluster.memory_bytes, published.memory.memory_bytes, False),
        ("model_state_bytes, sharded", share_bytes, published.memory.model_state_bytes, True),
        (
            "model_state_bytes, with what is gathered",
            share_bytes + whole_bytes,
            published.memory.model_state_bytes,
            False,
        ),
        *(
            (
                f"activation_bytes_per_token, {policy}",
                shape.activation_bytes_per_token(policy, 2) + LOGIT_BYTES * shape.vocab_size,
                published.memory.activation_bytes_per_token,
                False,
            )
            for policy in POLICIES
        ),
    ]
    return [
        {"coefficient": name, "estimated": ours, "published": theirs, "ratio": round(ours / theirs, 3), "held": held}
        for name, ours, theirs, held in pairs
    ]


def markdown(tables: dict[str, list[dict[str, Any]]]) -> str:
    """One table, the models side by side."""
    lines = [
        "| coefficient | " + " | ".join(f"{size.upper()} est. | publ. | ratio" for size in tables) + " |",
        "| --- |" + " ---: | ---: | ---: |" * len(tables),
    ]
    for each in zip(*tables.values(), strict=True):
        cells = [f"{r['estimated']:.4g} | {r['published']:.4g} | {r['ratio']:.2f}" for r in each]
        lines.append(f"| {each[0]['coefficient']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="exit with 1 where a time is off by more than 25 %%")
    arguments = parser.parse_args()
    tables = {size: rows_of(size) for size in SIZES}
    print(markdown(tables))
    (HERE / "results").mkdir(exist_ok=True)
    document = {"flexsp": flexsp.__version__, "cluster": "a100-40", "dtype": DTYPE, "models": tables}
    (HERE / "results" / "estimate.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    off = [
        f"gpt-{size}: {row['coefficient']}: {row['ratio']}"
        for size, rows in tables.items()
        for row in rows
        if row["held"] and abs(row["ratio"] - 1) > BAND
    ]
    if arguments.check and off:
        print("\n".join(off), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
