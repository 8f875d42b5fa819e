"""Attention by torch's scaled_dot_product_attention, one call per run.

`attend` on plain causal runs is that function with its own autograd. On the CPU the flash kernel under it also gives
the softmax's log-sums and takes those of another softmax, so blocks, windows and positions run on it too: a run that
a mask cuts goes in chunks of queries, each with the keys that it sees and a mask of at most `ELEMENTS` elements.

That CPU kernel (torch 2.13) needs care that is taken here: it divides by zero on a run without tokens, reads wrongly
what is not contiguous in the last dimension, wants one head_dim for all (zeros are appended), and says 0 for the
log-sum of a query that sees nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from flexsp.parallel.kernels.kernel import Block, Kernel, Need, Scores, wide_dtype
from flexsp.parallel.kernels.math import MATH
from flexsp.parallel.kernels.visible import Chunk, chunks, cutting_window

ELEMENTS = 1 << 22
"""Pairs of query and key in a mask: 16 MiB in fp32."""


class Sdpa(Kernel):
    """scaled_dot_product_attention per run."""

    name = "sdpa"

    def refuses(self, need: Need) -> str | None:
        if need.softcap is not None:
            return f"it has no softcap, which is {need.softcap}"
        if need.dropout and (need.blocks or need.by_positions):
            return "its dropout is for whole sequences"
        if need.device_type != "cpu" and (need.blocks or need.by_positions):
            return f"it gives log-sums on the CPU alone, and tokens are on {need.device_type}"
        return None

    def attend(
        self, q_TNH: Tensor, k_SKH: Tensor, v_SKV: Tensor, block: Block, scores: Scores, dropout: float = 0.0
    ) -> Tensor:
        if block.sees_nothing:
            return MATH.attend(q_TNH, k_SKH, v_SKV, block, scores)
        plain = not block.by_positions and cutting_window(block, scores) is None and q_TNH.shape[-1] == v_SKV.shape[-1]
        if q_TNH.device.type == "cpu" and dropout == 0.0 and not plain:
            return super().attend(q_TNH, k_SKH, v_SKV, block, scores)
        return _attend_by_autograd(q_TNH, k_SKH, v_SKV, block, scores, dropout)

    def forward(
        self, q_TNH: Tensor, k_SKH: Tensor, v_SKV: Tensor, block: Block, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        T, N, V = *q_TNH.shape[:2], v_SKV.shape[-1]
        out_TNV = q_TNH.new_zeros(T, N, V)
        lse_TN = q_TNH.new_full((T, N), -torch.inf, dtype=wide_dtype(q_TNH))
        q, k, v = _for_cpu_kernel(q_TNH, k_SKH, v_SKV)
        for chunk, causal in _calls(block, scores):
            rows, keys = chunk.queries, chunk.keys
            out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                _heads_first(q[rows]), _heads_first(k[keys]), _heads_first(v[keys]), 0.0, causal,
                attn_mask=_additive(chunk, q), scale=scores.scaling,
            )  # fmt: skip
            out_TNV[rows] = _tokens_first(out)[..., :V]
            lse_TN[rows] = lse.squeeze(0).transpose(0, 1)
            if chunk.seen is not None and block.by_positions:
                lse_TN[rows] = lse_TN[rows].masked_fill(~chunk.seen.any(1, keepdim=True), -torch.inf)
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
        dtype = q_TNH.dtype
        q, k, v, dout, out = _for_cpu_kernel(q_TNH, k_SKH, v_SKV, dout_TNV.to(dtype), out_TNV.to(dtype))
        lse_NT = lse_TN.to(wide_dtype(q_TNH)).masked_fill(lse_TN.isneginf(), 0.0).transpose(0, 1).unsqueeze(0)
        dq_TNH = torch.zeros_like(q)
        dk_SKH, dv_SKV = (torch.zeros_like(x, dtype=wide_dtype(q_TNH)) for x in (k, v))
        for chunk, causal in _calls(block, scores):
            rows, keys = chunk.queries, chunk.keys
            dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                _heads_first(dout[rows]), _heads_first(q[rows]), _heads_first(k[keys]), _heads_first(v[keys]),
                _heads_first(out[rows]), lse_NT[..., rows], 0.0, causal,
                attn_mask=_additive(chunk, q), scale=scores.scaling,
            )  # fmt: skip
            dq_TNH[rows] = _tokens_first(dq)
            dk_SKH[keys] += _tokens_first(dk)
            dv_SKV[keys] += _tokens_first(dv)
        H, V = q_TNH.shape[-1], v_SKV.shape[-1]  # without what was appended
        return dq_TNH[..., :H], dk_SKH[..., :H].to(dtype), dv_SKV[..., :V].to(dtype)


SDPA = Sdpa()


def _attend_by_autograd(q: Tensor, k: Tensor, v: Tensor, block: Block, scores: Scores, dropout: float) -> Tensor:
    if q.device.type != "cpu" and q.shape[1] != k.shape[1]:
        # with fewer KV heads some of the kernels under it step back, and all scores would be in memory
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    gqa = q.shape[1] != k.shape[1]

    def call(q: Tensor, k: Tensor, v: Tensor, causal: bool, seen: Tensor | None = None) -> Tensor:
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, is_causal=causal, scale=scores.scaling, dropout_p=dropout, enable_gqa=gqa
        )

    if cutting_window(block, scores) is not None:
        q, k, v = (_heads_first(x) for x in (q, k, v))
        outs = [
            call(q[:, :, c.queries], k[:, :, c.keys], v[:, :, c.keys], False, c.seen)
            for c in chunks(block, scores, ELEMENTS)
        ]
        return _tokens_first(torch.cat(outs, dim=2))
    # split, whose backward is one concatenation; a slice per sequence would write a whole row of zeros for each
    sizes = (block.sizes_q, block.sizes_k, block.sizes_k)
    pieces = zip(*(_heads_first(x).split(list(n), dim=2) for x, n in zip((q, k, v), sizes, strict=True)), strict=True)
    outs = [call(q, k, v, block.causal and q.shape[2] > 1) for q, k, v in pieces]
    return _tokens_first(torch.cat(outs, dim=2))


def _calls(block: Block, scores: Scores) -> Iterator[tuple[Chunk, bool]]:
    """What the CPU kernel is called with, and whether it masks causally itself."""
    if block.by_positions or cutting_window(block, scores) is not None:
        for chunk in chunks(block, scores, ELEMENTS):
            yield chunk, False
    else:
        for queries, keys in block.runs():
            yield Chunk(queries, keys, None), block.causal and queries.stop - queries.start > 1


def _for_cpu_kernel(*tensors: Tensor) -> list[Tensor]:
    """One head_dim, and the last dimension contiguous."""
    head_dim = max(x.shape[-1] for x in tensors)
    padded = (F.pad(x, (0, head_dim - x.shape[-1])) if x.shape[-1] < head_dim else x for x in tensors)
    return [x if x.stride(-1) == 1 else x.contiguous() for x in padded]


def _additive(chunk: Chunk, q: Tensor) -> Tensor | None:
    """The mask as the CPU kernel takes it: 0 where seen, else -inf."""
    if chunk.seen is None:
        return None
    return torch.zeros_like(chunk.seen, dtype=q.dtype).masked_fill_(~chunk.seen, -torch.inf)


def _heads_first(x_TNH: Tensor) -> Tensor:
    return x_TNH.transpose(0, 1).unsqueeze(0)


def _tokens_first(x_1NTH: Tensor) -> Tensor:
    return x_1NTH.squeeze(0).transpose(0, 1)
