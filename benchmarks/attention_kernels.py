"""The attention kernels that serve on this machine, side by side: forward and backward, by length and kind.

    python benchmarks/attention_kernels.py                     results/kernels_cuda.json on a GPU, else kernels_cpu.json
    python benchmarks/attention_kernels.py --dtype bfloat16    in another precision

Kernels take turns, and the median of the turns counts. FLOPs are of the pairs that are seen alone: two matrix
products forward and five backward, each 2 * heads * head_dim per pair. They are set against the rate of a large matrix
product, measured in the same run, precision and clock. On the CPU one thread is used and its CPU time counts, so that
other load on the machine changes little.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flexsp
from flexsp.parallel.kernels import KERNELS, Block, Kernel, Need, Scores

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ON_CUDA = DEVICE == "cuda"
HEADS, KV_HEADS, HEAD_DIM = (32, 8, 128) if ON_CUDA else (8, 4, 64)
LENGTHS = (1024, 4096, 16384, 65536) if ON_CUDA else (256, 1024, 2048)
MIXED = (16384, 8192, 4096, *[1024] * 20, *[256] * 64) if ON_CUDA else (1024, 512, *[128] * 4, *[32] * 16)
WINDOW = 1024 if ON_CUDA else 128
MATRIX = 8192 if ON_CUDA else 1024
SLOW_TOKENS = 16384
"""`math` sits out rows with longer sequences."""
TURNS = 5


@dataclass(frozen=True)
class Case:
    """One row of sequences and what is asked of a kernel."""

    name: str
    sizes: tuple[int, ...]
    window: int | None = None
    softcap: float | None = None
    by_positions: bool = False
    blocks: bool = False

    def seen_pairs(self) -> int:
        """Pairs of query and key that causality and the window leave."""
        windows = [n if self.window is None else min(n, self.window) for n in self.sizes]
        return sum(w * (w + 1) // 2 + (n - w) * w for n, w in zip(self.sizes, windows, strict=True))


CASES = [
    *(Case(f"{n} tokens", (n,)) for n in LENGTHS),
    Case(f"{len(MIXED)} sequences of {min(MIXED)} to {max(MIXED)}", MIXED),
    Case(f"{LENGTHS[-1]} tokens, window {WINDOW}", (LENGTHS[-1],), window=WINDOW),
    Case(f"{LENGTHS[1]} tokens, softcap 50", (LENGTHS[1],), softcap=50.0),
    Case(f"{LENGTHS[1]} tokens, with log-sums", (LENGTHS[1],), blocks=True),
    Case(f"{LENGTHS[1]} tokens, with log-sums, by positions", (LENGTHS[1],), blocks=True, by_positions=True),
]


def job(kernel: Kernel, case: Case, dtype: torch.dtype) -> Callable[[], object] | None:
    """Forward and backward of one kernel, or None where it refuses or would take too long."""
    T = sum(case.sizes)
    shapes = [(T, HEADS), (T, KV_HEADS), (T, KV_HEADS), (T, HEADS)]
    q, k, v, dout = (torch.randn(*shape, HEAD_DIM, device=DEVICE, dtype=dtype) for shape in shapes)
    scores = Scores(scaling=HEAD_DIM**-0.5, window=case.window, softcap=case.softcap)
    need = Need.of(q, v, scores, by_positions=case.by_positions, blocks=case.blocks)
    if kernel.refuses(need) or (kernel.name == "math" and max(case.sizes) > SLOW_TOKENS):
        return None
    places = torch.cat([torch.arange(n) for n in case.sizes]).to(DEVICE) if case.by_positions else None
    block = Block.of(case.sizes, case.sizes, causal=True, positions_q=places, positions_k=places, device=DEVICE)

    def by_hand() -> tuple[Tensor, ...]:
        out, lse = kernel.forward(q, k, v, block, scores)
        return kernel.backward(dout, q, k, v, out, lse, block, scores)

    def by_autograd() -> tuple[Tensor, ...]:
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(kernel.attend(*inputs, block, scores), inputs, dout)

    return by_hand if case.blocks else by_autograd


def seconds(job: Callable[[], object]) -> float:
    """Of one call: CPU time, or on a GPU the time until it is done."""
    if not ON_CUDA:
        start = time.process_time()
        job()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    job()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def matrix_flops_per_s(dtype: torch.dtype) -> float:
    """The best rate of a large square matrix product."""
    a = torch.randn(MATRIX, MATRIX, device=DEVICE, dtype=dtype)
    seconds(lambda: a @ a)
    return 2 * MATRIX**3 / min(seconds(lambda: a @ a) for _ in range(10))


def measure(case: Case, dtype: torch.dtype, rate: float) -> list[dict[str, Any]]:
    """A row for each kernel that serves; the first is what others are related to."""
    jobs = {name: job(kernel, case, dtype) for name, kernel in KERNELS.items()}
    served = {name: one for name, one in jobs.items() if one is not None}
    for one in served.values():
        one()  # compiles, and fills caches
    turns = [{name: seconds(one) for name, one in served.items()} for _ in range(TURNS)]
    flops = 14 * case.seen_pairs() * HEADS * HEAD_DIM
    rows: list[dict[str, Any]] = []
    for name in served:
        median_s = statistics.median(turn[name] for turn in turns)
        first_s = rows[0]["median_s"] if rows else median_s
        rows.append({
            "case": case.name, "kernel": name, "median_s": median_s, "least_s": min(turn[name] for turn in turns),
            "times_the_first": round(median_s / first_s, 3), "tflop_per_s": round(flops / median_s / 1e12, 4),
            "of_matrix_rate": round(flops / median_s / rate, 3),
        })  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16" if ON_CUDA else "float32")
    dtype = getattr(torch, parser.parse_args().dtype)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rate = matrix_flops_per_s(dtype)
    rows = []
    print("| case | kernel | ms | times the first | TFLOP/s | of the matrix rate |")
    print("| --- | --- | ---: | ---: | ---: | ---: |")
    line = "| {case} | `{kernel}` | {ms:.1f} | {times_the_first:.2f} | {tflop_per_s:.3f} | {of_matrix_rate:.0%} |"
    for case in CASES:
        for row in measure(case, dtype, rate):
            rows.append(row)
            print(line.format(ms=row["median_s"] * 1e3, **row))
    machine = torch.cuda.get_device_name() if ON_CUDA else f"{os.cpu_count()} cores {platform.machine()}, one used"
    document = {
        "machine": machine,
        "date": datetime.date.today().isoformat(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "flexsp": flexsp.__version__},
        "dtype": str(dtype).removeprefix("torch."), "heads": HEADS, "kv_heads": KV_HEADS, "head_dim": HEAD_DIM,
        "matrix_tflop_per_s": round(rate / 1e12, 4), "rows": rows,
    }  # fmt: skip
    path = Path(__file__).parent / "results" / f"kernels_{DEVICE}.json"
    path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
