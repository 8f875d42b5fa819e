"""Ulysses' exchange (arXiv 2309.14509): trade tokens of all heads for all tokens of some heads, and back.

Letters: T = tokens of the group's row, t = tokens on this rank, P = sp_degree, N = heads, K = KV heads, H = head_dim,
V = head_dim of the values.

    rank 0: tokens 0..t-1 of heads 0..N-1    scatter     rank 0: tokens 0..T-1 of heads 0..N/P-1
    rank 1: the next tokens, all heads       ------->    rank 1: all tokens of the next N/P heads
                                             <-------
                                              gather

Ranks' shares of the row may differ, and may be empty: nothing is padded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flexsp.parallel.channels import Channel


def scatter_heads(
    q_tNH: Tensor, k_tKH: Tensor, v_tKV: Tensor, shares: Sequence[int], channel: Channel
) -> tuple[Tensor, Tensor, Tensor]:
    """All tokens of this rank's block of heads, for queries, keys and values in one exchange.

    KV heads are repeated up to the least common multiple of their number and P, so that every rank has the KV heads
    of its query heads.

    Args:
        q_tNH: (t, N, H) queries of this rank's tokens.
        k_tKH: (t, K, H) keys.
        v_tKV: (t, K, V) values.
        shares: tokens of each rank of the channel, in order; `shares[channel.rank]` is t.
        channel: of the P ranks that trade heads.

    Returns:
        (T, N/P, H), (T, L/P, H) and (T, L/P, V), where L = lcm(K, P).

    Raises:
        ValueError: P does not divide N.
    """
    P = len(shares)
    num_heads, num_kv_heads = q_tNH.shape[1], k_tKH.shape[1]
    if num_heads % P:
        raise ValueError(f"num_heads={num_heads} is not divisible by sp_degree={P}; plan with degrees that divide it")
    repeats = math.lcm(num_kv_heads, P) // num_kv_heads
    if repeats > 1:
        k_tKH, v_tKV = (x.repeat_interleave(repeats, dim=1) for x in (k_tKH, v_tKV))
    blocks = [x.unflatten(1, (P, x.shape[1] // P)) for x in (q_tNH, k_tKH, v_tKV)]  # (t, P, heads/P, dim)
    send = torch.cat([x.flatten(2) for x in blocks], dim=2).transpose(0, 1).flatten(0, 1)  # (P*t, columns)
    t = q_tNH.shape[0]
    received = exchange_rows(send, [t] * P, shares, channel)  # (T, columns)
    columns = received.split([x.shape[2] * x.shape[3] for x in blocks], dim=1)
    q, k, v = (c.unflatten(1, x.shape[2:]) for c, x in zip(columns, blocks, strict=True))
    return q, k, v


def gather_heads(out_TnV: Tensor, shares: Sequence[int], group_rank: int, channel: Channel) -> Tensor:
    """The inverse for the attention's output: this rank's tokens, all heads.

    Args:
        out_TnV: (T, N/P, V).
        shares: tokens of each rank of the channel, in order.
        group_rank: this rank's place in the channel.
        channel: of the P ranks that trade heads.

    Returns:
        (t, N, V).
    """
    P, t = len(shares), shares[group_rank]
    heads, dim = out_TnV.shape[1:]
    received = exchange_rows(out_TnV.flatten(1), shares, [t] * P, channel)  # (P*t, heads*dim), by source rank
    return received.view(P, t, heads, dim).transpose(0, 1).flatten(1, 2)


def exchange_rows(x: Tensor, send_rows: Sequence[int], recv_rows: Sequence[int], channel: Channel) -> Tensor:
    """All-to-all of rows, autograd through it.

    Args:
        x: (sum(send_rows), C), rows ordered by destination.
        send_rows: how many rows go to each rank of the channel.
        recv_rows: how many rows come from each.
        channel: of the ranks that exchange.

    Returns:
        (sum(recv_rows), C), rows ordered by source.
    """
    out: Tensor = _ExchangeRows.apply(x, tuple(send_rows), tuple(recv_rows), channel)  # type: ignore[no-untyped-call]
    return out


class _ExchangeRows(torch.autograd.Function):
    """The gradient of rows travels back the way the rows came."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, send_rows: tuple[int, ...], recv_rows: tuple[int, ...], channel: Channel
    ) -> Tensor:
        ctx.send_rows, ctx.recv_rows, ctx.channel = send_rows, recv_rows, channel
        return channel.all_to_all(x, send_rows, recv_rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        channel: Channel = ctx.channel
        return channel.all_to_all(grads[0], ctx.recv_rows, ctx.send_rows), None, None, None
