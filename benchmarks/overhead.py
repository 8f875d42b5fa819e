"""What does the executor cost where it has nothing to do? Degree 1 against plain FSDP2 without flexsp, in turns.

    torchrun --nproc-per-node 2 benchmarks/overhead.py [--output FILE.json]

Both train the same Llama on the same tokens, one sequence a rank and micro-batch, so that neither packs anything:

    plain     transformers' own attention ("sdpa"), fully_shard on each layer and the model, cross_entropy on the logits
    flexsp    prepare_model and forward_backward of a plan of degree 1

A round runs both, and the order alternates. The ratio is the median of the rounds' own, with their quartiles.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from flexsp import jsonfields
from flexsp.data import PlannedBatch
from flexsp.parallel import GroupPool, forward_backward, prepare_model
from flexsp.plans import Group, MicroBatch, Plan

TOKENS = {"cpu": (256, 1024), "cuda": (4096, 16384)}
"""Of a rank's sequence."""
MICRO_BATCHES = 2
ROUNDS = 15
SIZES = {
    "cpu": dict(vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=8,
                num_key_value_heads=4),
    "cuda": dict(vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
                 num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=True),
}  # fmt: skip
"""On CUDA those of Llama 3.2 1B."""


class Tokens:
    """The same tokens for both, drawn by sequence."""

    def __init__(self, length: int, vocab_size: int) -> None:
        self.length, self.vocab_size = length, vocab_size

    def whole(self, sequence: int) -> np.ndarray:
        return np.random.default_rng(sequence).integers(0, self.vocab_size, self.length)

    def read(self, sequence: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        tokens = self.whole(sequence)
        return tokens[start:stop], np.append(tokens[1:], -100)[start:stop]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", default=str(Path(__file__).parent / "results" / "overhead_cpu.json"))
    output = Path(parser.parse_args().output)
    cuda = torch.cuda.is_available()
    dist.init_process_group("cuda:nccl,cpu:gloo" if cuda else "gloo")
    device = torch.device("cuda", dist.get_node_local_rank()) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    torch.set_num_threads(1)
    groups = GroupPool()
    rows = [measured(length, device, groups) for length in TOKENS[device.type]]
    if dist.get_rank() == 0:
        what = torch.cuda.get_device_name() if cuda else "gloo ranks, not run on a GPU"
        document = {
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, {dist.get_world_size()} x {what}",
            "date": datetime.date.today().isoformat(),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "model": SIZES[device.type], "micro_batches": MICRO_BATCHES, "rounds": ROUNDS, "rows": rows,
        }  # fmt: skip
        jsonfields.write_object(output, document)
        for row in rows:
            print(
                f"{row['tokens']:,} tokens a rank: flexsp over plain FSDP2 {row['ratio']:.3f} "
                f"(quartiles of the rounds {row['quartiles'][0]:.3f} to {row['quartiles'][1]:.3f}); "
                f"loss differs by {row['loss_difference']:.1e}"
            )
        print(f"saved as {output}")
    dist.destroy_process_group()


def measured(length: int, device: torch.device, groups: GroupPool) -> dict[str, Any]:
    """Both in turns on rows of one length."""
    config = LlamaConfig(**SIZES[device.type], max_position_embeddings=max(2048, length))
    world_size = dist.get_world_size()
    source = Tokens(length, config.vocab_size)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32

    plain = built(config, dtype, device, attn_implementation="sdpa")
    for layer in plain.model.layers:
        fully_shard(layer)
    fully_shard(plain)
    plain.train()
    ours = prepare_model(built(config, dtype, device))
    plan = Plan(
        num_devices=world_size,
        micro_batches=tuple(
            MicroBatch(groups=tuple(Group(ranks=(r,), sequences=(m * world_size + r,)) for r in range(world_size)))
            for m in range(MICRO_BATCHES)
        ),
    )
    count = MICRO_BATCHES * world_size
    batch = PlannedBatch(
        step=0, sequence_ids=np.arange(count), lengths=np.full(count, length), plan=plan, source=source
    )
    runs: dict[str, Callable[[], float]] = {
        "plain": lambda: plain_step(plain, source, device),
        "flexsp": lambda: forward_backward(ours, batch, groups).loss,
    }
    losses = {name: run() for name, run in runs.items()}  # a warm-up
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(ROUNDS):
        for name in sorted(runs, reverse=i % 2 == 1):
            for model in (plain, ours):
                model.zero_grad()
            taken[name].append(seconds(runs[name], device, groups))
    ratios = [a / b for a, b in zip(taken["flexsp"], taken["plain"], strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    medians = {name: statistics.median(each) for name, each in taken.items()}
    return {
        "tokens": length, "plain_s": medians["plain"], "flexsp_s": medians["flexsp"],
        "ratio": statistics.median(ratios), "quartiles": [low, high],
        "loss_difference": abs(losses["flexsp"] - losses["plain"]),
    }  # fmt: skip


def built(config: LlamaConfig, dtype: torch.dtype, device: torch.device, **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    own = copy.deepcopy(config)  # which attention is used stands in it
    return AutoModelForCausalLM.from_config(own, dtype=dtype, **options).to(device)


def plain_step(model: PreTrainedModel, source: Tokens, device: torch.device) -> float:
    """Forward and backward of this rank's sequences as anyone would write it; the mean loss of all ranks."""
    world_size, rank = dist.get_world_size(), dist.get_rank()
    total = torch.zeros((), device=device)
    for m in range(MICRO_BATCHES):
        tokens = torch.from_numpy(source.whole(m * world_size + rank))[None].to(device)
        logits = model(input_ids=tokens, use_cache=False).logits
        loss = F.cross_entropy(logits[0, :-1].float(), tokens[0, 1:]) / MICRO_BATCHES
        loss.backward()
        total += loss.detach()
    dist.all_reduce(total)
    return total.item() / world_size


def seconds(run: Callable[[], float], device: torch.device, groups: GroupPool) -> float:
    """Of the slowest rank."""
    dist.barrier(group=groups.control)
    began = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    taken = torch.tensor(time.perf_counter() - began, dtype=torch.float64)
    dist.all_reduce(taken, op=dist.ReduceOp.MAX, group=groups.control)
    return taken.item()


if __name__ == "__main__":
    main()
