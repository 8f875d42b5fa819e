"""What the profile says of activation policies, and which of them a run may use."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import flexsp
from channel_pools import pool
from flexsp.parallel import prepare_model
from flexsp.plans import Status
from flexsp.profile import Policy, Profile
from flexsp.profiler import measure_profile
from flexsp.profiler.memory import PeakFit, most_live_bytes
from flexsp.profiler.parts import needed_bytes
from flexsp.profiler.points import Point
from flexsp.profiler.policies import Pair, PolicyReading, policies_by_parts, policy
from flexsp.train.config import parse_config
from flexsp.train.run_profile import _with_policies
from profiles import profile
from reference import build, small_config

pytestmark = pytest.mark.alone


def measured() -> tuple[Profile, str]:
    """A measured profile, and what a policy of another name says."""
    model = prepare_model(build(small_config(num_hidden_layers=4), torch.float32))
    names = ["selective", "full", "offload"]
    found = measure_profile(model, pool(), sp_degrees=[1], max_tokens_per_rank=256, policies=names)
    with pytest.raises(ValueError, match="policy='half' is unknown") as error:
        measure_profile(model, pool(), sp_degrees=[1], policies=["half"])
    return found, str(error.value)


def test_a_measured_profile_has_the_policies_that_were_asked_for(ranks):
    found, _ = ranks(2).run(measured, timeout_s=120.0)[0]
    memory = found.memory
    assert list(memory.policies) == ["selective", "full"]  # offload has no place to go on a CPU
    selective, full = memory.policies["selective"], memory.policies["full"]
    assert full.activation_bytes_per_token < selective.activation_bytes_per_token
    assert selective.activation_bytes_per_token < memory.activation_bytes_per_token
    assert selective.compute_factor >= 1.0
    assert full.compute_factor >= 1.0
    held = found.capacity_tokens(1, "full")
    assert held > found.capacity_tokens(1)
    plan = flexsp.plan([held], found)  # too long for a rank under no policy
    assert plan.status is not Status.INFEASIBLE
    assert [micro_batch.policy for micro_batch in plan.micro_batches] == ["full"]


def reading(slope: float, *pairs: tuple[float, float]) -> PolicyReading:
    peaks = PeakFit(bytes_per_token=slope, at_rest_bytes=0.0, residual_bytes=0.0)
    row = Point(1, (8,))
    return PolicyReading(peaks=peaks, pairs=tuple(Pair(point=row, without_s=a, with_s=b) for a, b in pairs))


def test_parts_come_to_the_whole_by_difference():
    """Three layers, one layer, and one with the whole vocabulary, of a model of 11."""

    def whole(values) -> float:
        three, one, head = values
        return three + 8 * (three - one) / 2 + (head - one)

    parts = [
        {"full": reading(30.0, (3.0, 4.2)), "offload": reading(90.0, (3.0, 3.6))},
        {"full": reading(26.0, (1.0, 1.4)), "offload": reading(60.0, (1.0, 1.2))},
        {"full": reading(40.0), "offload": reading(65.0)},
    ]
    found = policies_by_parts(parts, whole, lambda mix: 12.0)
    assert found["full"].activation_bytes_per_token == 30 + 8 * 2 + 14
    assert found["full"].compute_factor == pytest.approx(1 + 11 * 0.4 / 12, abs=1e-4)
    assert found["offload"].activation_bytes_per_token == 95  # no more for more layers; and the head
    assert found["offload"].compute_factor == pytest.approx(1 + 11 * 0.2 / 12, abs=1e-4)


def test_a_policy_that_seems_to_save_time_costs_none():
    assert policy(10.2, [0.97, 0.99, 1.04]) == Policy(activation_bytes_per_token=11, compute_factor=1.0)


def test_live_tensors_are_counted_for_as_long_as_they_live():
    def run() -> None:
        for _ in range(3):
            a = torch.zeros(1000, dtype=torch.float32)
            b = a.view(10, 100) + 1.0  # a view is no new storage
            del a
        del b

    assert most_live_bytes(run) == 2 * 4000 + 4000  # b of the round before


def test_measuring_needs_less_where_weights_are_of_half_precision():
    from flexsp.estimate import model_shape

    shape = model_shape(small_config(num_hidden_layers=12, vocab_size=4096).to_dict())
    assert needed_bytes(shape, 1, weight_bytes=2) < 0.8 * needed_bytes(shape, 1)  # what is gathered stays


def runs_those_it_knows() -> list[str]:
    base = profile(2, capacity=100)
    policies = {name: Policy(activation_bytes_per_token=1.0) for name in ("recompute", "full")}
    given = replace(base, memory=replace(base.memory, policies=policies))
    return list(_with_policies(given, prepare_model(build(small_config(), torch.float32))).memory.policies)


def test_policies_of_a_given_profile_are_used_where_the_model_runs_them(ranks):
    assert ranks(2).run(runs_those_it_knows) == [["full"], ["full"]]


MODEL = {"config": {"model_type": "llama"}}


def test_policies_and_types_are_read_from_the_configuration():
    config = parse_config({"model": {**MODEL, "weights": "bfloat16"}, "planner": {"policies": ["full", "selective"]}})
    assert config.planner.policies == ["full", "selective"]
    assert config.model.weights == "bfloat16"
    assert parse_config({"model": MODEL}).planner.policies == []


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({"planner": {"policies": ["half"]}}, "planner.policies='half' must be one of selective, full, offload"),
        ({"planner": {"policies": [1]}}, r"planner.policies=\[1\] must be a list of names"),
        ({"model": {"reduce_dtype": "float16"}}, "model.reduce_dtype='float16' must be one of float32, bfloat16"),
        ({"model": {"replicate": 0}}, "model.replicate=0 must be at least 1"),
        ({"model": {"loss_chunk_tokens": -1}}, "model.loss_chunk_tokens"),
    ],
)
def test_wrong_values_are_named(document, said):
    with pytest.raises(ValueError, match=said):
        parse_config({**document, "model": {**MODEL, **document.get("model", {})}})
