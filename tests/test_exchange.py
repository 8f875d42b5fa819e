"""The exchange equals slicing the whole tensor, exactly, with uneven and empty shares."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from channel_pools import TRANSPORTS, channel_of_all
from flexsp.data.packing import share_sizes
from flexsp.parallel.exchange import gather_heads, scatter_heads


def whole(tokens: int, heads: int, dim: int, offset: int = 0) -> torch.Tensor:
    return torch.arange(offset, offset + tokens * heads * dim, dtype=torch.float64).view(tokens, heads, dim)


def scatter_equals_slicing(transport: str, tokens: int, num_heads: int, num_kv_heads: int) -> None:
    P, rank = dist.get_world_size(), dist.get_rank()
    shares = share_sizes(tokens, P)
    q, k, v = (
        whole(tokens, num_heads, 3),
        whole(tokens, num_kv_heads, 3, 10_000),
        whole(tokens, num_kv_heads, 2, 20_000),
    )
    own = [x.split(shares)[rank] for x in (q, k, v)]
    ours = scatter_heads(*own, shares, channel_of_all(transport))
    torch.testing.assert_close(ours[0], q.chunk(P, dim=1)[rank], rtol=0, atol=0)
    for mine, all_heads in ((ours[1], k), (ours[2], v)):
        # each of this rank's query heads must find the KV head that it has in the model
        per_rank = num_heads // P
        for h in range(per_rank):
            head = rank * per_rank + h
            expected = all_heads[:, head * num_kv_heads // num_heads]
            torch.testing.assert_close(mine[:, h * mine.shape[1] // per_rank], expected, rtol=0, atol=0)


def gather_inverts_scatter(transport: str, tokens: int, num_heads: int) -> None:
    P, rank = dist.get_world_size(), dist.get_rank()
    shares = share_sizes(tokens, P)
    full = whole(tokens, num_heads, 2)
    ours = gather_heads(full.chunk(P, dim=1)[rank], shares, rank, channel_of_all(transport))
    torch.testing.assert_close(ours, full.split(shares)[rank], rtol=0, atol=0)


def gradient_is_the_inverse(transport: str, tokens: int, num_heads: int) -> None:
    """Of sum(weight * scattered) it is the weight of the tokens and heads that went out from here."""
    P, rank = dist.get_world_size(), dist.get_rank()
    shares = share_sizes(tokens, P)
    q = whole(tokens, num_heads, 2).split(shares)[rank].clone().requires_grad_()
    weight = whole(tokens, num_heads, 2, 500)
    scattered, *_ = scatter_heads(q, q.detach(), q.detach(), shares, channel_of_all(transport))
    (scattered * weight.chunk(P, dim=1)[rank]).sum().backward()
    assert q.grad is not None
    torch.testing.assert_close(q.grad, weight.split(shares)[rank], rtol=0, atol=0)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_scatter_equals_slicing(ranks, world_size, transport):
    for tokens in (1, 3, 8, 13):
        for heads in ((4, 4), (4, 2), (4, 1), (12, 3), (8, 2)):
            ranks(world_size).run(scatter_equals_slicing, transport, tokens, *heads)


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("world_size", [2, 4])
def test_gather_equals_slicing_and_gradients_travel_back(ranks, world_size, transport):
    for tokens in (1, 3, 8, 13):
        ranks(world_size).run(gather_inverts_scatter, transport, tokens, 4)
        ranks(world_size).run(gradient_is_the_inverse, transport, tokens, 4)


def refuses_heads_that_do_not_divide() -> None:
    x = torch.zeros(1, 3, 1)
    with pytest.raises(ValueError, match=r"num_heads=3.*sp_degree=2"):
        scatter_heads(x, x, x, (1, 1), channel_of_all("peers"))


def test_heads_that_do_not_divide_are_refused(ranks):
    ranks(2).run(refuses_heads_that_do_not_divide)
