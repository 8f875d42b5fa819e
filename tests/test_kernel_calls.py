"""Which kernel serves what, what each refuses, and how those for GPUs call what they stand on."""

from __future__ import annotations

import functools
import importlib.metadata
import sys
import types
from typing import Any

import pytest
import torch

from flexsp.parallel.kernels import KERNELS, Block, Need, Scores, choose, flash, flex
from flexsp.parallel.kernels.flex import block_mask
from kernel_cases import CASES, Case, compare_attend, compare_blocks, textbook, textbook_gradients


def test_flex_is_compiled_for_every_shape_that_degrees_ask_of_it(monkeypatch):
    """torch compiles eight variants of a function and runs the others as they are, with all T x T scores."""
    compiled = {}

    def compile(function, **options):
        compiled.update(options)
        return function

    monkeypatch.setattr(torch, "compile", functools.wraps(torch.compile)(compile))  # its signature is looked at
    flex._function.cache_clear()
    flex._function("cuda")
    flex._function.cache_clear()
    assert compiled == {"dynamic": True, "fullgraph": True, "recompile_limit": flex.COMPILATIONS}


def need(**changes: object) -> Need:
    fields = {"device_type": "cpu", "dtype": torch.float32, "head_dim": 64, "value_dim": 64}
    return Need(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("changes", [{}, {"window": 5}, {"blocks": True}, {"by_positions": True}, {"dropout": True}])
def test_on_the_cpu_sdpa_serves(changes):
    assert choose(need(**changes)).name == "sdpa"
    assert choose(need(**changes)) is choose(need(**changes))


@pytest.mark.parametrize(
    "changes", [{}, {"blocks": True}, {"by_positions": True}, {"window": 5, "dtype": torch.float64}]
)
def test_softcap_on_the_cpu_is_for_math(changes):
    assert choose(need(softcap=30.0, **changes)).name == "math"


def test_on_cuda_the_fastest_that_serves(monkeypatch):
    """As far as refusals go: what runs there is tested where there is a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(flash, "_absent", lambda: "flash_attn is not installed")
    half = {"device_type": "cuda", "dtype": torch.bfloat16}
    choose.cache_clear()
    for changes, name in [
        ({}, "varlen"),
        ({"window": 5, "blocks": True}, "varlen"),
        ({"by_positions": True, "blocks": True}, "math"),
        ({"dtype": torch.float32, "blocks": True}, "math"),
        ({"dtype": torch.float64}, "sdpa"),
        ({"head_dim": 12, "value_dim": 12}, "sdpa"),
        ({"softcap": 30.0, "blocks": True}, "math"),
    ]:
        assert choose(need(**{**half, **changes})).name == name, changes
    choose.cache_clear()


@pytest.mark.parametrize(
    "name, changes, reason",
    [
        ("flash-attn", {}, "it runs on CUDA, and tokens are on cpu"),
        ("varlen", {}, "it runs on CUDA, and tokens are on cpu"),
        ("varlen", {"softcap": 30.0}, "it has no softcap, which is 30.0"),
        ("varlen", {"dropout": True}, "it has no dropout"),
        ("varlen", {"device_type": "cuda"}, "float16 and bfloat16, and tokens are float32"),
        ("varlen", {"device_type": "cuda", "dtype": torch.float16, "by_positions": True}, "not by positions"),
        ("varlen", {"device_type": "cuda", "dtype": torch.float16, "value_dim": 32}, "head_dim=64 differs.* 32"),
        ("varlen", {"device_type": "cuda", "dtype": torch.float16, "head_dim": 320, "value_dim": 320}, "up to 256"),
        ("flex", {}, "its backward runs on CUDA, and tokens are on cpu"),
        ("flex", {"device_type": "cuda", "blocks": True}, "neither blocks nor positions"),
        ("flex", {"device_type": "cuda", "dropout": True}, "it has no dropout"),
        ("flex", {"device_type": "cuda", "dtype": torch.float64}, "does not compute float64"),
        ("flex", {"device_type": "cuda", "head_dim": 8}, "head_dim=8 is below 16"),
        ("sdpa", {"softcap": 30.0}, "it has no softcap, which is 30.0"),
        ("sdpa", {"dropout": True, "blocks": True}, "its dropout is for whole sequences"),
        ("sdpa", {"device_type": "cuda", "blocks": True}, "log-sums on the CPU alone, and tokens are on cuda"),
        ("math", {"dropout": True}, "it has no dropout"),
    ],
)
def test_a_kernel_that_is_asked_for_by_name_says_why_it_refuses(name, changes, reason, monkeypatch):
    monkeypatch.setattr(flash, "_absent", lambda: "flash_attn is not installed")
    with pytest.raises(ValueError, match=rf"^kernel='{name}' cannot serve: .*{reason}") as error:
        choose(need(**changes), name)
    assert "\n" not in str(error.value)


def test_a_name_overrides_and_an_unknown_one_is_an_error():
    assert choose(need(), "math").name == "math"
    with pytest.raises(
        ValueError, match=r"kernel='fast' is unknown; choose one of varlen, flash-attn, flex, sdpa, math"
    ):
        choose(need(), "fast")


def test_where_all_refuse_each_says_why():
    with pytest.raises(
        ValueError, match=r"dropout=True, softcap=3.0.*sdpa: it has no softcap.*without attention dropout"
    ):
        choose(need(dropout=True, softcap=3.0))


@pytest.mark.parametrize("field, value", [("window", 0), ("softcap", 0.0)])
def test_scores_are_checked(field, value):
    with pytest.raises(ValueError, match=rf"{field}={value}"):
        Scores(scaling=1.0, **{field: value})


@pytest.mark.parametrize("window", [None, 3])
def test_varlen_calls_torch_as_it_wants(window):
    """On tensors without data: arguments bind, shapes and types come back as promised."""
    case = Case((5, 1, 0), heads=(4, 2), window=window)
    q, k, v, dout = (x.to("meta", torch.bfloat16) for x in case.tensors())
    block = Block.of((5, 1, 0), (5, 1, 0), causal=True, device="meta")
    kernel = KERNELS["varlen"]
    out, lse = kernel.forward(q, k, v, block, case.scores)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, (6, 4), torch.float32)
    grads = kernel.backward(dout, q, k, v, out, lse, block, case.scores)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]
    inputs = [x.requires_grad_() for x in (q, k, v)]
    grads = torch.autograd.grad(kernel.attend(*inputs, block, case.scores), inputs, dout)
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


def stand_in(case: Case) -> types.ModuleType:
    """flash_attn 2.7's functions of these names and arguments, by the textbook, for one case."""
    module = types.ModuleType("flash_attn.flash_attn_interface")

    def check(cu_seqlens_q, cu_seqlens_k, max_q, max_k, dropout_p, scale, causal, left, right, softcap):  # type: ignore[no-untyped-def]
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert cu_seqlens_q.tolist() == [0, *torch.tensor(case.sizes_q).cumsum(0)]
        assert max_q >= max(case.sizes_q) and max_k >= max(case.sizes_k or case.sizes_q) and dropout_p == 0.0
        assert (scale, causal, softcap) == (case.scaling, case.causal, case.softcap or 0.0)
        assert (left, right) == (-1 if case.window is None else case.window - 1, 0 if case.causal else -1)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # type: ignore[no-untyped-def] # fmt: skip
        check(
            cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal, *window_size,
            softcap,
        )  # fmt: skip
        return textbook(case, q, k, v)[0]

    def _flash_attn_varlen_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # type: ignore[no-untyped-def] # fmt: skip
        check(
            cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
            window_size_left, window_size_right, softcap,
        )  # fmt: skip
        out, lse = textbook(case, q, k, v)
        return out, lse.masked_fill(lse.isneginf(), torch.inf).T.float().contiguous(), None, None

    def _flash_attn_varlen_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # type: ignore[no-untyped-def] # fmt: skip
        check(
            cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
            window_size_left, window_size_right, softcap,
        )  # fmt: skip
        expected_out, lse = textbook(case, q, k, v)
        torch.testing.assert_close(out, expected_out)
        torch.testing.assert_close(softmax_lse, lse.masked_fill(lse.isneginf(), torch.inf).T.float().contiguous())
        for mine, grad in zip((dq, dk, dv), textbook_gradients(case, q, k, v, dout), strict=True):
            mine.copy_(grad)

    for function in (flash_attn_varlen_func, _flash_attn_varlen_forward, _flash_attn_varlen_backward):
        setattr(module, function.__name__, function)
    return module


@pytest.mark.parametrize("name", ["causal", "window 3", "softcap and window", "not causal, no keys"])
def test_flash_attn_calls_the_package_as_it_wants(name, monkeypatch):
    case = CASES[name]
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", stand_in(case))
    compare_attend(KERNELS["flash-attn"], case, torch.float64, 1e-10)
    q, k, v, dout = case.tensors()
    out, lse = KERNELS["flash-attn"].forward(q, k, v, case.block, case.scores)
    torch.testing.assert_close((out, lse), (textbook(case, q, k, v)[0], textbook(case, q, k, v)[1].float()))
    grads = KERNELS["flash-attn"].backward(dout, q, k, v, out, lse, case.block, case.scores)
    torch.testing.assert_close(grads, textbook_gradients(case, q, k, v, dout))


@pytest.mark.parametrize("window", [None, 1, 20, 300])
@pytest.mark.parametrize("causal, sizes_k", [(True, None), (False, None), (False, (1, 0, 200, 128))])
def test_flex_tiles_and_mask_are_what_is_seen(window, causal, sizes_k):
    """A tile that is left out has nothing seen, a whole one everything; in the others the mask says which."""
    sizes = (150, 5, 0, 140)
    if sizes_k is not None and window is not None:
        return  # a window by index has the same runs on both sides
    case = Case(sizes, sizes_k, causal=causal, window=window)
    mask, seen = block_mask(sizes, sizes_k or sizes, causal, window, torch.device("cpu")), case.seen()
    T, S = seen.shape
    by_mask = mask.mask_mod(0, 0, torch.arange(T)[:, None], torch.arange(S)[None, :])
    assert torch.equal(by_mask, seen)
    lists = [(mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)]
    for i in range(-(-T // 128)):
        cut, whole = (set(tiles[0, 0, i, : int(count[0, 0, i])].tolist()) for count, tiles in lists)
        for j in range(-(-S // 128)):
            tile = seen[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128]
            assert not tile.any() if j not in cut | whole else tile.all() or j in cut, (i, j)
            assert (tile.all() and tile.shape[1] == 128) == (j in whole) and not cut & whole, (i, j)


@pytest.mark.parametrize("name", ["causal", "window 3", "softcap", "not causal, no keys", "narrow values"])
def test_flex_output_uncompiled(name, monkeypatch):
    """The CPU has no backward of it."""
    monkeypatch.setattr(torch.nn.attention.flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    case = CASES[name]
    q, k, v, _ = case.tensors()
    out = KERNELS["flex"].attend(q, k, v, case.block, case.scores)
    torch.testing.assert_close(out, textbook(case, q, k, v)[0], rtol=1e-10, atol=1e-10)


HEADS_ON_CUDA: dict[str, Any] = {"heads": (4, 2), "device": "cuda"}
ON_CUDA = {
    "causal": Case((130, 1, 0, 257), dims=(64, 64), **HEADS_ON_CUDA),
    "window": Case((130, 1, 0, 257), dims=(64, 64), window=33, **HEADS_ON_CUDA),
    "softcap": Case((130, 1, 0, 257), dims=(64, 64), softcap=2.0, **HEADS_ON_CUDA),
    "not causal": Case((130, 1, 0), (60, 0, 9), causal=False, dims=(64, 64), **HEADS_ON_CUDA),
    "one query a run": Case((1, 1, 0, 1), (7, 5, 3, 0), causal=False, dims=(64, 64), **HEADS_ON_CUDA),
    "positions": Case((40,), dims=(64, 64), positions=(tuple(range(0, 80, 2)), tuple(range(40))), **HEADS_ON_CUDA),
    "narrow values": Case((130, 9), dims=(64, 32), **HEADS_ON_CUDA),
}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("case", ON_CUDA.values(), ids=ON_CUDA.keys())
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
def test_on_cuda_a_kernel_equals_the_textbook_or_refuses(kernel, case):
    """In bf16, whose rounding of inputs the textbook shares; 5e-2 is a few of its steps at values of 1 to 3."""
    if not kernel.refuses(case.need(torch.bfloat16, blocks=False)):
        compare_attend(kernel, case, torch.bfloat16, 5e-2)
    if not kernel.refuses(case.need(torch.bfloat16)):
        compare_blocks(kernel, case, torch.bfloat16, 5e-2)


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("2.7.4.post1", None),
        ("2.10rc1", None),
        ("2.6.3", "flash_attn 2.6.3 is older than 2.7"),
        ("unknown", "is older"),
    ],
)
def test_an_installed_flash_attn_is_judged_by_its_version(monkeypatch, version, said):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    found = flash._absent.__wrapped__()
    assert found is None if said is None else said in found


def test_a_folder_of_the_name_flash_attn_is_no_installation(monkeypatch, tmp_path):
    """As flash-attn 4 and a source checkout on the path bring one."""
    (tmp_path / "flash_attn").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert flash._absent.__wrapped__() == "flash_attn is not installed"
