"""Packed causal attention under sequence parallelism, as Hugging Face's attention interface calls it.

Letters: T = tokens of the group's row, t = tokens on this rank, N = heads, K = KV heads, H = head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from flexsp.parallel.exchange import gather_heads, scatter_heads

NAME = "flexsp"
"""What `attn_implementation` is called."""

REFUSED_ARGUMENTS = ("softcap", "s_aux", "position_bias")
"""Arguments of a model's attention that change its result and that we do not compute."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SPContext:
    """How the row of one micro-batch lies on a group; handed through the model's forward as `sp_context`."""

    group: dist.ProcessGroup | None
    """The sequence-parallel group; None where this rank's row is its own."""
    group_rank: int
    shares: tuple[int, ...]
    """Tokens of each rank of the group, in order. A rank whose share is 0 carries one filler token."""


def flexsp_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sp_context: SPContext | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Causal attention of this rank's tokens to the tokens of their own sequences, wherever those are.

    Args:
        module: the attention layer, not used.
        query: (1, N, t, H).
        key, value: (1, K, t, H).
        attention_mask: must be None; the boundaries of the sequences are `cu_seq_lens_q`.
        scaling: factor of the scores; None is H ** -0.5.
        dropout: probability.
        sp_context: how the row lies on the group.
        cu_seq_lens_q: (sequences + 1,) int32, cu_seqlens of the group's whole row.
        max_length_q: the longest sequence of the row.

    Returns:
        (1, t, N, H) and None for the weights.

    Raises:
        ValueError: called without a context, or for attention of another kind than plain causal.
    """
    if sp_context is None or cu_seq_lens_q is None or max_length_q is None:
        raise ValueError("sp_context=None: attn_implementation='flexsp' needs one; call the model by forward_backward")
    if attention_mask is not None:
        raise ValueError("attention_mask must be None with attn_implementation='flexsp'; sequences are packed instead")
    for name in REFUSED_ARGUMENTS:
        if arguments.get(name) is not None:
            raise ValueError(f"{name}: attn_implementation='flexsp' computes plain causal attention; use another model")
    if sliding_window is not None and max_length_q > sliding_window:
        raise ValueError(
            f"sliding_window={sliding_window} is below max_seqlen={max_length_q} and not computed; "
            f"use a model without it or limit the context"
        )
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (t, heads, H)

    def attend(q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
        return varlen_attention(q_TNH, k_TKH, v_TKH, cu_seq_lens_q, max_length_q, scaling, dropout)

    if sp_context.group is None:
        return attend(q, k, v).unsqueeze(0), None
    share = sp_context.shares[sp_context.group_rank]
    row = scatter_heads(q[:share], k[:share], v[:share], sp_context.shares, sp_context.group)
    out = gather_heads(attend(*row), sp_context.shares, sp_context.group_rank, sp_context.group)
    if share == 0:
        # The filler token attends to itself, so that every parameter gets a gradient (of zeros). The empty exchange
        # stays in the graph: the group's other ranks wait for this one in its backward.
        alone = varlen_attention(q, k, v, cu_seq_lens_q.new_tensor([0, 1]), 1, scaling, dropout)
        out = torch.cat([out, alone])
    return out.unsqueeze(0), None


def varlen_attention(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    """Causal attention within each sequence of a packed row.

    Args:
        q_TNH: (T, N, H).
        k_TKH, v_TKH: (T, K, H), K a divisor of N.
        cu_seqlens: (sequences + 1,) int32 on the same device, a leading 0 and T at the end.
        max_seqlen: the longest sequence.
        scaling: factor of the scores; None is H ** -0.5.
        dropout: probability.

    Returns:
        (T, N, H).
    """
    if varlen_kernel_serves(q_TNH, v_TKH, dropout):
        return _varlen_kernel(q_TNH, k_TKH, v_TKH, cu_seqlens, max_seqlen, scaling)
    return _sdpa_per_sequence(q_TNH, k_TKH, v_TKH, cu_seqlens, scaling, dropout)


def varlen_kernel_serves(q_TNH: Tensor, v_TKH: Tensor, dropout: float) -> bool:
    """Whether torch's variable-length kernel computes this: CUDA, half precision, equal head dims, no dropout."""
    half = q_TNH.dtype in (torch.float16, torch.bfloat16)
    return q_TNH.is_cuda and half and dropout == 0.0 and q_TNH.shape[-1] == v_TKH.shape[-1]


def _varlen_kernel(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, cu_seqlens: Tensor, max_seqlen: int, scaling: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    repeats = q_TNH.shape[1] // k_TKH.shape[1]
    if repeats > 1:
        k_TKH, v_TKH = (x.repeat_interleave(repeats, dim=1) for x in (k_TKH, v_TKH))
    out = varlen_attn(
        q_TNH.contiguous(), k_TKH.contiguous(), v_TKH.contiguous(), cu_seqlens, cu_seqlens, max_seqlen, max_seqlen,
        scale=scaling, window_size=(-1, 0),
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out


def _sdpa_per_sequence(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    cu_seqlens: Tensor,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    sizes = cu_seqlens.diff().tolist()
    # split, whose backward is one concatenation; a slice per sequence would write a whole row of zeros for each
    pieces = zip(*(x.transpose(0, 1).unsqueeze(0).split(sizes, dim=2) for x in (q_TNH, k_TKH, v_TKH)), strict=True)
    gqa = q_TNH.shape[1] != k_TKH.shape[1]
    outs = [
        F.scaled_dot_product_attention(
            q, k, v, is_causal=q.shape[2] > 1, scale=scaling, dropout_p=dropout, enable_gqa=gqa
        )
        for q, k, v in pieces
    ]
    return torch.cat(outs, dim=2).squeeze(0).transpose(0, 1)
