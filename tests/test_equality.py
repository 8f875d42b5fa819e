"""Loss and gradients equal one device's on the same global batch, on any legal plan."""

from __future__ import annotations

import random

import pytest
import torch

from equality_ranks import check_equal, random_plan
from flexsp.parallel import RankError
from flexsp.plans import Group, MicroBatch, Plan
from flexsp.profile import Layout
from reference import small_config

WORLDS = [2, 4]
HEADS = {
    "MHA": (4, 4),
    "GQA": (4, 2),  # at sp_degree 4 the KV heads are repeated
    "GQA, degree does not divide KV heads": (12, 3),
    "MQA": (4, 1),
}


def plan(world_size: int, *micro_batches: list[tuple[list[int], list[int]]]) -> Plan:
    """Micro-batches of (ranks, sequences)."""
    return Plan(
        num_devices=world_size,
        micro_batches=tuple(
            MicroBatch(groups=tuple(Group(ranks=tuple(r), sequences=tuple(s)) for r, s in groups))
            for groups in micro_batches
        ),
    )


def generated_cases(
    world_size: int, count: int, seed: int, degrees: tuple[int, ...] = (1, 2, 4)
) -> list[tuple[list[int], Plan, float]]:
    """Lengths, a legal plan for them, and the share of labels that is masked."""
    draw = random.Random(seed)
    degrees = tuple(d for d in degrees if d <= world_size)
    cases = []
    for i in range(count):
        lengths = [draw.choice([1, 2, 3, 5, 7, 17, 40, 111]) for _ in range(draw.randint(12, 16))]
        cases.append((lengths, random_plan(len(lengths), world_size, draw, list(degrees)), 0.3 * (i % 2)))
    return cases


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("heads", HEADS.values(), ids=HEADS.keys())
def test_generated_plans_equal_one_device_in_fp64(ranks, world_size, heads):
    cases = generated_cases(world_size, 8, seed=world_size)
    ranks(world_size).run(check_equal, small_config(*heads), torch.float64, cases)


@pytest.mark.parametrize("world_size", WORLDS)
def test_generated_plans_equal_one_device_in_fp32(ranks, world_size):
    cases = generated_cases(world_size, 8, seed=10 + world_size)
    ranks(world_size).run(check_equal, small_config(), torch.float32, cases)


def ring(*layouts: tuple[int, int]) -> dict[int, Layout]:
    """Layouts, given as (ulysses, ring), by degree."""
    return {u * r: Layout(ulysses=u, ring=r) for u, r in layouts}


RINGS = {
    "rings alone": (2, (4, 2), (1, 2), ring((1, 2)), "groups"),
    "rings alone, four ranks": (4, (4, 2), (1, 2, 4), ring((1, 2), (1, 4)), "groups"),
    "heads x context": (4, (4, 1), (1, 2, 4), ring((2, 2)), "groups"),
    "heads x context, peers": (4, (4, 2), (1, 2, 4), ring((2, 2), (1, 2)), "peers"),
    "a degree that is no power of two": (4, (4, 2), (1, 2, 3), ring((1, 3)), "groups"),
    "more ranks than heads": (4, (2, 1), (1, 2, 4), ring((2, 2)), "peers"),
    "heads that the degree does not divide": (4, (3, 3), (1, 2, 3, 4), ring((1, 2), (1, 4)), "peers"),
    "KV heads repeated within a ring": (4, (6, 3), (1, 2, 4), ring((2, 2)), "groups"),
    "Ulysses over peers": (4, (4, 2), (1, 2, 4), {}, "peers"),
}


@pytest.mark.parametrize(("world_size", "heads", "degrees", "layouts", "transport"), RINGS.values(), ids=RINGS.keys())
def test_any_degree_and_layout_equals_one_device(ranks, world_size, heads, degrees, layouts, transport):
    cases = generated_cases(world_size, 4, seed=20, degrees=degrees)
    ranks(world_size).run(check_equal, small_config(*heads), torch.float64, cases, None, layouts, transport)


