"""Attention by torch's flex attention, compiled: `attend` with windows, softcap and any head_dim, on CUDA.

Every query sees one stretch of the packed keys, [first, end): runs, causality and window are all in these two numbers
per query. Which tiles of 128 x 128 are empty, cut or whole follows from them without looking at all pairs, which
torch's create_block_mask would (192K tokens squared are 36 GiB). Tiles and masks are checked here, and the uncompiled
operator's output, on the CPU, where it has no backward: unproven on a GPU.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable
from functools import cache, lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flexsp.parallel.kernels.kernel import Block, Kernel, Need, Scores
from flexsp.parallel.kernels.math import MATH
from flexsp.parallel.kernels.visible import cutting_window

if TYPE_CHECKING:  # imported where it is used: it takes seconds
    from torch.nn.attention.flex_attention import BlockMask

TILE = 128
"""Tokens of a tile, flex attention's own default."""
LEAST_HEAD_DIM = 16
COMPILATIONS = 256
"""Of the operator, at most."""


class Flex(Kernel):
    """torch's flex attention."""

    name = "flex"

    def refuses(self, need: Need) -> str | None:
        if need.device_type != "cuda":
            return f"its backward runs on CUDA, and tokens are on {need.device_type}"
        if need.blocks or need.by_positions:
            return "it computes whole sequences, neither blocks nor positions"
        if need.dropout:
            return "it has no dropout"
        if need.dtype == torch.float64:
            return "it does not compute float64"
        if min(need.head_dim, need.value_dim) < LEAST_HEAD_DIM:
            return f"head_dim={min(need.head_dim, need.value_dim)} is below {LEAST_HEAD_DIM}"
        if importlib.util.find_spec("triton") is None:
            return "triton, which compiles it, is not installed"
        return None

    def attend(
        self, q_TNH: Tensor, k_SKH: Tensor, v_SKV: Tensor, block: Block, scores: Scores, dropout: float = 0.0
    ) -> Tensor:
        assert dropout == 0.0 and not block.by_positions
        if block.sees_nothing:
            return MATH.attend(q_TNH, k_SKH, v_SKV, block, scores)
        q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_TNH, k_SKH, v_SKV))
        out: Tensor = _function(q_TNH.device.type)(
            q, k, v,
            score_mod=None if scores.softcap is None else _softcap(scores.softcap),
            block_mask=block_mask(
                block.sizes_q, block.sizes_k, block.causal, cutting_window(block, scores), q_TNH.device
            ),
            scale=scores.scaling, enable_gqa=q.shape[1] != k.shape[1],
        )  # fmt: skip
        return out.squeeze(0).transpose(0, 1)


FLEX = Flex()


@cache
def _function(device_type: str) -> Any:
    """Compiled on CUDA, once for each number of heads, rows of one token, and with a backward or without.

    Every Ulysses degree is another number of heads, so torch's usual limit of eight compilations is soon reached, and
    beyond it the operator would run as it is, which holds all T x T scores. `fullgraph` makes an error of that.
    """
    from torch.nn.attention.flex_attention import flex_attention

    if device_type != "cuda":
        return flex_attention
    has_limit = "recompile_limit" in inspect.signature(torch.compile).parameters  # not in every torch that serves
    limit: dict[str, Any] = {"recompile_limit": COMPILATIONS} if has_limit else {}
    return torch.compile(flex_attention, dynamic=True, fullgraph=True, **limit)


@cache
def _softcap(softcap: float) -> Callable[..., Tensor]:
    def score_mod(score: Tensor, b: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return score_mod


@lru_cache(maxsize=4)  # of one micro-batch: its layers ask for the same one or two
def block_mask(
    sizes_q: tuple[int, ...], sizes_k: tuple[int, ...], causal: bool, window: int | None, device: torch.device
) -> BlockMask:
    """Which tiles are computed, and which of those need the mask.

    Args:
        sizes_q, sizes_k: tokens of the runs, which go by index.
        causal, window: as in `Block` and `Scores`.
        device: where the tokens are.

    Returns:
        The mask of shape (1, 1, T, S).
    """
    from torch.nn.attention.flex_attention import BlockMask

    first, end = _stretches(sizes_q, sizes_k, causal, window)
    T, S = len(first), sum(sizes_k)
    lows, highs = (_by_tile(x) for x in (first, end))  # (tiles of queries, 128)
    tile = torch.arange(-(-S // TILE))
    touched = (tile >= lows.amin(1, keepdim=True) // TILE) & (tile * TILE < highs.amax(1, keepdim=True))
    whole = (tile * TILE >= lows.amax(1, keepdim=True)) & ((tile + 1) * TILE <= highs.amin(1, keepdim=True))
    first_on_device, end_on_device = first.to(device), end.to(device)

    def mask_mod(b: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (first_on_device[q] <= k) & (k < end_on_device[q])

    cut_count, cut_tiles = _listed(touched & ~whole, device)
    whole_count, whole_tiles = _listed(whole, device)
    return BlockMask.from_kv_blocks(
        cut_count, cut_tiles, whole_count, whole_tiles, BLOCK_SIZE=TILE, mask_mod=mask_mod, seq_lengths=(T, S)
    )


def _stretches(
    sizes_q: tuple[int, ...], sizes_k: tuple[int, ...], causal: bool, window: int | None
) -> tuple[Tensor, Tensor]:
    """(T,) and (T,) int32: first key and past-last key that each query sees, in the packed keys."""
    per_run = torch.tensor(sizes_q)
    starts_q, starts_k = (torch.tensor([0, *accumulate(sizes)][:-1]) for sizes in (sizes_q, sizes_k))
    start_k = starts_k.repeat_interleave(per_run)
    own = torch.arange(sum(sizes_q)) - starts_q.repeat_interleave(per_run) + start_k  # the key at the query's place
    first = start_k if window is None else torch.maximum(start_k, own - window + 1)
    end = own + 1 if causal else start_k + torch.tensor(sizes_k).repeat_interleave(per_run)
    return first.int(), end.int()


def _by_tile(x_T: Tensor) -> Tensor:
    """(tiles, 128); the last value fills the last tile."""
    filled = torch.cat([x_T, x_T[-1:].expand(-len(x_T) % TILE)])
    return filled.view(-1, TILE)


def _listed(tiles: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """How many tiles each row has, and which: those first, as BlockMask wants them."""
    order = tiles.int().argsort(dim=1, descending=True, stable=True)
    count = tiles.sum(1, dtype=torch.int32)
    return count[None, None].to(device), order.int()[None, None].to(device)
