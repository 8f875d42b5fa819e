"""Ring attention for packed causal sequences (arXiv 2310.01889), zigzag-balanced, its gradient by hand.

Letters: t = tokens on this rank, N = heads, K = KV heads, H = head_dim, V = head_dim of the values, R = ring ranks.

Keys and values travel around the ring, a step at a time, while this rank's queries attend to those at hand. A step
gives the output over a part of the keys with the logarithm of its softmax's denominator; two such parts are put
together in fp32 (online softmax):

    lse = log(exp(lse_a) + exp(lse_b))        out = out_a exp(lse_a - lse) + out_b exp(lse_b - lse)

In the backward they travel again, and the gradient of a rank's keys and values travels behind them, gathering each
rank's part, until it is home after R steps. A kernel computes a part's gradient from the whole output and lse.

An attention sink is a score that takes part in the denominator alone: lse' = log(exp(lse) + exp(sink)).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from flexsp.parallel.channels import Channel
from flexsp.parallel.kernels import Block, Kernel, Scores, wide_dtype
from flexsp.parallel.row import Row


def ring_attention(
    q_tNH: Tensor,
    k_tKH: Tensor,
    v_tKV: Tensor,
    row: Row,
    ring: Channel | None,
    kernel_for: Callable[[Block], Kernel],
    scores: Scores,
    sinks_N: Tensor | None = None,
) -> Tensor:
    """Attention of this ring rank's tokens to those of their own sequences on all ring ranks; autograd through it.

    Args:
        q_tNH: (t, N, H), this rank's tokens, first pieces first.
        k_tKH: (t, K, H), K a divisor of N.
        v_tKV: (t, K, V).
        row: how the sequences lie on the ring.
        ring: the ring's ranks; None where it has one.
        kernel_for: the kernel that computes a block.
        scores: how queries and keys become weights.
        sinks_N: (N,) a score that every token of a head sees beside its keys, or None.

    Returns:
        (t, N, V) in the type of the queries.
    """
    out: Tensor = _Ring.apply(q_tNH, k_tKH, v_tKV, sinks_N, row, ring, kernel_for, scores)  # type: ignore[no-untyped-call]
    return out


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: Tensor | None,
        row: Row,
        ring: Channel | None,
        kernel_for: Callable[[Block], Kernel],
        scores: Scores,
    ) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # they may be views of what all-to-all received
        out = q.new_zeros((*q.shape[:2], v.shape[2]), dtype=wide_dtype(q))
        lse = q.new_full(q.shape[:2], -torch.inf, dtype=wide_dtype(q))
        for source, (k_source, v_source) in _around((k, v), row, ring):
            for meeting in row.meetings(source, scores.window):
                queries, keys = meeting.queries, meeting.keys
                kernel = kernel_for(meeting.block)
                part = kernel.forward(q[queries], k_source[keys], v_source[keys], meeting.block, scores)
                _merge(out[queries], lse[queries], *part)
        if sinks is not None:
            with_sinks = torch.logaddexp(lse, sinks.to(lse.dtype))
            out *= (lse - with_sinks).exp().unsqueeze(-1)
            lse = with_sinks
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse, sinks)
        ctx.row, ctx.ring, ctx.kernel_for, ctx.scores = row, ring, kernel_for, scores
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, sinks = ctx.saved_tensors
        row, ring, kernel_for, scores = ctx.row, ctx.ring, ctx.kernel_for, ctx.scores
        dout, wide = grads[0].contiguous(), wide_dtype(q)
        dq, dkv, pending = torch.zeros_like(q, dtype=wide), [], None
        for source, (k_source, v_source) in _around((k, v), row, ring):
            own = [torch.zeros_like(x, dtype=wide) for x in (k_source, v_source)]
            for meeting in row.meetings(source, scores.window):
                queries, keys = meeting.queries, meeting.keys
                part = kernel_for(meeting.block).backward(
                    dout[queries], q[queries], k_source[keys], v_source[keys], out[queries], lse[queries],
                    meeting.block, scores,
                )  # fmt: skip
                for total, gradient in zip((dq[queries], *(x[keys] for x in own)), part, strict=True):
                    total += gradient
            if pending is not None:  # what earlier ranks gathered for the same source
                pending.wait()
                own = [mine.add_(theirs) for mine, theirs in zip(own, dkv, strict=True)]
            if ring is None:
                dkv = own
            else:  # after the last step this brings our own keys' gradient home
                dkv = _room(own, row, source)
                pending = ring.shift(own, dkv)
        if pending is not None:
            pending.wait()
        dsinks = None if sinks is None else _sinks_gradient(sinks, dout, out, lse)
        return dq.to(q.dtype), dkv[0].to(k.dtype), dkv[1].to(v.dtype), dsinks, None, None, None, None


def _around(tensors: Sequence[Tensor], row: Row, ring: Channel | None) -> Iterator[tuple[int, list[Tensor]]]:
    """The tensors of every ring rank in turn, with whose they are, one's own first.

    The next ones travel while those handed out are used.
    """
    held = list(tensors)
    for step in range(row.ring):
        source = (row.ring_rank - step) % row.ring
        pending, arriving = None, held
        if ring is not None and step + 1 < row.ring:
            arriving = _room(held, row, source)
            pending = ring.shift(held, arriving)
        yield source, held
        if pending is not None:
            pending.wait()
        held = arriving


def _room(tensors: Sequence[Tensor], row: Row, source: int) -> list[Tensor]:
    """Room for what comes from the previous rank when this one sends on what is of `source`."""
    tokens = row.tokens((source - 1) % row.ring)
    return [x.new_empty((tokens, *x.shape[1:])) for x in tensors]


def _merge(out_TNV: Tensor, lse_TN: Tensor, part_TNV: Tensor, part_lse_TN: Tensor) -> None:
    """Puts a part into the output so far, in place. One of the two has seen a key: a row's diagonal comes first."""
    both = torch.logaddexp(lse_TN, part_lse_TN)
    out_TNV.mul_((lse_TN - both).exp().unsqueeze(-1)).add_(part_TNV * (part_lse_TN - both).exp().unsqueeze(-1))
    lse_TN.copy_(both)


def _sinks_gradient(sinks_N: Tensor, dout_TNV: Tensor, out_TNV: Tensor, lse_TN: Tensor) -> Tensor:
    """A sink takes its weight, exp(sink - lse), from the output: the more, the less of the output is left."""
    weight = (sinks_N.to(lse_TN.dtype) - lse_TN).exp()
    delta = (dout_TNV.to(lse_TN.dtype) * out_TNV.to(lse_TN.dtype)).sum(-1)
    return -(weight * delta).sum(0).to(sinks_N.dtype)
