"""What activation policies hold and cost, and the loss in chunks against the loss at once; on a CPU or a GPU.

    python benchmarks/memory.py [--model CONFIG.json] [--tokens 1024] [--vocabulary 32000] [--output FILE.json]

Runs the real executor on one rank. A row of `tokens` tokens goes through forward and backward under every policy, in
turns with the same row under none: as one sequence, and as sixteen. Peaks are of half the row and of all of it, so that
what does not grow with the tokens drops out: on CUDA the allocator's, on a CPU the bytes of all live tensors. The loss
is that of one layer with a large vocabulary, for chunks of several sizes.

On a CPU offload is left out: there is nowhere to go.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, PreTrainedConfig

import flexsp
from flexsp import jsonfields
from flexsp.data import PlannedBatch
from flexsp.estimate import model_shape
from flexsp.estimate.shape import POLICIES
from flexsp.parallel import GroupPool, prepare_model
from flexsp.profiler.make import device_name
from flexsp.profiler.memory import most_live_bytes
from flexsp.profiler.parts import build_part, read_model_config
from flexsp.profiler.points import Part, Point
from flexsp.profiler.policies import ProbeUnder
from flexsp.profiler.probe import Probe, timed_step
from flexsp.train.ranks import joined_ranks

ROUNDS = 5
ROWS = (1, 16)
"""A row holds so many sequences."""
CHUNKS = (8, 4, 2, 1)
"""A row is cut into so many chunks for the loss; 1 is all of its logits at once."""
ROOM_BYTES = 16 * 2**30
"""For activations, in the column of tokens that a device holds."""
SIZES = ("model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads", "vocab_size")
SMALL = LlamaConfig(
    vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=8, num_attention_heads=8,
    num_key_value_heads=4, max_position_embeddings=65536, pad_token_id=None, bos_token_id=None, eos_token_id=None,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a Hugging Face config (default: a Llama of 8 layers, 256 wide)")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=32000, help="of the loss")
    parser.add_argument("--output", help="default: benchmarks/results/memory.json, or memory_cuda.json")
    arguments = parser.parse_args()
    config = read_model_config(arguments.model) if arguments.model else SMALL
    torch.set_num_threads(1)
    with joined_ranks(600) as device:
        groups = GroupPool()
        policies = policy_rows(config, arguments.tokens, device, groups)
        losses = loss_rows(config, arguments.tokens, arguments.vocabulary, device, groups)
        document = {
            "model": {key: getattr(config, key) for key in SIZES},
            "tokens": arguments.tokens, "loss_vocabulary": arguments.vocabulary, "room_bytes": ROOM_BYTES,
            "policies": policies, "loss": losses,
            "provenance": {
                "device": device_name(device), "machine": f"{platform.machine()}, {os.cpu_count()} cores, one used",
                "date": datetime.date.today().isoformat(),
                "versions": {
                    "flexsp": flexsp.__version__, "torch": torch.__version__, "transformers": transformers.__version__,
                    "python": platform.python_version(),
                },
                "rounds": ROUNDS,
            },
        }  # fmt: skip
        show(policies, f"{arguments.tokens:,} tokens under each policy, {device_name(device)}")
        show(losses, f"the loss of {arguments.tokens:,} tokens, vocabulary of {arguments.vocabulary:,}")
        name = "memory.json" if device.type == "cpu" else f"memory_{device.type}.json"
        jsonfields.write_object(Path(arguments.output or Path(__file__).parent / "results" / name), document)


def probe_of(
    config: PreTrainedConfig, layers: int, vocabulary: int, chunk: int, tokens: int, device: Any, groups: Any
) -> Probe:
    """A model of so many layers on this rank; half precision is computed in on CUDA."""
    model = build_part(config, layers, vocabulary, tokens, device)
    half = torch.bfloat16 if device.type == "cuda" else None
    prepare_model(model, param_dtype=half, loss_chunk_tokens=chunk)
    return Probe(model, groups, Part(layers=layers, head=1.0, whole=True))


def policy_rows(config: PreTrainedConfig, tokens: int, device: torch.device, groups: GroupPool) -> list[dict[str, Any]]:
    """By policy: bytes a token, as measured and as estimated, seconds over those of none, tokens that a device holds.

    The loss is in chunks of an eighth of the row, so that layers and not logits are what is seen.
    """
    text = config.get_text_config()
    shape = model_shape(config.to_dict())
    probe = probe_of(config, text.num_hidden_layers, text.vocab_size, max(1, tokens // 8), tokens, device, groups)
    itemsize = 2 if device.type == "cuda" else 4
    found: list[dict[str, Any]] = []
    for policy in POLICIES:
        if policy == "offload" and device.type == "cpu":
            continue
        under = ProbeUnder(probe, policy)
        under.run(tokens)
        half, whole = (peak_bytes(partial(under.run, size), device) for size in (tokens // 2, tokens))
        per_token = (whole - half) / (tokens - tokens // 2)
        row: dict[str, Any] = {
            "policy": policy,
            "bytes_per_token": round(per_token),
            "estimated_bytes_per_token": shape.activation_bytes_per_token(policy, itemsize),
            "tokens_held": int(ROOM_BYTES / per_token),
        }
        for count in ROWS:
            point = Point(1, (tokens // count,) * count)
            batches = [each.batch(point.mixes(probe.world_size)) for each in (ProbeUnder(probe, "none"), under)]
            none_s, own_s = in_turns([partial(timed_step, probe.model, batch, groups) for batch in batches])
            row |= {f"seconds_of_{count}": min(own_s), f"over_none_of_{count}": ratio(own_s, none_s)}
        found.append(row)
    return found


def loss_rows(
    config: PreTrainedConfig, tokens: int, vocabulary: int, device: torch.device, groups: GroupPool
) -> list[dict[str, Any]]:
    """By chunk: peak bytes, those of few tokens beside, and seconds of a row through one layer, head and loss."""
    probes = [probe_of(config, 1, vocabulary, -(-tokens // count), tokens, device, groups) for count in CHUNKS]
    batch: PlannedBatch = probes[0].batch(Point(1, (tokens // 16,) * 16).mixes(1))
    few: PlannedBatch = probes[0].batch(Point(1, (1,) * 16).mixes(1))
    for probe in probes:
        timed_step(probe.model, batch, groups)
    peaks = [peak_bytes(partial(timed_step, probe.model, batch, groups), device) for probe in probes]
    at_rest = peak_bytes(partial(timed_step, probes[0].model, few, groups), device)
    seconds = in_turns([partial(timed_step, probe.model, batch, groups) for probe in probes])
    return [
        {
            "chunk_tokens": -(-tokens // count), "chunk_logits_bytes": 4 * vocabulary * -(-tokens // count),
            "peak_bytes": peak, "peak_of_few_tokens_bytes": at_rest, "peak_over_at_once": round(peak / peaks[-1], 3),
            "seconds": min(own_s), "seconds_over_at_once": ratio(own_s, seconds[-1]),
        }
        for count, peak, own_s in zip(CHUNKS, peaks, seconds, strict=True)
    ]  # fmt: skip


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes that a run holds beyond what was there before."""
    if device.type != "cuda":
        return most_live_bytes(run)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def in_turns(runs: Sequence[Callable[[], float]]) -> list[list[float]]:
    """Seconds of each, run one after another in turn, after a round that does not count."""
    taken = [[run() for run in runs] for _ in range(ROUNDS + 1)][1:]
    return [list(each) for each in zip(*taken, strict=True)]


def ratio(own_s: Sequence[float], other_s: Sequence[float]) -> float:
    """The median of the ratios of seconds taken right after one another."""
    return round(statistics.median(own / other for own, other in zip(own_s, other_s, strict=True)), 3)


def show(rows: Sequence[dict[str, Any]], title: str) -> None:
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column.replace("_", " "), justify="right")
    for row in rows:
        table.add_row(
            *(f"{v:,}" if isinstance(v, int) else f"{v:.3f}" if isinstance(v, float) else v for v in row.values())
        )
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
