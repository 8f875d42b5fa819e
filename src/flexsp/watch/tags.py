"""A row of metrics.jsonl as scalars under tags, as TensorBoard and Weights & Biases show them: `train/loss`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FOLDERS = {
    "loss": "train",
    "grad_norm": "train",
    "lr": "train",
    "num_sequences": "data",
    "tokens": "data",
    "micro_batches": "plan",
    "communicators": "plan",
    "fallback": "plan",
    "skipped": "train",
    "tokens_per_s": "speed",
    "model_flops": "speed",
    "tflops_per_s": "speed",
    "mfu": "speed",
    "ratios": "profile",
}
"""Of keys whose ending does not say it."""
ENDINGS = {"_share": "share", "_bytes": "memory", "_s": "time"}
ELSE = "more"
"""The folder of keys that nobody named here."""


def tag_of(key: str) -> str:
    """The tag of a key: its folder, and the key itself."""
    if key in FOLDERS:
        return f"{FOLDERS[key]}/{key}"
    if key.startswith("eval_"):
        return f"eval/{key}"
    return next((f"{folder}/{key}" for end, folder in ENDINGS.items() if key.endswith(end)), f"{ELSE}/{key}")


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """By tag, the numbers of a row: of `micro_batches` how many there are, of `ratios` each; other lists are left out.

    Args:
        row: of one step.
    """
    found: dict[str, float] = {}
    for key, value in row.items():
        if key == "step":
            continue
        if key == "micro_batches":
            found[tag_of(key)] = float(len(value))
        elif isinstance(value, Mapping):
            found |= {f"{tag_of(key)}/{name}": float(x) for name, x in value.items() if isinstance(x, int | float)}
        elif isinstance(value, int | float):
            found[tag_of(key)] = float(value)
    return found
