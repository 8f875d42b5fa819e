"""What every attention kernel is given and gives: packed queries meet packed keys, run by run.

Letters: T = queries' tokens, S = keys' tokens, N = heads, K = KV heads (divides N), H = head_dim of queries and keys,
V = head_dim of values.

    sizes_q  3 2      q q q | q q            the first run of queries meets the first run of keys, and so on;
    sizes_k  3 4      k k k | k k k k        nothing crosses a |

`attend` is what a model's layer calls. `forward` and `backward` are its two halves by hand, with the softmax's log-sum,
for those who put attention together from blocks (ring attention, arXiv 2310.01889): outputs of several blocks of
keys merge by their log-sums, and the gradient of each block needs the merged ones alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """How queries and keys become weights."""

    scaling: float
    """Factor of the scores, usually H ** -0.5."""
    window: int | None = None
    """A token sees itself and the window - 1 tokens before it; None sees all of them."""
    softcap: float | None = None
    """Scores become softcap * tanh(score / softcap), after the scaling and before masking."""

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 1:
            raise ValueError(f"window={self.window}: a token sees itself at least; give 1 or more, or None")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap={self.softcap} must be positive; give None for scores without a cap")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Block:
    """Which packed queries meet which packed keys: the i-th run of queries the i-th run of keys, nothing else.

    A query sees a key of its run if the key is not after it (where `causal`) and less than a window before it (where
    there is one); before and after go by the positions, or without them by the index in the run.
    """

    sizes_q: tuple[int, ...]
    """Tokens of each run of queries; their sum is T. A run may be empty."""
    sizes_k: tuple[int, ...]
    """Tokens of each run of keys; their sum is S. Without positions, those of sizes_q if causal or windowed."""
    causal: bool
    """Else every query sees every key of its run that a window leaves."""
    cu_seqlens_q: Tensor
    """(runs + 1,) int32 on the tokens' device: 0 and the running sums of sizes_q."""
    cu_seqlens_k: Tensor
    """The same of sizes_k."""
    positions_q: Tensor | None = None
    """(T,) int64, place of each query in its sequence."""
    positions_k: Tensor | None = None
    """(S,) int64, place of each key."""

    def __post_init__(self) -> None:
        assert len(self.sizes_q) == len(self.sizes_k)
        assert (self.positions_q is None) == (self.positions_k is None)
        assert self.by_positions or not self.causal or self.sizes_q == self.sizes_k

    @classmethod
    def of(
        cls,
        sizes_q: Sequence[int],
        sizes_k: Sequence[int],
        *,
        causal: bool,
        positions_q: Tensor | None = None,
        positions_k: Tensor | None = None,
        device: torch.device | str = "cpu",
    ) -> Block:
        """The block with its cu_seqlens made from the sizes. On CUDA this copies from the host: once for all layers."""
        cu_q, cu_k = (
            torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device=device) for sizes in (sizes_q, sizes_k)
        )
        return cls(
            sizes_q=tuple(sizes_q), sizes_k=tuple(sizes_k), causal=causal,
            cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, positions_q=positions_q, positions_k=positions_k,
        )  # fmt: skip

    @property
    def by_positions(self) -> bool:
        """Whether what is seen goes by positions."""
        return self.positions_q is not None

    @property
    def sees_nothing(self) -> bool:
        """Whether no query meets a key at all."""
        return not any(q and k for q, k in zip(self.sizes_q, self.sizes_k, strict=True))

    def runs(self) -> Iterator[tuple[slice, slice]]:
        """Rows of the queries and rows of the keys of each run that has both."""
        ends_q, ends_k = (pairwise(accumulate(sizes, initial=0)) for sizes in (self.sizes_q, self.sizes_k))
        for (first_q, end_q), (first_k, end_k) in zip(ends_q, ends_k, strict=True):
            if first_q < end_q and first_k < end_k:
                yield slice(first_q, end_q), slice(first_k, end_k)


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a layer asks of a kernel."""

    device_type: str
    """"cpu" or "cuda"."""
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    window: int | None = None
    softcap: float | None = None
    by_positions: bool = False
    """Its blocks have positions."""
    blocks: bool = False
    """`forward` and `backward` are needed, not only `attend`."""
    dropout: bool = False
    """Weights are dropped out; `attend` only."""

    @classmethod
    def of(
        cls,
        q: Tensor,
        v: Tensor,
        scores: Scores,
        *,
        by_positions: bool = False,
        blocks: bool = False,
        dropout: float = 0.0,
    ) -> Need:
        """The need of these queries and values, whatever their first dimensions."""
        return cls(
            device_type=q.device.type, dtype=q.dtype, head_dim=q.shape[-1], value_dim=v.shape[-1],
            window=scores.window, softcap=scores.softcap,
            by_positions=by_positions, blocks=blocks, dropout=dropout > 0,
        )  # fmt: skip


def wide_dtype(x: Tensor) -> torch.dtype:
    """What sums over the keys are in: fp32 for half precision and fp32, fp64 for fp64."""
    return torch.promote_types(x.dtype, torch.float32)


class Kernel(ABC):
    """One way to compute attention. One instance each, without state; ask `choose` for the one that serves."""

    name: ClassVar[str]

    @abstractmethod
    def refuses(self, need: Need) -> str | None:
        """Why it cannot compute this, in half a sentence, or None. What it refuses it may compute wrongly."""

    def attend(
        self, q_TNH: Tensor, k_SKH: Tensor, v_SKV: Tensor, block: Block, scores: Scores, dropout: float = 0.0
    ) -> Tensor:
        """Attention, with autograd through it.

        Args:
            q_TNH: (T, N, H).
            k_SKH: (S, K, H), K a divisor of N.
            v_SKV: (S, K, V).
            block: who meets whom.
            scores: how they become weights.
            dropout: probability, where the kernel was asked for it.

        Returns:
            (T, N, V), dtype of the queries. A query that sees no key: 0.
        """
        assert dropout == 0.0, f"{self.name} has no dropout here"
        out: Tensor = _Attend.apply(q_TNH, k_SKH, v_SKV, self, block, scores)  # type: ignore[no-untyped-call]
        return out

    def forward(
        self, q_TNH: Tensor, k_SKH: Tensor, v_SKV: Tensor, block: Block, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        """Attention and the log of the softmax's sum, without autograd.

        Returns:
            out (T, N, V), dtype of the queries, and lse (T, N), fp32 (fp64 for fp64): the natural logarithm of the sum
            of exp(score) over the keys that a query sees. A query that sees no key: 0 and -inf.
        """
        raise AssertionError(f"{self.name} refuses blocks")

    def backward(
        self,
        dout_TNV: Tensor,
        q_TNH: Tensor,
        k_SKH: Tensor,
        v_SKV: Tensor,
        out_TNV: Tensor,
        lse_TN: Tensor,
        block: Block,
        scores: Scores,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The block's share of the gradients of a softmax that may reach over more keys than the block has.

        Args:
            dout_TNV: (T, N, V), the gradient of the whole softmax's output.
            q_TNH, k_SKH, v_SKV: as `forward` had them.
            out_TNV, lse_TN: the whole softmax's output and log-sum (arXiv 2307.08691: the weights are
                exp(score - lse), and the scores' gradient is weights * (dout @ v - rowsum(dout * out))).
            block, scores: as `forward` had them.

        Returns:
            dq (T, N, H), dk (S, K, H), dv (S, K, V), dtype of the queries. dq is to be summed over the blocks of keys.
        """
        raise AssertionError(f"{self.name} refuses blocks")


class _Attend(torch.autograd.Function):
    """A kernel's forward and backward, joined: keeps inputs, output and log-sum, and no scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, kernel: Kernel, block: Block, scores: Scores) -> Tensor:
        out, lse = kernel.forward(q, k, v, block, scores)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.kernel, ctx.block, ctx.scores = kernel, block, scores
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.kernel.backward(dout, *ctx.saved_tensors, ctx.block, ctx.scores)
        return *grads, None, None, None
