"""Attention as in a textbook, in fp64, and the cases that kernels are compared with it on.

Letters: T = queries' tokens, S = keys' tokens, N = heads, K = KV heads, H = head_dim, V = head_dim of the values.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flexsp.parallel.kernels import Block, Kernel, Need, Scores


@dataclass(frozen=True)
class Case:
    sizes_q: tuple[int, ...]
    sizes_k: tuple[int, ...] | None = None  # None: those of the queries
    causal: bool = True
    heads: tuple[int, int] = (2, 2)  # of queries, of keys and values
    dims: tuple[int, int] = (8, 8)  # of queries and keys, of values
    scaling: float = 0.35
    window: int | None = None
    softcap: float | None = None
    positions: tuple[tuple[int, ...], tuple[int, ...]] | None = None  # of each query, of each key
    device: str = "cpu"

    @property
    def block(self) -> Block:
        q, k = (None, None) if self.positions is None else (torch.tensor(p, device=self.device) for p in self.positions)
        return Block.of(
            self.sizes_q,
            self.sizes_k or self.sizes_q,
            causal=self.causal,
            positions_q=q,
            positions_k=k,
            device=self.device,
        )

    @property
    def scores(self) -> Scores:
        return Scores(scaling=self.scaling, window=self.window, softcap=self.softcap)

    def need(self, dtype: torch.dtype = torch.float64, blocks: bool = True) -> Need:
        return Need(
            device_type=self.device, dtype=dtype, head_dim=self.dims[0], value_dim=self.dims[1], window=self.window,
            softcap=self.softcap, by_positions=self.positions is not None, blocks=blocks,
        )  # fmt: skip

    def tensors(self, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """Queries, keys, values and the gradient of the output."""
        torch.manual_seed(0)
        T, S = sum(self.sizes_q), sum(self.sizes_k or self.sizes_q)
        (N, K), (H, V) = self.heads, self.dims
        shapes = [(T, N, H), (S, K, H), (S, K, V), (T, N, V)]
        return [torch.randn(shape, dtype=torch.float64).to(self.device, dtype) for shape in shapes]

    def seen(self) -> Tensor:
        """(T, S) bool, entry by entry."""
        sizes_k = self.sizes_k or self.sizes_q
        runs = [[run for run, n in enumerate(sizes) for _ in range(n)] for sizes in (self.sizes_q, sizes_k)]
        places = self.positions or [[i for n in sizes for i in range(n)] for sizes in (self.sizes_q, sizes_k)]
        mask = torch.zeros(len(runs[0]), len(runs[1]), dtype=torch.bool)
        for i, (run_q, q) in enumerate(zip(runs[0], places[0], strict=True)):
            for j, (run_k, k) in enumerate(zip(runs[1], places[1], strict=True)):
                near = self.window is None or q - k < self.window
                mask[i, j] = run_q == run_k and (k <= q or not self.causal) and near
        return mask.to(self.device)


def textbook(case: Case, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(T, N, V) and (T, N), in fp64; nothing where nothing is seen."""
    seen, outs, lses = case.seen(), [], []
    for head in range(case.heads[0]):
        kv_head = head * case.heads[1] // case.heads[0]
        scores = q[:, head].double() @ k[:, kv_head].double().T * case.scaling
        if case.softcap is not None:
            scores = case.softcap * torch.tanh(scores / case.softcap)
        weights = scores.exp() * seen  # small scores: no maximum to subtract
        total = weights.sum(1, keepdim=True)
        outs.append(weights / total.where(total > 0, 1) @ v[:, kv_head].double())
        lses.append(total.squeeze(1).log())
    return torch.stack(outs, 1), torch.stack(lses, 1)


def textbook_gradients(case: Case, q: Tensor, k: Tensor, v: Tensor, dout: Tensor) -> tuple[Tensor, ...]:
    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    return torch.autograd.grad(textbook(case, *inputs)[0], inputs, dout.double())


CASES = {
    "causal": Case((7, 1, 12)),
    "one token": Case((1,)),
    "runs of none": Case((0, 5, 0, 6, 0)),
    "no runs": Case(()),
    "grouped heads": Case((7, 9), heads=(6, 2)),
    "one KV head": Case((7, 9), heads=(4, 1)),
    "narrow values": Case((7, 9), dims=(8, 5)),
    "wide values, grouped heads": Case((7, 9), heads=(4, 2), dims=(4, 6)),
    "window 1": Case((7, 1, 9), window=1),
    "window 3": Case((7, 2, 0, 14), window=3, heads=(4, 2)),
    "window 3, narrow values": Case((7, 2, 14), window=3, dims=(8, 5)),
    "wide window": Case((7, 9), window=50),
    "softcap": Case((7, 9), softcap=0.7, heads=(4, 2)),
    "softcap and window": Case((7, 9), softcap=0.7, window=4),
    "scaling": Case((7, 9), scaling=0.05),
    "not causal": Case((3, 0, 4, 1), (5, 2, 1, 1), causal=False, heads=(4, 2)),
    "not causal, no keys": Case((3, 4), (0, 5), causal=False),
    "not causal, nothing": Case((3, 0), (0, 5), causal=False),
    "no queries": Case((0, 0), (2, 5), causal=False),
    # two sequences of 8 and 6 tokens on a zigzag of two ranks: this one's queries, the other one's keys
    "positions": Case((4, 2), (4, 4), positions=((0, 1, 6, 7, 0, 5), (2, 3, 4, 5, 1, 2, 3, 4))),
    "positions, window": Case((4, 2), (4, 4), window=3, positions=((0, 1, 6, 7, 0, 5), (2, 3, 4, 5, 1, 2, 3, 4))),
    "positions, softcap": Case((4,), (4,), softcap=0.7, heads=(4, 1), positions=((0, 1, 6, 7), (0, 1, 6, 7))),
    "positions, not in order": Case((5,), (4,), positions=((6, 0, 3, 1, 2), (3, 2, 0, 5)), dims=(4, 6)),
    "positions, all in the future": Case((2,), (3,), positions=((0, 1), (4, 5, 6))),
    "positions, window, not causal": Case((4,), (4,), causal=False, window=2, positions=((0, 1, 6, 7), (2, 3, 4, 5))),
}


def compare_attend(kernel: Kernel, case: Case, dtype: torch.dtype, tolerance: float, dropout: float = 0.0) -> None:
    """Output and gradients of `attend`."""
    q, k, v, dout = case.tensors(dtype)
    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    out = kernel.attend(*inputs, case.block, case.scores, dropout)
    grads = torch.autograd.grad(out, inputs, dout)
    expected = [textbook(case, q, k, v)[0], *textbook_gradients(case, q, k, v, dout)]
    for ours, theirs in zip((out, *grads), expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


def compare_blocks(kernel: Kernel, case: Case, dtype: torch.dtype, tolerance: float) -> None:
    """Output, log-sums and gradients of `forward` and `backward`."""
    q, k, v, dout = case.tensors(dtype)
    out, lse = kernel.forward(q, k, v, case.block, case.scores)
    assert lse.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    grads = kernel.backward(dout, q, k, v, out, lse, case.block, case.scores)
    expected = [*textbook(case, q, k, v), *textbook_gradients(case, q, k, v, dout)]
    for ours, theirs in zip((out, lse, *grads), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)
