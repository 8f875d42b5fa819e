"""Attention by the flash_attn package (2.7 and newer) where it is installed, for half precision on CUDA.

`attend` is its flash_attn_varlen_func; blocks call the functions under it, which also give and take the softmax's
log-sums. It has what torch's own lacks: softcap, and dropout in `attend`. Written against the package's sources and
checked here with a stand-in of the same signatures alone: unproven on a GPU.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from functools import cache
from typing import Any

import torch
from torch import Tensor

from flexsp.parallel.kernels.kernel import Block, Kernel, Need, Scores
from flexsp.parallel.kernels.math import MATH
from flexsp.parallel.kernels.varlen import flash_refuses, longest, lse_for_flash, lse_from_flash, window_size

LEAST_VERSION = (2, 7)
"""The first with the arguments that are used here."""


class FlashAttn(Kernel):
    """The flash_attn package."""

    name = "flash-attn"

    def refuses(self, need: Need) -> str | None:
        if need.dropout and (need.blocks or need.softcap is not None):
            return "its dropout goes neither with blocks nor with softcap"
        return flash_refuses(need) or _absent()

    def attend(
        self, q_TNH: Tensor, k_SKH: Tensor, v_SKV: Tensor, block: Block, scores: Scores, dropout: float = 0.0
    ) -> Tensor:
        if block.sees_nothing:
            return MATH.attend(q_TNH, k_SKH, v_SKV, block, scores)
        max_q, max_k = longest(block)
        out: Tensor = _package().flash_attn_varlen_func(
            q_TNH, k_SKH, v_SKV, block.cu_seqlens_q, block.cu_seqlens_k, max_q, max_k,
            dropout_p=dropout, softmax_scale=scores.scaling, causal=block.causal,
            window_size=window_size(block, scores), softcap=scores.softcap or 0.0,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return out

    def forward(
        self, q_TNH: Tensor, k_SKH: Tensor, v_SKV: Tensor, block: Block, scores: Scores
    ) -> tuple[Tensor, Tensor]:
        if block.sees_nothing:
            return MATH.forward(q_TNH, k_SKH, v_SKV, block, scores)
        out, lse_NT, *_ = _package()._flash_attn_varlen_forward(
            q_TNH.contiguous(), k_SKH.contiguous(), v_SKV.contiguous(), block.cu_seqlens_q, block.cu_seqlens_k,
            *longest(block), 0.0, scores.scaling, **_masking(block, scores),
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
        q, k, v, dout, out = (x.to(q_TNH.dtype).contiguous() for x in (q_TNH, k_SKH, v_SKV, dout_TNV, out_TNV))
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        _package()._flash_attn_varlen_backward(
            dout, q, k, v, out, lse_for_flash(lse_TN), dq, dk, dv, block.cu_seqlens_q, block.cu_seqlens_k,
            *longest(block), 0.0, scores.scaling, **_masking(block, scores),
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
        return dq, dk, dv


FLASH = FlashAttn()


def _masking(block: Block, scores: Scores) -> dict[str, Any]:
    left, right = window_size(block, scores)
    return {
        "causal": block.causal,
        "window_size_left": left,
        "window_size_right": right,
        "softcap": scores.softcap or 0.0,
        "alibi_slopes": None,
    }


@cache
def _absent() -> str | None:
    try:  # and not by the folder: flash-attn 4 has one of that name, with other functions
        version = importlib.metadata.version("flash_attn")
    except importlib.metadata.PackageNotFoundError:
        return "flash_attn is not installed"
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or tuple(map(int, numbers.groups())) < LEAST_VERSION:
        return f"flash_attn {version} is older than {'.'.join(map(str, LEAST_VERSION))}"
    return None


def _package() -> Any:
    return importlib.import_module("flash_attn.flash_attn_interface")
