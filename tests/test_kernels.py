"""Attention kernels that run on a CPU equal attention as in a textbook, in fp64.

A failure here alone is the kernel's arithmetic; ring attention and models have tests of their own.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flexsp.parallel.kernels import KERNELS, Block, math, sdpa, visible
from kernel_cases import CASES, Case, compare_attend, compare_blocks, textbook, textbook_gradients

every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
every_kernel = pytest.mark.parametrize("kernel", [KERNELS["sdpa"], KERNELS["math"]], ids=lambda kernel: kernel.name)


@pytest.fixture(params=["whole", "chunks"])
def chunked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same, and with so little memory that every run goes in several chunks."""
    if request.param == "chunks":
        monkeypatch.setattr(math, "ELEMENTS", 60)
        monkeypatch.setattr(sdpa, "ELEMENTS", 20)
        monkeypatch.setattr(visible, "QUERIES", 3)


@every_kernel
@every_case
@pytest.mark.usefixtures("chunked")
def test_a_kernel_equals_the_textbook_or_refuses(kernel, case):
    """`attend` by autograd, and `forward` and `backward` by hand: output, log-sums and all gradients."""
    if kernel.refuses(case.need()):
        assert kernel.name == "sdpa" and case.softcap is not None
        return
    compare_attend(kernel, case, torch.float64, 1e-10)
    compare_blocks(kernel, case, torch.float64, 1e-10)


@every_kernel
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)])
@pytest.mark.parametrize("name", ["grouped heads", "window 3", "positions", "not causal", "narrow values"])
def test_lower_precision_is_near(kernel, dtype, tolerance, name):
    """The textbook computes in fp64 from the same rounded inputs; what is left is the kernel's own rounding."""
    compare_attend(kernel, CASES[name], dtype, tolerance)
    compare_blocks(kernel, CASES[name], dtype, tolerance)


