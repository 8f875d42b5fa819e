"""Ring attention and its gradients equal textbook attention over whole sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from flexsp.data.packing import rank_indices
from flexsp.parallel import GroupPool
from flexsp.parallel.kernels import Block, Kernel, Need, Scores, choose
from flexsp.parallel.ring import ring_attention
from flexsp.parallel.row import Row
from flexsp.plans import Group, MicroBatch, Plan
from flexsp.profile import Layout

HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
LENGTHS = [37, 1, 12, 3, 2]
PLAIN: dict[str, Any] = {"scaling": 0.4, "window": None, "softcap": None, "value_dim": HEAD_DIM, "sinks": False}
KINDS: dict[str, dict[str, Any]] = {
    "causal": {},
    "window": {"window": 5},
    "window of one token": {"window": 1},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": True},
    "all of them": {"window": 7, "softcap": 2.0, "sinks": True},
    "values of another dim": {"value_dim": 6},
}


def textbook(q, k, v, sinks, lengths, scaling, window, softcap):
    """(T, N, V), one head of one sequence at a time."""
    outs = []
    for head in range(q.shape[1]):
        kv_head = head * k.shape[1] // q.shape[1]
        pieces, start = [], 0
        for length in lengths:
            span = slice(start, start + length)
            scores = q[span, head] @ k[span, kv_head].T * scaling
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            distance = torch.arange(length)[:, None] - torch.arange(length)
            scores = scores.masked_fill((distance < 0) | (distance >= (window or length)), -torch.inf)
            if sinks is not None:
                scores = torch.cat([scores, sinks[head].expand(length, 1)], dim=1)
            pieces.append(scores.softmax(-1)[:, :length] @ v[span, kv_head])
            start += length
        outs.append(torch.cat(pieces))
    return torch.stack(outs, dim=1)


def tensors(value_dim: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Queries, keys, values, sinks, and the gradient of the output, of the whole row."""
    generator, tokens = torch.Generator().manual_seed(0), sum(LENGTHS)
    shapes = [
        (tokens, HEADS, HEAD_DIM), (tokens, KV_HEADS, HEAD_DIM), (tokens, KV_HEADS, value_dim), (HEADS,),
        (tokens, HEADS, value_dim),
    ]  # fmt: skip
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def on_a_ring(size: int, kind: dict[str, Any], dtype: torch.dtype, transport: str) -> list[torch.Tensor] | None:
    """The output of this rank's tokens, and the gradients of its q, k, v and sinks; None on ranks beside the ring."""
    layout, ranks, rank = Layout(ulysses=1, ring=size), tuple(range(size)), dist.get_rank()
    plan = Plan(
        num_devices=dist.get_world_size(),
        micro_batches=(MicroBatch(groups=(Group(ranks=ranks, sequences=(0,)),)),),
    )
    pool = GroupPool(transport=transport)
    pool.prepare([plan], {size: layout})
    if rank >= size:
        return None
    _, ring = pool.channels(ranks, layout)
    own = torch.from_numpy(rank_indices(LENGTHS, layout, rank))
    *row, sinks, dout = tensors(kind["value_dim"], dtype)
    held = [x[own].requires_grad_() for x in row]
    sinks.requires_grad_()
    scores = Scores(scaling=kind["scaling"], window=kind["window"], softcap=kind["softcap"])

    def kernel_for(block: Block) -> Kernel:
        return choose(Need.of(held[0], held[2], scores, by_positions=block.by_positions, blocks=True))

    out = ring_attention(
        *held, Row(LENGTHS, size, rank, torch.device("cpu")), ring, kernel_for, scores,
        sinks if kind["sinks"] else None,
    )  # fmt: skip
    out.backward(dout[own])
    gradients = [x.grad for x in held] + ([sinks.grad] if kind["sinks"] else [])
    return [out.detach(), *gradients]


@pytest.mark.parametrize(("world_size", "size"), [(2, 2), (4, 3), (4, 4)])
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
def test_the_ring_equals_textbook_attention(ranks, world_size, size, kind):
    kind = {**PLAIN, **kind}
    transport = "peers" if kind["softcap"] else "groups"  # each is on the way of half of the cases
    results = ranks(world_size).run(on_a_ring, size, kind, torch.float64, transport)
    compare(results[:size], size, kind, torch.float64, tolerance=1e-10)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_lower_precision_is_merged_in_fp32(ranks, dtype, tolerance):
    results = ranks(4).run(on_a_ring, 4, PLAIN, dtype, "groups")
    compare(results, 4, PLAIN, dtype, tolerance)


def compare(results, size, kind, dtype, tolerance):
    """Ranks' outputs and gradients against textbook attention over the whole row in fp64 on the same numbers."""
    *row, sinks, dout = (x.double() for x in tensors(kind["value_dim"], dtype))
    whole = [x.requires_grad_() for x in (*row, sinks)]
    expected = textbook(
        *whole[:3], whole[3] if kind["sinks"] else None, LENGTHS, kind["scaling"], kind["window"], kind["softcap"]
    )
    expected.backward(dout)
    places = [torch.from_numpy(rank_indices(LENGTHS, Layout(ulysses=1, ring=size), rank)) for rank in range(size)]
    for at, of_row in enumerate((expected.detach(), *(x.grad for x in whole[:3]))):
        ours = torch.empty_like(of_row)
        for rank in range(size):
            assert results[rank][at].dtype == dtype
            ours[places[rank]] = results[rank][at].double()
        # not relative below 1: where a query sees one key, its gradient is none
        assert (ours - of_row).norm() <= tolerance * max(1.0, of_row.norm())
    if kind["sinks"]:
        ours = sum(result[4] for result in results)
        torch.testing.assert_close(ours.double(), whole[3].grad, rtol=tolerance, atol=tolerance)
