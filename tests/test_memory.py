"""Activation policies, the loss in chunks, types and replicas: the same loss and gradients, in less memory."""

from __future__ import annotations

import pytest
import torch
from transformers import Gemma2Config, Gemma4TextConfig, GraniteConfig, MixtralConfig, OPTConfig

from channel_pools import pool
from equality_ranks import check_equal, make_batch, worst_difference
from flexsp.parallel import RankError, forward_backward, offload, prepare_model
from flexsp.parallel.loss import BaseModel, find_base_model
from flexsp.parallel.model import make_mesh
from flexsp.parallel.policies import policies_of
from flexsp.plans import Group, MicroBatch, Plan
from flexsp.profile import Layout
from flexsp.profiler.memory import most_live_bytes
from reference import build, small_config

LENGTHS = [40, 3, 17, 9, 60, 1, 31, 22]
VOCABULARY = 1024


def plan(*micro_batches: tuple[str | None, list[tuple[list[int], list[int]]]], world_size: int = 4) -> Plan:
    """Micro-batches of a policy and (ranks, sequences)."""
    return Plan(
        num_devices=world_size,
        micro_batches=tuple(
            MicroBatch(policy=policy, groups=tuple(Group(ranks=tuple(r), sequences=tuple(s)) for r, s in groups))
            for policy, groups in micro_batches
        ),
    )


def mixed(*policies: str | None) -> Plan:
    """Degrees 4, 2, 1 and an idle rank; the three micro-batches under these policies, or all under one."""
    first, second, third = policies if len(policies) == 3 else policies * 3
    return plan(
        (first, [([0, 1, 2, 3], [4])]),
        (second, [([0, 1], [0, 5]), ([2], [1]), ([3], [2, 3])]),
        (third, [([0, 1], [6]), ([3], [7])]),
    )


# ---- policies


def offloading_all(*arguments) -> None:
    """What a small model keeps is small: it leaves all the same."""
    offload.SMALL_BYTES = 0
    check_equal(*arguments)


RINGS = {4: Layout(ulysses=2, ring=2), 2: Layout(ulysses=1, ring=2)}


@pytest.mark.parametrize(
    ("policies", "prepare", "layouts"),
    [
        (["selective"], {}, {}),
        (["full"], {}, {}),
        (["offload"], {}, {}),
        (["offload"], {"shard_layers": False}, {}),
        (["selective", "offload", "full"], {}, RINGS),
        (["none", None, "selective"], {"activation_checkpointing": True}, {}),
    ],
    ids=["selective", "full", "offload", "offload, one unit", "a policy each, in rings", "with full as default"],
)
def test_policies_equal_one_device(ranks, policies, prepare, layouts):
    cases = [(LENGTHS, mixed(*policies), 0.2)]
    ranks(4).run(offloading_all, small_config(num_hidden_layers=3), torch.float64, cases, prepare, layouts)


def held_bytes(policies: list[str], chunk_tokens: int, tokens: int) -> list[int]:
    """The most bytes that live tensors hold in a step of one long row under each policy."""
    config = small_config(num_hidden_layers=4, vocab_size=VOCABULARY)
    model = prepare_model(build(config, torch.float32), loss_chunk_tokens=chunk_tokens)
    found = []
    for policy in policies:
        whole = plan((policy, [([0], [0]), ([1], [1])]), world_size=2)
        batch = make_batch([tokens, tokens], whole, seed=0, masked=0.0, vocab_size=VOCABULARY)
        forward_backward(model, batch, pool())  # gathers and gradients are there from now on
        found.append(most_live_bytes(lambda batch=batch: forward_backward(model, batch, pool())))
    return found


def test_each_policy_holds_less_than_the_one_before(ranks):
    for none, selective, full in ranks(2).run(held_bytes, ["none", "selective", "full"], 64, 512):
        assert selective < 0.7 * none
        assert full < 0.7 * selective


def kept_on_the_device() -> tuple[int, int]:
    """Storages that wait on the device for the backward: all that layers keep, and under offload."""
    offload.SMALL_BYTES = 0
    alive: list[int] = []
    leave = offload._Stash.leave

    def count(stash: offload._Stash) -> None:
        parcels = stash._alive()
        leave(stash)
        alive.append(sum(parcel.device is not None for parcel in parcels))

    patch = pytest.MonkeyPatch()
    patch.setattr(offload._Stash, "leave", count)
    model = prepare_model(build(small_config(num_hidden_layers=5), torch.float32))
    try:
        batch = make_batch([9, 9], plan(("offload", [([0], [0]), ([1], [1])]), world_size=2), seed=0, masked=0.0)
        forward_backward(model, batch, pool())
    finally:
        patch.undo()
    return len(alive), sum(alive)


def test_all_layers_but_the_last_leave_the_device(ranks):
    assert ranks(2).run(kept_on_the_device) == [(4, 0), (4, 0)]


