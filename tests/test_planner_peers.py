"""Peers as planners: always legal, and each does what its description says.

A failure of the first tests names a profile and lengths to plan by hand; of the others, the rule that does not hold.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flexsp
from flexsp import Status, violations
from flexsp.planner import COMPARED, PLANNERS
from flexsp.planner.degrees import usable_degrees
from flexsp.planner.flexible_cp import choose_degrees, pack
from flexsp.planner.placement import place
from flexsp.plans import Plan
from flexsp.profile import MOST_TOKENS, Profile
from planner_cases import lengths, profile_of, profiles

PEERS = ["megatron-dcp", "flexible-cp"]
ROUNDING = 1e-9

few = settings(max_examples=150, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
fewer = settings(few, max_examples=60)
powers_of_two = st.builds(
    lambda nodes, per_node, room: profile_of(
        nodes * per_node, per_node, tuple(2**k for k in range((nodes * per_node).bit_length())), room_tokens=room
    ),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 4, 8]),
    st.sampled_from([30, 100, 333.3]),
)


def shapes(plan: Plan) -> list[list[int]]:
    """Degrees of each micro-batch, descending."""
    return [micro_batch.sp_degrees for micro_batch in plan.micro_batches]


# ---- what both promise


def _legal_where_everything_fits(planner: str, batch: list[int], profile: Profile) -> None:
    plan = flexsp.plan(batch, profile, planner)
    holds = max((profile.capacity_tokens(d) for d in usable_degrees(profile)), default=-1)
    assert plan.has_plan == (max(batch) <= holds)
    assert plan.planner == planner
    if not plan.has_plan:
        assert plan.status is Status.INFEASIBLE and plan.reason
        return
    assert violations(plan, batch, profile) == []
    assert plan.predicted_s is not None and plan.lower_bound_s is not None
    assert flexsp.plan(batch, profile).lower_bound_s <= plan.predicted_s * (1 + ROUNDING)
    assert plan.micro_batches == flexsp.plan(batch, profile, planner).micro_batches


@pytest.mark.parametrize("planner", PEERS)
@few
@given(profile=profiles(most_devices=24), batch=lengths(60))
def test_plans_are_legal_on_any_cluster_and_made_wherever_the_longest_fits(planner, profile, batch):
    _legal_where_everything_fits(planner, batch, profile)


@pytest.mark.parametrize("planner", PEERS)
@fewer
@given(profile=powers_of_two, batch=lengths(200))
def test_plans_of_larger_batches_on_powers_of_two_are_legal(planner, profile, batch):
    _legal_where_everything_fits(planner, batch, profile)


@pytest.mark.parametrize("planner", PEERS)
@fewer
@given(profile=profiles(policies=False), batch=lengths())
def test_no_peer_beats_the_optimum(planner, profile, batch):
    exact, peer = flexsp.plan(batch, profile, "exact"), flexsp.plan(batch, profile, planner)
    assert exact.has_plan == peer.has_plan
    if exact.predicted_s is not None and peer.predicted_s is not None:
        assert exact.predicted_s <= peer.predicted_s * (1 + ROUNDING)


def test_peers_are_compared_with_all_planners_but_exact():
    assert set(COMPARED) == set(PLANNERS) - {"exact"}
    assert len(set(COMPARED)) == len(COMPARED)


@pytest.mark.parametrize("planner", [*PEERS, "milp", "batch-adaptive"])
@pytest.mark.parametrize("bytes_per_token", [1e-15, 1e-300])
def test_activations_that_cost_next_to_nothing_leave_room_for_all(planner, bytes_per_token):
    profile = profile_of(4, 4, (1, 2, 4))
    profile = replace(profile, memory=replace(profile.memory, activation_bytes_per_token=bytes_per_token))
    assert profile.capacity_tokens(1) == MOST_TOKENS
    options = {"time_limit_s": 2.0} if planner == "milp" else {}
    plan = flexsp.plan([60, 30, 900, 5], profile, planner, **options)
    assert violations(plan, [60, 30, 900, 5], profile) == []


@pytest.mark.parametrize("planner", PEERS)
def test_a_sequence_that_nothing_holds_is_named(planner):
    plan = flexsp.plan([5, 801, 7], profile_of(room_tokens=100), planner)
    assert plan.status is Status.INFEASIBLE
    assert "lengths[1]=801 tokens fit into no group: sp_degree=8 holds at most 800 tokens" in plan.reason


# ---- megatron-dcp


def test_the_least_degree_is_the_power_of_two_whose_ranks_the_cap_fills():
    p = profile_of(room_tokens=100)
    batch = [250, 60, 60, 60, 60]
    assert shapes(flexsp.plan(batch, p, "megatron-dcp")) == [[4, 1, 1, 1, 1]]
    capped = flexsp.plan(batch, p, "megatron-dcp", max_tokens_per_rank=50)
    assert shapes(capped)[0][0] == 8  # 250 on ranks of 50 need five, so eight
    assert violations(capped, batch, p) == []


def test_a_cap_above_what_memory_holds_is_memory():
    p = profile_of(room_tokens=100)
    batch = [250, 100, 90, 80, 5]
    plans = [flexsp.plan(batch, p, "megatron-dcp", max_tokens_per_rank=most) for most in (None, 10**6)]
    assert plans[0].micro_batches == plans[1].micro_batches


def test_where_its_next_degree_is_missing_the_least_degree_is_the_next_that_is_there():
    p = profile_of(sp_degrees=(1, 4, 8), room_tokens=100)
    assert shapes(flexsp.plan([150, 30, 30, 30, 30], p, "megatron-dcp")) == [[4, 1, 1, 1, 1]]


def test_equal_short_sequences_go_to_a_rank_each():
    plan = flexsp.plan([60] * 8, profile_of(room_tokens=100), "megatron-dcp")
    assert shapes(plan) == [[1] * 8]


def test_no_rank_is_left_empty_the_first_smallest_group_grows():
    assert shapes(flexsp.plan([60] * 3, profile_of(room_tokens=100), "megatron-dcp")) == [[4, 2, 2]]
    assert shapes(flexsp.plan([60], profile_of(room_tokens=100), "megatron-dcp")) == [[8]]


def test_where_no_group_can_grow_all_ranks_take_one_group_or_some_stay_idle():
    batch = [60] * 6
    one = flexsp.plan(batch, profile_of(sp_degrees=(1, 4, 8), room_tokens=100), "megatron-dcp")
    assert shapes(one) == [[8]]
    without = flexsp.plan(batch, profile_of(sp_degrees=(1, 4), room_tokens=100), "megatron-dcp")
    assert shapes(without) == [[1] * 6]


@fewer
@given(profile=powers_of_two, batch=lengths(80), estimate=st.sampled_from(["compute", "attention"]))
def test_on_powers_of_two_all_ranks_have_work_and_none_more_than_the_tallest_allows(profile, batch, estimate):
    plan = flexsp.plan(batch, profile, "megatron-dcp", estimate=estimate)
    works = [s * s if estimate == "attention" else profile.sequence_work_s(s) for s in batch]
    waiting = set(range(len(batch)))
    for micro_batch in plan.micro_batches:
        assert sum(micro_batch.sp_degrees) == profile.num_devices
        tallest = max(waiting, key=lambda i: batch[i])
        placed = {i for group in micro_batch.groups for i in group.sequences}
        assert batch[tallest] == max(batch[i] for i in placed)
        room_tokens = max(profile.capacity_tokens(d) / d for d in profile.sp_degrees)
        most_work = 1.05 * works[tallest] / batch[tallest] * room_tokens
        for group in micro_batch.groups:
            assert sum(works[i] for i in group.sequences) / group.sp_degree <= most_work
        waiting -= placed


def test_a_short_sequence_joins_a_larger_group_where_that_keeps_the_highest_load_lower():
    """600 takes both ranks; 200 needs one, has none, and shares the two."""
    p = profile_of(2, 2, (1, 2), room_tokens=400)
    plan = flexsp.plan([600, 200], p, "megatron-dcp")
    assert [group.sequences for mb in plan.micro_batches for group in mb.groups] == [(0, 1)]


def test_of_equal_places_the_earliest_group_is_filled_first():
    """Beside 400 on four ranks, tens change nothing: each rank is filled with ten before the next, and then grows."""
    plan = flexsp.plan([400] + [10] * 20, profile_of(room_tokens=100), "megatron-dcp", estimate="attention")
    assert shapes(plan) == [[4, 2, 2]]
    assert [len(group.sequences) for group in plan.micro_batches[0].groups] == [1, 10, 10]


def test_a_sequence_waits_where_nothing_has_room():
    plan = flexsp.plan([100] * 9, profile_of(room_tokens=100), "megatron-dcp")
    assert shapes(plan) == [[1] * 8, [8]]


@pytest.mark.parametrize(("batch", "shape"), [([100] * 12, [[1] * 12]), ([100] * 2, [[12]]), ([500], [[12]])])
def test_other_worlds_use_powers_of_two_or_all_ranks(batch, shape):
    p = profile_of(12, 12, tuple(range(1, 13)), room_tokens=100)
    assert shapes(flexsp.plan(batch, p, "megatron-dcp")) == shape


def test_degrees_that_it_would_not_use_serve_what_its_own_do_not_hold():
    p = profile_of(8, 8, (1, 3), room_tokens=100)
    assert shapes(flexsp.plan([250, 100], p, "megatron-dcp")) == [[3, 3]]
    assert shapes(flexsp.plan([90, 100], p, "megatron-dcp")) == [[1, 1]]


def test_what_the_cap_refuses_and_wrong_options_are_named():
    p = profile_of(room_tokens=100)
    plan = flexsp.plan([5, 500], p, "megatron-dcp", max_tokens_per_rank=50)
    assert plan.status is Status.INFEASIBLE
    assert plan.reason == (
        "lengths[1]=500 tokens fit into no group of at most max_tokens_per_rank=50: sp_degree=8 holds 400; "
        "raise the cap"
    )
    with pytest.raises(ValueError, match=r"max_tokens_per_rank=0 must be at least 1"):
        flexsp.plan([5], p, "megatron-dcp", max_tokens_per_rank=0)
    with pytest.raises(ValueError, match=r"estimate='time' is unknown; choose one of compute, attention"):
        flexsp.plan([5], p, "megatron-dcp", estimate="time")


# ---- flexible-cp


def test_short_sequences_fill_the_memory_that_long_ones_leave_the_least_room_first():
    """150 needs two ranks and leaves 50, 60 leaves 40 of one: so 40 goes there, and 45 to the first."""
    p = profile_of(room_tokens=100)
    assert pack(np.array([6, 60, 40, 150]), p, [1, 2, 4, 8]) == [(2, [3, 0]), (1, [1, 2])]
    assert pack(np.array([60, 60, 150, 45]), p, [1, 2, 4, 8]) == [(2, [2, 3]), (1, [0]), (1, [1])]


@few
@given(data=st.data(), per_node=st.sampled_from([2, 4, 8]), least=st.lists(st.integers(0, 2), min_size=1, max_size=4))
def test_the_chosen_degrees_make_the_slowest_group_least(data, per_node, least):
    """Against all combinations, for times that need not fall with the degree."""
    degrees = [1, 2, 4, 8]
    p = profile_of(8, per_node, (1, 2, 4, 8))
    least = _until_full(least, degrees, 8)
    some_s = st.lists(st.integers(1, 20), min_size=4, max_size=4)
    seconds = np.array([data.draw(some_s) for _ in least], dtype=np.float64)
    slowest_s, chosen = choose_degrees(seconds, least, p, degrees)
    every = itertools.product(*[range(lowest, 4) for lowest in least])
    best_s = min(
        max(seconds[g, k] for g, k in enumerate(ks)) for ks in every if sum(degrees[k] for k in ks) <= p.num_devices
    )
    assert slowest_s == best_s
    assert max(seconds[g, degrees.index(d)] for g, d in enumerate(chosen)) == best_s


@fewer
@given(
    data=st.data(), per_node=st.sampled_from([3, 5, 6, 10]), least=st.lists(st.integers(0, 4), min_size=1, max_size=4)
)
def test_degrees_that_find_no_place_are_not_chosen(data, per_node, least):
    degrees = [1, 2, 3, 4, 5]
    p = profile_of(10, per_node, (1, 2, 3, 4, 5))
    degrees = usable_degrees(p)
    least = [min(k, len(degrees) - 1) for k in least]
    while place([degrees[k] for k in least], 10, per_node) is None:
        least.pop()
    some_s = st.lists(st.integers(1, 20), min_size=len(degrees), max_size=len(degrees))
    seconds = np.array([data.draw(some_s) for _ in least], dtype=np.float64)
    slowest_s, chosen = choose_degrees(seconds, least, p, degrees)
    assert place(chosen, 10, per_node) is not None
    assert slowest_s == max(seconds[g, degrees.index(d)] for g, d in enumerate(chosen))


def _until_full(least: list[int], degrees: list[int], ranks: int) -> list[int]:
    """As many of the groups as have a place at their least degrees."""
    taken = itertools.accumulate(degrees[k] for k in least)
    return [k for k, total in zip(least, taken, strict=True) if total <= ranks]


def test_degrees_need_be_no_powers_of_two():
    """Six ranks for two groups of which one has twice the work: four and two; of three alike: two each."""
    p = profile_of(6, 6, (1, 2, 3, 4, 5, 6), room_tokens=100, quadratic_s=0.0, linear_s=1e-3, exchange_s=0.0)
    assert shapes(flexsp.plan([100], p, "flexible-cp")) == [[6]]
    assert shapes(flexsp.plan([100, 100], p, "flexible-cp")) == [[3, 3]]
    assert shapes(flexsp.plan([100, 50, 100], p, "flexible-cp")) == [[2, 2, 1]]  # a sixth rank would speed up nothing


def test_micro_batches_are_filled_or_divided_evenly_whichever_is_faster():
    """Six groups on four ranks. Alike, four and two are best; with one that takes long, room to grow beside it is."""
    p = profile_of(4, 4, (1, 2, 4), room_tokens=100, quadratic_s=1e-5, linear_s=1e-3, exchange_s=0.0)
    assert shapes(flexsp.plan([100] * 6, p, "flexible-cp")) == [[1, 1, 1, 1], [2, 2]]
    assert shapes(flexsp.plan([100] + [10] * 50, p, "flexible-cp")) == [[2, 1, 1], [1, 1, 1]]


def test_its_plan_is_the_best_of_all_degrees_for_its_groups():
    """One micro-batch of three groups: no other degrees, all combinations tried, make it faster."""
    p = profile_of(8, 4, (1, 2, 4, 8), room_tokens=100, quadratic_s=1e-4, exchange_s=1e-4)
    batch = [180, 100, 90]
    plan = flexsp.plan(batch, p, "flexible-cp")
    held = pack(np.array(batch), p, [1, 2, 4, 8])
    best_s = math.inf
    for degrees in itertools.product((1, 2, 4, 8), repeat=len(held)):
        if sum(degrees) <= 8 and all(d >= least for d, (least, _) in zip(degrees, held, strict=True)):
            slowest_s = max(
                p.group_s(d, [batch[i] for i in group]) for d, (_, group) in zip(degrees, held, strict=True)
            )
            best_s = min(best_s, slowest_s)
    assert len(plan.micro_batches) == 1
    assert plan.predicted_s == pytest.approx(p.compute.fixed_s + best_s)