def merged(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One softmax from the outputs and log-sums of its blocks."""
    lse = torch.stack([lse for _, lse in parts]).logsumexp(0)
    return sum(out * (own - lse).exp().unsqueeze(-1) for out, own in parts), lse  # type: ignore[return-value]


@every_kernel
@pytest.mark.parametrize("window", [None, 3])
def test_gradients_of_blocks_sum_to_the_whole(kernel, window):
    """Keys in two blocks, as on a ring: the gradient of each from the output and log-sum of both together."""
    whole = Case((9, 4), heads=(4, 2), dims=(8, 6), window=window)
    q, k, v, dout = whole.tensors()
    halves = [[0, 1, 2, 3, 9, 10], [4, 5, 6, 7, 8, 11, 12]]  # rows of the keys: all tokens of both sequences
    positions = torch.tensor([*range(9), *range(4)])
    blocks = [
        Block.of((9, 4), sizes, causal=True, positions_q=positions, positions_k=positions[rows])
        for rows, sizes in zip(halves, [(4, 2), (5, 2)], strict=True)
    ]
    own = [(k[rows], v[rows]) for rows in halves]
    out, lse = merged([kernel.forward(q, *kv, b, whole.scores) for kv, b in zip(own, blocks, strict=True)])
    expected = textbook(whole, q, k, v)
    torch.testing.assert_close((out, lse), expected, rtol=1e-10, atol=1e-10)
    dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    for rows, kv, block in zip(halves, own, blocks, strict=True):
        grads = kernel.backward(dout, q, *kv, out, lse, block, whole.scores)
        dq += grads[0]
        dk[rows], dv[rows] = grads[1:]
    torch.testing.assert_close((dq, dk, dv), textbook_gradients(whole, q, k, v, dout), rtol=1e-10, atol=1e-10)


@every_kernel
def test_an_earlier_block_without_a_mask_and_the_own_causal_one_sum_to_the_whole(kernel):
    """What a ring's step does without positions: queries of the second half, each half of the keys by index."""
    whole, half = Case((8,)), Case((4,))
    q, k, v, dout = whole.tensors()
    before = Block.of((4,), (4,), causal=False)
    parts = [(k[:4], v[:4], before), (k[4:], v[4:], half.block)]
    out, lse = merged([kernel.forward(q[4:], k, v, block, whole.scores) for k, v, block in parts])
    torch.testing.assert_close(out, textbook(whole, q, k, v)[0][4:], rtol=1e-10, atol=1e-10)
    grads = [kernel.backward(dout[4:], q[4:], k, v, out, lse, block, whole.scores) for k, v, block in parts]
    dout[:4] = 0
    dq, dk, dv = textbook_gradients(whole, q, k, v, dout)
    torch.testing.assert_close(grads[0][0] + grads[1][0], dq[4:], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.cat([grads[0][1], grads[1][1]]), dk, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(torch.cat([grads[0][2], grads[1][2]]), dv, rtol=1e-10, atol=1e-10)


@every_kernel
def test_inputs_may_lie_in_memory_any_way(kernel):
    case = CASES["grouped heads"]
    q, k, v, dout = (x.transpose(0, 2).contiguous().transpose(0, 2) for x in case.tensors())
    assert q.stride(-1) != 1
    attended = kernel.attend(q, k, v, case.block, case.scores)
    torch.testing.assert_close(attended, textbook(case, q, k, v)[0], rtol=1e-10, atol=1e-10)
    out, lse = kernel.forward(q, k, v, case.block, case.scores)
    torch.testing.assert_close(out, textbook(case, q, k, v)[0], rtol=1e-10, atol=1e-10)
    grads = kernel.backward(dout, q, k, v, out, lse, case.block, case.scores)
    torch.testing.assert_close(grads, textbook_gradients(case, q, k, v, dout), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", ["runs of none", "grouped heads", "window 3", "not causal, no keys", "narrow values"])
def test_dropout_of_next_to_nothing_changes_nothing(name):
    """sdpa goes another way with dropout, by torch's autograd."""
    torch.manual_seed(0)
    compare_attend(KERNELS["sdpa"], CASES[name], torch.float64, 1e-10, dropout=1e-12)


def test_dropout_drops():
    case = Case((64,), heads=(16, 16))
    q, k, v, _ = case.tensors()
    v = torch.ones_like(v)
    torch.manual_seed(0)
    out = KERNELS["sdpa"].attend(q, k, v, case.block, case.scores, dropout=0.5)
    assert out.std() > 0.05  # without dropout every output is a mean of ones
    torch.testing.assert_close(out.mean().item(), 1.0, rtol=0.1, atol=0)


@pytest.mark.parametrize("window", [None, 1, 7, 300])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("by_positions", [False, True])
def test_chunks_keep_to_their_memory_and_hold_every_pair_that_is_seen_once(window, causal, by_positions, monkeypatch):
    monkeypatch.setattr(visible, "QUERIES", 8)  # under a window fewer than memory would allow
    sizes = (90, 1, 0, 40)
    places = tuple(i for n in sizes for i in range(n))
    case = Case(sizes, causal=causal, window=window, positions=(places, places) if by_positions else None)
    covered = torch.zeros(sum(sizes), sum(sizes), dtype=torch.int64)
    for chunk in visible.chunks(case.block, case.scores, elements=400):
        rows, columns = covered[chunk.queries, chunk.keys].shape
        assert rows == 1 or rows * columns <= 400
        covered[chunk.queries, chunk.keys] += 1 if chunk.seen is None else chunk.seen.long()
    torch.testing.assert_close(covered, case.seen().long())


def test_a_window_looks_at_few_keys():
    case = Case((4096,), window=64)
    pairs = sum(
        (c.queries.stop - c.queries.start) * (c.keys.stop - c.keys.start)
        for c in visible.chunks(case.block, case.scores, elements=1 << 22)
    )
    assert pairs < 4096 * (visible.QUERIES + 64)
