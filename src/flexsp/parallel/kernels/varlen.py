"""Attention by torch's own variable-length flash attention, for half precision on CUDA.

`attend` is torch.nn.attention.varlen.varlen_attn; blocks call the operators under it, which also give and take the
softmax's log-sums (FlashAttention-2, arXiv 2307.08691). Written against torch 2.13's sources and checked here on meta
tensors alone: unproven on a GPU.
"""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any

import torch
from torch import Tensor

from flexsp.parallel.kernels.kernel import Block, Kernel, Need, Scores
from flexsp.parallel.kernels.math import MATH
from flexsp.parallel.kernels.visible import cutting_window

HALF = (torch.float16, torch.bfloat16)


class Varlen(Kernel):
    """torch's variable-length flash attention."""

    name = "varlen"

    def refuses(self, need: Need) -> str | None:
        if need.softcap is not None:
            return f"it has no softcap, which is {need.softcap}"
        if need.dropout:
            return "it has no dropout"
        if need.blocks and torch.version.hip:
            return "its log-sums are laid out otherwise on ROCm"
        return flash_refuses(need)

    def attend(
        self, q_TNH: Tensor, k_SKH: Tensor, v_SKV: Tensor, block: Block, scores: Scores, dropout: float = 0.0
    ) -> Tensor:
        from torch.nn.attention.varlen import varlen_attn

        assert dropout == 0.0
        if block.sees_nothing:
            return MATH.attend(q_TNH, k_SKH, v_SKV, block, scores)
        gqa: dict[str, Any] = {"enable_gqa": True} if _asks_for_gqa() else {}
        out = varlen_attn(
            q_TNH.contiguous(), k_SKH.contiguous(), v_SKV.contiguous(), block.cu_seqlens_q, block.cu_seqlens_k,
            *longest(block), scale=scores.scaling, window_size=window_size(block, scores), **gqa,
        )  # fmt: skip
        assert isinstance(out, Tensor)
        return out

    def forward(
        self, q_TNH: Tensor, k_SKH: Tensor, v_SKV: Tensor, block: Block, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        if block.sees_nothing:
            return MATH.forward(q_TNH, k_SKH, v_SKV, block, scores)
        left, right = window_size(block, scores)
        out, lse_NT, *_ = torch.ops.aten._flash_attention_forward(
            q_TNH.contiguous(), k_SKH.contiguous(), v_SKV.contiguous(), block.cu_seqlens_q, block.cu_seqlens_k,
            *longest(block), 0.0, (left, right) == (-1, 0), False,
            scale=scores.scaling, window_size_left=left, window_size_right=right,
        )  # fmt: skip
        return out, lse_from_flash(lse_NT)

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
        if block.sees_nothing:
            return MATH.backward(dout_TNV, q_TNH, k_SKH, v_SKV, out_TNV, lse_TN, block, scores)
        left, right = window_size(block, scores)
        device, dtype = q_TNH.device, q_TNH.dtype
        no_random_state = torch.zeros(2, dtype=torch.uint64, device=device), torch.empty(0, device=device)
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            dout_TNV.to(dtype).contiguous(), q_TNH.contiguous(), k_SKH.contiguous(), v_SKV.contiguous(),
            out_TNV.to(dtype).contiguous(), lse_for_flash(lse_TN), block.cu_seqlens_q, block.cu_seqlens_k,
            *longest(block), 0.0, (left, right) == (-1, 0), *no_random_state,
            scale=scores.scaling, window_size_left=left, window_size_right=right,
        )  # fmt: skip
        return dq, dk, dv


VARLEN = Varlen()


def flash_refuses(need: Need) -> str | None:
    """What FlashAttention-2 cannot, in torch or in its own package."""
    if need.device_type != "cuda":
        return f"it runs on CUDA, and tokens are on {need.device_type}"
    if need.dtype not in HALF:
        return f"it computes float16 and bfloat16, and tokens are {str(need.dtype).removeprefix('torch.')}"
    if need.by_positions:
        return "it goes by index, not by positions"
    if need.head_dim != need.value_dim:
        return f"it needs one head_dim, and head_dim={need.head_dim} differs from the values' {need.value_dim}"
    if need.head_dim % 8 or need.head_dim > 256:
        return f"head_dim={need.head_dim} must be a multiple of 8 up to 256"
    if torch.cuda.is_available() and not torch.version.hip and torch.cuda.get_device_capability() < (8, 0):
        return "the GPU is older than Ampere"
    return None


def window_size(block: Block, scores: Scores) -> tuple[int, int]:
    """How many tokens before and after itself a query sees, -1 for all."""
    window = cutting_window(block, scores)
    return -1 if window is None else window - 1, 0 if block.causal else -1


def longest(block: Block) -> tuple[int, int]:
    """Upper bounds of the runs' sizes.

    At least 2: where all runs of queries had one token, the kernel would fold query heads into tokens, which goes wrong
    with runs of none.
    """
    return max(2, *block.sizes_q), max(2, *block.sizes_k)


def lse_from_flash(lse_NT: Tensor) -> Tensor:
    """(T, N): the kernel says +inf for a query that sees no key."""
    return lse_NT.masked_fill(lse_NT.isposinf(), -torch.inf).transpose(0, 1)


def lse_for_flash(lse_TN: Tensor) -> Tensor:
    """(N, T) fp32; +inf makes the weights of a query that sees no key 0."""
    return lse_TN.float().masked_fill(lse_TN.isneginf(), torch.inf).transpose(0, 1).contiguous()


@cache
def _asks_for_gqa() -> bool:
    """Whether varlen_attn wants to be told of fewer KV heads; without that argument it takes them as they are."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters
