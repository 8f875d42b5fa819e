"""Packed causal attention under sequence parallelism, as Hugging Face's attention interface calls it.

A group of U x R ranks first trades tokens for heads among U of them (Ulysses, `exchange`), then attends around the ring
of R that hold the same heads (`ring`), and trades back. Either may be 1.

Letters: t = tokens on this rank, N = heads, K = KV heads, H = head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flexsp.parallel.channels import Channel
from flexsp.parallel.exchange import gather_heads, scatter_heads
from flexsp.parallel.kernels import Block, Kernel, Need, Scores, choose
from flexsp.parallel.ring import ring_attention
from flexsp.parallel.row import Row

NAME = "flexsp"
"""What `attn_implementation` is called."""

REFUSED_ARGUMENTS = ("position_bias", "indices", "block_indices")
"""Arguments of a model's attention that change its result and that we do not compute."""


class KernelNames:
    """Names of kernels. No set and no dataclass: FSDP2, where it casts a module's inputs, hands copies of those on."""

    def __init__(self) -> None:
        self.names: set[str] = set()


@dataclass(frozen=True, slots=True, kw_only=True)
class SPContext:
    """How the row of one micro-batch lies on a group; handed through the model's forward as `sp_context`."""

    row: Row
    """The row on this rank's ring."""
    heads: Channel | None
    """The ranks that trade tokens for heads; None where there is one."""
    ring: Channel | None
    """The ranks that pass keys and values around; None where there is one."""
    shares: tuple[int, ...]
    """Tokens of each rank of `heads`, in order. A rank whose share is 0 carries one filler token."""
    kernel: str | None = None
    """The name of the attention kernel; None: the first that serves."""
    used: KernelNames = field(default_factory=KernelNames)
    """The kernels that computed attention here."""

    @property
    def head_rank(self) -> int:
        """This rank's place in `heads`."""
        return 0 if self.heads is None else self.heads.rank


def flexsp_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sp_context: SPContext | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """Causal attention of this rank's tokens to the tokens of their own sequences, wherever those are.

    Args:
        module: the attention layer.
        query: (1, N, t, H).
        key, value: (1, K, t, H); the values' head_dim may be another.
        attention_mask: must be None; the sequences' boundaries are the context's.
        scaling: factor of the scores; None is H ** -0.5.
        dropout: probability.
        sp_context: how the row lies on the group.
        sliding_window: how many tokens a token sees, itself included; None is all before it.
        softcap: scores become softcap * tanh(score / softcap).
        s_aux: (N,) attention sinks.

    Returns:
        (1, t, N, head_dim of the values) and None for the weights.

    Raises:
        ValueError: called without a context, or for attention that is not computed.
    """
    if sp_context is None:
        raise ValueError("sp_context=None: attn_implementation='flexsp' needs one; call the model by forward_backward")
    _check_arguments(module, attention_mask, arguments)
    context, row = sp_context, sp_context.row
    window = sliding_window if sliding_window is not None and sliding_window < row.max_seqlen else None
    scores = Scores(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling, window=window, softcap=softcap or None
    )
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # (t, heads, H)
    if context.heads is None and context.ring is None:
        return _attend(q, k, v, context, scores, dropout, s_aux).unsqueeze(0).contiguous(), None

    share = context.shares[context.head_rank]
    held = (q[:share], k[:share], v[:share])
    if context.heads is None:
        out = _attend(*held, context, scores, dropout, s_aux)
    else:
        traded = scatter_heads(*held, context.shares, context.heads)
        sinks = None if s_aux is None else s_aux.chunk(len(context.shares))[context.head_rank]
        out = _attend(*traded, context, scores, dropout, sinks)
        out = gather_heads(out, context.shares, context.head_rank, context.heads)
    if share == 0:
        # The filler token attends to itself, so that every parameter gets a gradient (of zeros). The empty exchange
        # stays in the graph: the group's other ranks wait for this one in its backward.
        alone = SPContext(
            row=_one_token(q.device), heads=None, ring=None, shares=(1,), kernel=context.kernel, used=context.used
        )
        out = torch.cat([out, _attend(q, k, v, alone, scores, dropout, s_aux)])
    return out.unsqueeze(0).contiguous(), None  # some models take views of it


@lru_cache(maxsize=1)
def _one_token(device: torch.device) -> Row:
    """The row of a filler token."""
    return Row((1,), 1, 0, device)


def _check_arguments(module: torch.nn.Module, attention_mask: Tensor | None, arguments: dict[str, Any]) -> None:
    if attention_mask is not None:
        raise ValueError("attention_mask must be None with attn_implementation='flexsp'; sequences are packed instead")
    causal = arguments.get("is_causal")
    if not (getattr(module, "is_causal", True) if causal is None else causal):
        raise ValueError(
            f"is_causal=False of {type(module).__name__}: attn_implementation='flexsp' computes causal attention; use "
            f"another model"
        )
    for name in REFUSED_ARGUMENTS:
        if arguments.get(name) is not None:
            raise ValueError(f"{name}: attn_implementation='flexsp' does not compute it; use another model")


def _attend(
    q_tNH: Tensor,
    k_tKH: Tensor,
    v_tKV: Tensor,
    context: SPContext,
    scores: Scores,
    dropout: float,
    sinks_N: Tensor | None,
) -> Tensor:
    """Attention over the ring, or over the whole row where there is none, by the kernels that serve it."""
    blocks = context.ring is not None or sinks_N is not None

    def kernel_for(block: Block) -> Kernel:
        need = Need.of(q_tNH, v_tKV, scores, by_positions=block.by_positions, blocks=blocks, dropout=dropout)
        kernel = choose(need, context.kernel)
        context.used.names.add(kernel.name)
        return kernel

    if blocks:
        return ring_attention(q_tNH, k_tKH, v_tKV, context.row, context.ring, kernel_for, scores, sinks_N)
    (whole,) = context.row.meetings(0, scores.window)
    return kernel_for(whole.block).attend(q_tNH, k_tKH, v_tKV, whole.block, scores, dropout)