def refuses_what_it_does_not_run() -> None:
    model = prepare_model(build(small_config(), torch.float64))
    for name, said in (("recompute", "policy='recompute' is unknown; choose one of none, selective, full, offload"),):
        batch = make_batch(LENGTHS, mixed(None, "full", name), seed=0, masked=0.0)
        with pytest.raises(RankError, match=said):
            forward_backward(model, batch, pool())
    forward_backward(model, make_batch(LENGTHS, mixed("full"), seed=0, masked=0.0), pool())  # nothing hangs


def test_an_unknown_policy_is_an_error_on_all_ranks_before_anything_runs(ranks):
    ranks(4).run(refuses_what_it_does_not_run)


def layers_without_an_mlp() -> tuple[str, ...]:
    config = OPTConfig(
        vocab_size=64, hidden_size=32, ffn_dim=48, num_hidden_layers=1, num_attention_heads=4, dropout=0.0,
        word_embed_proj_dim=32, max_position_embeddings=64,
    )  # fmt: skip
    policies = policies_of(prepare_model(build(config, torch.float32)))
    with pytest.raises(ValueError, match=r"policy='selective': the layers of .*OPTForCausalLM have no MLP"):
        policies.check(["selective"])
    return policies.served


def test_selective_is_refused_where_layers_have_no_mlp_of_their_own(ranks):
    assert ranks(2).run(layers_without_an_mlp)[0] == ("none", "full", "offload")


# ---- the loss in chunks


@pytest.mark.parametrize(
    "prepare",
    [{}, {"shard_layers": False}, {"reshard_after_forward": False}, {"activation_checkpointing": True}],
    ids=["layers", "one unit", "kept gathered", "full recompute"],
)
@pytest.mark.parametrize("tied", [False, True], ids=["", "tied"])
def test_the_loss_in_chunks_equals_one_device(ranks, prepare, tied):
    config = small_config(tie_word_embeddings=tied)
    cases = [(LENGTHS, mixed(None), 0.2)]
    ranks(4).run(check_equal, config, torch.float64, cases, {**prepare, "loss_chunk_tokens": 7})


SIZES = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=4096, pad_token_id=None, bos_token_id=None,
    eos_token_id=None,
)  # fmt: skip
HEADS = {
    "a softcap of the logits": Gemma2Config(
        **SIZES, final_logit_softcapping=3.0, attn_logit_softcapping=None, query_pre_attn_scalar=8,
        layer_types=["full_attention"] * 2, tie_word_embeddings=False,
    ),
    "a forward that reads the shape of its tokens": Gemma4TextConfig(
        **{**SIZES, "num_hidden_layers": 4}, num_kv_shared_layers=2, sliding_window=5, global_head_dim=16,
        layer_types=["sliding_attention", "full_attention"] * 2, vocab_size_per_layer_input=64,
        hidden_size_per_layer_input=8, final_logit_softcapping=3.0,
    ),
    "a forward with experts": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "logits that are scaled": GraniteConfig(**{k: v for k, v in SIZES.items() if k != "head_dim"}, logits_scaling=3.0),
}  # fmt: skip


def logits_in_chunks(config) -> tuple[float, float, str]:
    assert isinstance(find_base_model(build(config, torch.float64)), BaseModel)
    batch = make_batch(LENGTHS, mixed(None), seed=0, masked=0.2)
    return worst_difference(config, torch.float64, batch, loss_chunk_tokens=7)


@pytest.mark.parametrize("config", HEADS.values(), ids=HEADS.keys())
def test_what_a_model_does_to_its_logits_is_done_in_chunks_too(ranks, config):
    """Gemma's norms are in fp32 even here, which is 1e-7 in the gradients of their weights."""
    for loss, gradient, where in ranks(4).run(logits_in_chunks, config):
        assert max(loss, gradient) <= 1e-6, where


def one_rank_has_no_labels() -> tuple[float, float, str]:
    batch = make_batch(LENGTHS, mixed(None), seed=0, masked=0.0)
    for row in batch.source.labels[6:]:  # all that ranks 0 and 1 hold of the last micro-batch, and rank 3
        row[:] = [-100] * len(row)
    return worst_difference(small_config(), torch.float64, batch, loss_chunk_tokens=7)


def test_a_rank_whose_labels_are_all_masked_gives_every_parameter_a_gradient(ranks):
    for loss, gradient, where in ranks(4).run(one_rank_has_no_labels):
        assert max(loss, gradient) <= 1e-9, where


