"""Attention written out in plain torch: any device, any dtype, every kind of scores and blocks.

What no other kernel computes ends here. Products and softmax are in fp32 (fp64 for fp64). The scores of a few queries
exist at a time (`visible.QUERIES`), of all heads together at most `ELEMENTS`, or those of one query where they alone
are more, in a handful of temporaries of that size.

Letters: those of kernel.py, and G = N / K query heads per KV head, t = queries of a chunk, s = its keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flexsp.parallel.kernels.kernel import Block, Kernel, Need, Scores, wide_dtype
from flexsp.parallel.kernels.visible import Chunk, chunks

ELEMENTS = 1 << 24
"""Scores that exist at once, over all heads: 64 MiB in fp32."""


class Math(Kernel):
    """Plain torch in chunks of queries, KV heads not repeated."""

    name = "math"

    def refuses(self, need: Need) -> str | None:
        return "it has no dropout" if need.dropout else None

    def forward(
        self, q_TNH: Tensor, k_SKH: Tensor, v_SKV: Tensor, block: Block, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        T, N, _ = q_TNH.shape
        out_TNV = q_TNH.new_zeros(T, N, v_SKV.shape[-1])
        lse_TN = q_TNH.new_full((T, N), -torch.inf, dtype=wide_dtype(q_TNH))
        for chunk in chunks(block, scores, ELEMENTS // N):
            q, k, v = _by_kv_head(q_TNH[chunk.queries], k_SKH[chunk.keys], v_SKV[chunk.keys])
            capped, _ = _capped_scores(q, k, scores)
            weights, lse = _softmax(capped, chunk)
            out_TNV[chunk.queries] = _by_token(weights @ v, N)
            lse_TN[chunk.queries] = _by_token(lse, N).squeeze(-1)
        return out_TNV, lse_TN

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
        N, dtype = q_TNH.shape[1], wide_dtype(q_TNH)
        dq_TNH = torch.zeros_like(q_TNH)
        dk_SKH, dv_SKV = (torch.zeros_like(x, dtype=dtype) for x in (k_SKH, v_SKV))
        for chunk in chunks(block, scores, ELEMENTS // N):
            q, k, v = _by_kv_head(q_TNH[chunk.queries], k_SKH[chunk.keys], v_SKV[chunk.keys])
            dout, out, lse = (
                _query_heads(x[chunk.queries].to(dtype), k.shape[0]) for x in (dout_TNV, out_TNV, lse_TN.unsqueeze(-1))
            )
            capped, slope = _capped_scores(q, k, scores)
            weights = _weights(capped, lse, chunk)
            dv_SKV[chunk.keys] += (weights.mT @ dout).transpose(0, 1)
            delta = (dout * out).sum(-1, keepdim=True)
            dscores = (dout @ v.mT).sub_(delta).mul_(weights)
            if slope is not None:
                dscores *= slope
            dscores *= scores.scaling
            dq_TNH[chunk.queries] = _by_token(dscores @ k, N)
            dk_SKH[chunk.keys] += (dscores.mT @ q).transpose(0, 1)
        return dq_TNH, dk_SKH.to(k_SKH.dtype), dv_SKV.to(v_SKV.dtype)


MATH = Math()


def _by_kv_head(q_tNH: Tensor, k_sKH: Tensor, v_sKV: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(K, G*t, H), (K, s, H), (K, s, V): one matrix product per KV head serves its G query heads."""
    dtype = wide_dtype(q_tNH)
    k, v = (x.to(dtype).transpose(0, 1) for x in (k_sKH, v_sKV))
    return _query_heads(q_tNH.to(dtype), k.shape[0]), k, v


def _query_heads(x_tNX: Tensor, num_kv_heads: int) -> Tensor:
    """(t, N, X) -> (K, G*t, X)."""
    t, N, X = x_tNX.shape
    return x_tNX.reshape(t, num_kv_heads, N // num_kv_heads, X).permute(1, 2, 0, 3).reshape(num_kv_heads, -1, X)


def _by_token(x_KrX: Tensor, num_heads: int) -> Tensor:
    """(K, G*t, X) -> (t, N, X)."""
    return x_KrX.reshape(num_heads, -1, x_KrX.shape[-1]).transpose(0, 1)


def _capped_scores(q_KrH: Tensor, k_KsH: Tensor, scores: Scores) -> tuple[Tensor, Tensor | None]:
    """(K, G*t, s) scores before masking, and with a softcap their slope by the uncapped ones."""
    raw = (q_KrH @ k_KsH.mT).mul_(scores.scaling)
    if scores.softcap is None:
        return raw, None
    tanh = raw.div_(scores.softcap).tanh_()
    return tanh * scores.softcap, 1 - tanh.square()


def _softmax(capped_Krs: Tensor, chunk: Chunk) -> tuple[Tensor, Tensor]:
    """Weights, in place, and log-sums (K, G*t, 1)."""
    _mask(capped_Krs, chunk)
    lse = capped_Krs.logsumexp(-1, keepdim=True)
    return _exp_minus(capped_Krs, lse), lse


def _weights(capped_Krs: Tensor, lse_Kr1: Tensor, chunk: Chunk) -> Tensor:
    """Weights under given log-sums, in place."""
    _mask(capped_Krs, chunk)
    return _exp_minus(capped_Krs, lse_Kr1)


def _mask(capped_Krs: Tensor, chunk: Chunk) -> None:
    if chunk.seen is not None:
        capped_Krs.unflatten(1, (-1, chunk.seen.shape[0])).masked_fill_(~chunk.seen, -torch.inf)


def _exp_minus(capped_Krs: Tensor, lse_Kr1: Tensor) -> Tensor:
    # a query that sees nothing has -inf everywhere, and -inf - -inf is not a number
    return capped_Krs.sub_(lse_Kr1.masked_fill(lse_Kr1.isneginf(), 0.0)).exp_()