EIGHT = {
    "more ranks than heads": ((4, 2), ring((4, 2), (2, 2), (1, 2))),
    "six of eight ranks": ((6, 2), ring((3, 2), (2, 2), (1, 5))),
}


@pytest.mark.slow
@pytest.mark.parametrize(("heads", "layouts"), EIGHT.values(), ids=EIGHT.keys())
def test_larger_groups_equal_one_device(broken_ranks, heads, layouts):
    """Eight ranks, closed when this is done: they are slow to start and not for other tests."""
    cases = generated_cases(8, 4, seed=30, degrees=(1, *layouts))
    broken_ranks(8).run(check_equal, small_config(*heads), torch.float64, cases, None, layouts, timeout_s=240.0)


ALL = [0, 1, 2, 3]
SPECIAL = {
    "a row shorter than its group": ([2, 30], plan(4, [(ALL, [0])], [(ALL, [1])])),
    "one token in a group of four": ([1, 9], plan(4, [(ALL, [0])], [([0, 1], [1])])),
    "single-token sequences among others": ([1, 1, 6, 1], plan(4, [([0, 1], [0, 2, 1]), ([2], [3])])),
    "idle ranks": ([5, 8], plan(4, [([2], [0])], [([0, 1], [1])])),
    "one longer than all others together": (
        [203, 9, 4, 11],
        plan(4, [(ALL, [0])], [([0, 1], [1]), ([2], [2]), ([3], [3])]),
    ),
    "lengths that no degree divides": ([7, 13, 5], plan(4, [(ALL, [0, 1])], [([2, 3], [2])])),
    "degrees of 2 and 1 beside each other": ([21, 8, 3], plan(4, [([0, 1], [0]), ([2], [1]), ([3], [2])])),
}


@pytest.mark.parametrize("case", SPECIAL.values(), ids=SPECIAL.keys())
def test_special_shapes_equal_one_device(ranks, case):
    lengths, special = case
    for layouts in ({}, ring((2, 2), (1, 2))):
        ranks(4).run(check_equal, small_config(), torch.float64, [(lengths, special, 0.0)], None, layouts)


MIXED = (
    [40, 3, 17, 9, 60, 1],
    plan(4, [(ALL, [4])], [([0, 1], [0, 5]), ([2], [1]), ([3], [2, 3])]),
)


def test_activation_checkpointing_equals_one_device(ranks):
    ranks(4).run(check_equal, small_config(), torch.float64, [(*MIXED, 0.2)], {"activation_checkpointing": True})


def test_parameters_kept_gathered_equal_one_device(ranks):
    ranks(4).run(check_equal, small_config(), torch.float64, [(*MIXED, 0.2)], {"reshard_after_forward": False})


def test_parameters_gathered_at_once_equal_one_device(ranks):
    ranks(4).run(check_equal, small_config(), torch.float64, [(*MIXED, 0.2)], {"shard_layers": False})


def test_tied_embeddings_equal_one_device(ranks):
    ranks(4).run(check_equal, small_config(tie_word_embeddings=True), torch.float64, [(*MIXED, 0.0)])


def test_rope_that_reads_no_local_position_equals_one_device(ranks):
    rope = {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}
    ranks(4).run(check_equal, small_config(rope_parameters=rope), torch.float64, [(*MIXED, 0.0)])


@pytest.mark.parametrize("layouts", [{}, ring((2, 2), (1, 2))], ids=["Ulysses", "heads x context"])
def test_another_kernel_than_the_default_equals_one_device(ranks, layouts):
    ranks(4).run(check_equal, small_config(), torch.float64, [(*MIXED, 0.0)], {"attention": "math"}, layouts)


def a_kernel_that_cannot_serve_is_named() -> None:
    config = small_config()
    with pytest.raises(RankError, match=r"step 0, rank 0: .*kernel='varlen' cannot serve: it runs on CUDA"):
        check_equal(config, torch.float64, [([5, 3], plan(2, [([0, 1], [0, 1])]), 0.0)], {"attention": "varlen"})


def test_a_kernel_that_cannot_serve_is_an_error_on_all_ranks_before_the_step(ranks):
    ranks(2).run(a_kernel_that_cannot_serve_is_named)