def largest_logits(chunk_tokens: int, tokens: int) -> int:
    """The most tokens whose logits were ever in one tensor."""
    most = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal most
            out = func(*args, **(kwargs or {}))
            for each in torch.utils._pytree.tree_leaves(out):
                if isinstance(each, torch.Tensor) and each.shape[-1:] == (VOCABULARY,):
                    most = max(most, each.numel() // VOCABULARY)
            return out

    config = small_config(vocab_size=VOCABULARY)
    model = prepare_model(build(config, torch.float32), loss_chunk_tokens=chunk_tokens)
    batch = make_batch([tokens] * 2, plan((None, [([0], [0]), ([1], [1])]), world_size=2), 0, 0.0, VOCABULARY)
    with Watch():
        forward_backward(model, batch, pool())
    return most


def test_logits_of_a_long_row_are_never_held(ranks):
    """Chunks are above the 32 rows of the head's own matrix, which is as wide as they are."""
    assert ranks(2).run(largest_logits, 40, 200) == [40, 40]
    assert ranks(2).run(largest_logits, 400, 200) == [200, 200]


class Averaging(torch.nn.Module):
    """A head that looks at the tokens beside one."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(64, 32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + x.mean(dim=1, keepdim=True)) @ self.weight.T


def test_a_head_that_does_not_treat_each_token_alike_is_found_out():
    model = build(small_config(), torch.float64)
    assert isinstance(find_base_model(model), BaseModel)
    other = build(small_config(), torch.float64)
    other.set_output_embeddings(Averaging().double())
    assert find_base_model(other) == "the logits of a token depend on the tokens beside it"
    assert "forward" not in vars(other.model)


class OfIds(torch.nn.Module):
    """A model whose logits are of its hidden states and its tokens' ids; where `needed`, without ids there are none."""

    def __init__(self, needed: bool) -> None:
        super().__init__()
        self.model = build(small_config(), torch.float64)
        self.base_model, self.needed = self.model.model, needed

    def get_output_embeddings(self):
        return self.model.lm_head

    def get_decoder(self):
        return self.base_model

    def forward(self, input_ids=None, **arguments):
        output = self.model(input_ids=input_ids, **arguments)
        if self.needed or input_ids is not None:
            output.logits = output.logits + input_ids[..., None]
        return output


@pytest.mark.parametrize("needed", [True, False])
def test_a_head_that_looks_at_the_tokens_ids_is_found_out(needed):
    """Stand-ins for them would give it other logits."""
    assert find_base_model(OfIds(needed)) == "its logits are made of the tokens' ids too"


def refuses_chunks_of_nothing() -> None:
    with pytest.raises(ValueError, match="loss_chunk_tokens=0 must be at least 1"):
        prepare_model(build(small_config(), torch.float64), loss_chunk_tokens=0)


def test_chunks_of_no_tokens_are_refused(ranks):
    ranks(2).run(refuses_chunks_of_nothing)


# ---- types and replicas


def trained_types(weights: torch.dtype, param: torch.dtype | None, reduce: torch.dtype | None) -> list[torch.dtype]:
    """Types of a weight, its gradient, a moment of Adam, and of what a layer computes in."""
    model = prepare_model(build(small_config(), weights), param_dtype=param, reduce_dtype=reduce)
    seen = []
    model.model.layers[0].register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    result = forward_backward(model, make_batch(LENGTHS, mixed(None), seed=0, masked=0.0), pool())
    assert result.kernels == {"sdpa"}  # FSDP2 copies what it casts, and a kernel's name must not be lost in a copy
    parameter = model.model.layers[0].mlp.up_proj.weight
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    return [parameter.dtype, parameter.grad.dtype, optimizer.state[parameter]["exp_avg"].dtype, seen[0]]


def test_weights_states_and_computation_have_the_types_they_are_given(ranks):
    half, full = torch.bfloat16, torch.float32
    for weights, param, reduce in ((full, half, None), (half, None, full), (half, full, half)):
        (found, *others) = ranks(4).run(trained_types, weights, param, reduce)
        assert found == [weights, weights, weights, param or weights]
        assert all(each == found for each in others)


def share_of_bfloat16(reduce: torch.dtype | None) -> float:
    """Of all gradients, how many bfloat16 could hold: half of what each rank has is, their sum need not be."""
    model = prepare_model(build(small_config(), torch.float32), param_dtype=torch.bfloat16, reduce_dtype=reduce)
    once = plan((None, [([0, 1], [0, 1, 2]), ([2], [3, 4]), ([3], [5, 6, 7])]))  # micro-batches add up in float32
    forward_backward(model, make_batch(LENGTHS, once, seed=0, masked=0.0), pool())
    gradients = torch.cat([p.grad.to_local().flatten() for p in model.parameters()])
    gradients = gradients[gradients != 0]
    return (gradients == gradients.bfloat16().float()).float().mean().item()


def test_gradients_are_reduced_in_the_type_that_is_given_and_in_float32_unless_one_is(ranks):
    for reduce, exact in ((torch.bfloat16, True), (torch.float32, False), (None, False)):
        for share in ranks(4).run(share_of_bfloat16, reduce):
            assert (share == 1.0) == exact and (exact or share < 0.7), (reduce, share)


def on_two_replicas(cases) -> None:
    check_equal(small_config(), torch.float64, cases, {"mesh": make_mesh(2), "loss_chunk_tokens": 7})
    with pytest.raises(ValueError, match=r"replicate=3 must divide world_size=4; choose one of 1, 2, 4"):
        make_mesh(3)


def test_two_replicas_of_two_shards_equal_one_device(ranks):
    ranks(4).run(on_two_replicas, [(LENGTHS, mixed("full", None, "selective"), 0.2)])
