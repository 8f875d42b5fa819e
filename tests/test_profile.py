from __future__ import annotations

import json
from dataclasses import replace

import pytest

import flexsp
from flexsp import Plan, Profile
from profiles import profile, profile_json


def test_costs_are_those_of_the_formulas_by_hand():
    p = profile()
    # degree 2, lengths 30 and 10: (1e-5 * (900 + 100) + 1e-3 * 40) / 2 + 1000 * 40 / (2 * 2e6) + 0.004
    assert p.group_s(2, [30, 10]) == pytest.approx(0.025 + 0.01 + 0.004)
    # degree 1 exchanges nothing
    assert p.group_s(1, [30, 10]) == pytest.approx(0.05)
    assert p.group_bytes(2, 40) == 1000 + 10 * 40 / 2
    assert [p.capacity_tokens(d) for d in p.sp_degrees] == [100, 200, 400]
    assert p.fits(2, 200)
    assert not p.fits(2, 201)


def test_a_policy_changes_bytes_and_compute():
    document = profile_json()
    document["memory"]["policies"] = {"recompute": {"activation_bytes_per_token": 2, "compute_factor": 1.5}}
    p = Profile.from_json(document)
    assert p.capacity_tokens(1, "recompute") == 500
    assert p.group_s(1, [30, 10], "recompute") == pytest.approx(1.5 * 0.05)


def test_a_file_is_kept_as_it_was_with_fields_of_later_versions(tmp_path):
    document = profile_json(layouts={"4": {"ulysses": 2, "ring": 2}}, optimizer_s=0.05, later={"x": [1]})
    document["memory"]["policies"] = {"r": {"activation_bytes_per_token": 2, "compute_factor": 1.5}}
    document["compute"]["later_s"] = 3
    (tmp_path / "p.json").write_text(json.dumps(document))
    loaded = Profile.load(tmp_path / "p.json")
    loaded.save(tmp_path / "q.json")
    assert json.loads((tmp_path / "q.json").read_text()) == document
    assert Profile.load(tmp_path / "q.json") == loaded


def with_unsharded(unsharded_bytes, num_devices=4, capacity=100):
    document = profile_json(num_devices, capacity)
    document["memory"]["unsharded_bytes"] = unsharded_bytes
    return document


def without(document, *path):
    inner = document
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    return document


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({**profile_json(), "format": "x"}, r"p.json: format='x' must be 'flexsp-profile/1'"),
        (without(profile_json(), "num_devices"), r"p.json: the field 'num_devices' is missing"),
        (without(profile_json(), "compute", "linear_s"), r"p.json: compute: the field 'linear_s' is missing"),
        (profile_json(num_devices=4, compute=[]), r"compute=\[\] must be a JSON object"),
        ({**profile_json(), "num_devices": "4"}, r"num_devices='4' must be an integer"),
        ({**profile_json(), "num_devices": 0}, r"num_devices=0 must be at least 1"),
        ({**profile_json(), "sp_degrees": [2, 1]}, r"sp_degrees=\[2, 1\] must be ascending"),
        ({**profile_json(), "sp_degrees": []}, r"sp_degrees=\[\] must be ascending"),
        ({**profile_json(), "sp_degrees": [1, 8]}, r"degree above num_devices=4; remove 8"),
        ({**profile_json(), "sp_degrees": [1, 3]}, r"degree 3 has no entry in all_to_all.bandwidth_bytes_per_s"),
        (with_unsharded("1"), r"p.json: memory.unsharded_bytes='1' must be an integer"),
        (with_unsharded(1.0), r"p.json: memory.unsharded_bytes=1.0 must be an integer"),
        (with_unsharded(-1), r"p.json: memory.unsharded_bytes=-1 must be at least 0"),
        (with_unsharded(1001), r"p.json: unsharded_bytes=1001 must be from 0 to model_state_bytes=1000, whose part"),
        (profile_json(capacity=0), r"memory_bytes=1000 must be above model_state_bytes=1000"),
        ({**profile_json(), "layouts": {"4": {"ulysses": 3, "ring": 2}}}, r"ulysses=3 x ring=2 must be 4"),
    ],
)
def test_a_malformed_file_is_named_with_its_field(tmp_path, document, message):
    (tmp_path / "p.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message) as raised:
        Profile.load(tmp_path / "p.json")
    assert "p.json" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_what_is_no_json_is_named(tmp_path):
    (tmp_path / "p.json").write_text("{")
    with pytest.raises(ValueError, match=r"p.json: is not JSON"):
        Profile.load(tmp_path / "p.json")


def test_other_numbers_of_devices_share_the_model_states_and_say_so():
    p = profile(8, capacity=500)
    half = p.for_devices(4)
    assert (half.num_devices, half.devices_per_node, half.sp_degrees) == (4, 4, (1, 2, 4))
    assert half.memory.model_state_bytes == 2 * p.memory.model_state_bytes
    assert "model_state_bytes sharded evenly" in half.provenance["assumptions"][0]
    assert p.for_devices(8) is p
    timed = replace(p, optimizer_s=0.3).for_devices(4)
    assert timed.optimizer_s == 0.6  # it steps twice as many
    assert "optimizer_s in proportion" in timed.provenance["assumptions"][0]


def test_too_few_devices_are_told_how_many_it_takes():
    p = replace(profile(16, capacity=10), memory=replace(profile(16, capacity=10).memory, unsharded_bytes=600))
    with pytest.raises(
        ValueError, match=r"^num_devices=1: model_state_bytes=7000 .*; use at least (\d+) dev"
    ) as raised:
        p.for_devices(1)
    least = int(str(raised.value).split("at least ")[1].split()[0])
    assert p.for_devices(least).num_devices == least
    with pytest.raises(ValueError, match=f"use at least {least} devices"):
        p.for_devices(least - 1)


def test_what_is_not_sharded_is_the_same_on_any_number_of_devices(tmp_path):
    p = Profile.from_json(with_unsharded(600, 8, 500))
    p.save(tmp_path / "p.json")
    assert json.loads((tmp_path / "p.json").read_text()) == with_unsharded(600, 8, 500)
    assert Profile.load(tmp_path / "p.json") == p
    for num_devices, state_bytes in ((1, 600 + 8 * 400), (4, 600 + 2 * 400), (64, 600 + 400 / 8)):
        other = p.for_devices(num_devices)
        assert (other.memory.model_state_bytes, other.memory.unsharded_bytes) == (state_bytes, 600)
        said = other.provenance["assumptions"][0]
        assert "model_state_bytes sharded evenly over all devices but for unsharded_bytes=600, which each holds" in said
    assert p.for_devices(64).for_devices(8).memory == p.memory
    assert p.group_bytes(1, 10) == 1000 + 100  # it is a part, not more


def test_tables_give_measured_seconds_between_lengths_and_grow_beyond_them(tmp_path):
    tables = {"1": {"lengths": [10, 40], "seconds_per_token": [0.002, 0.004]}}
    p = Profile.from_json(profile_json(tables=tables))
    assert p.group_table_s(1, [10, 40]) == pytest.approx(0.002 * 10 + 0.004 * 40)
    assert p.group_table_s(1, [20]) == pytest.approx(0.003 * 20)  # half way on a logarithmic axis
    assert p.group_table_s(1, [5]) == pytest.approx(0.002 * 5)
    assert p.group_table_s(1, [100]) == pytest.approx((0.004 + 60 * 1e-5) * 100)
    assert p.group_table_s(2, [20]) == p.group_s(2, [20])  # no table at that degree
    p.save(tmp_path / "p.json")
    assert Profile.load(tmp_path / "p.json") == p
    plan = flexsp.plan([10, 40], p, "static", sp_degree=1)
    assert plan.predicted_table_s == pytest.approx(0.02 + 0.004 * 40)
    assert plan.predicted_s == pytest.approx(0.02 + 40 * (1e-3 + 40 * 1e-5))  # stays the formula's
    plan.save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    "table", [{"lengths": [2, 1], "seconds_per_token": [1, 1]}, {"lengths": [1], "seconds_per_token": []}]
)
def test_a_malformed_table_is_named(table):
    with pytest.raises(ValueError, match=r"profile: tables\[1\]: lengths=.* must ascend"):
        Profile.from_json(profile_json(tables={"1": table}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices_per_node": 2**40}, r"devices_per_node=1099511627776 must be at most 131,072"),
        ({"num_devices": 10**18}, r"num_devices=1000000000000000000 must be at most 131,072"),
        ({"latency_s": {"2": 1, "02": 2}}, r"latency_s: key '02' must be a degree"),
        ({"layouts": {"9" * 5000: {}}}, r"layouts: key '9{40}' must be a degree"),
        ({"format": "x" * 5000}, r"format='x{1,60}\.\.\. must be"),
    ],
)
def test_what_no_profile_says_is_refused_at_once(changes, message):
    """Found by tests/fuzzing: each hung, or was taken."""
    document = profile_json()
    if latency_s := changes.pop("latency_s", None):
        document["all_to_all"]["latency_s"] = latency_s
    with pytest.raises(ValueError, match=message):
        Profile.from_json({**document, **changes})


def test_an_integer_of_seconds_does_not_wrap_around_in_64_bits():
    """Found by tests/fuzzing: 10^18 s a token squared, as an integer, left flex without a micro-batch."""
    document = profile_json(4)
    document["compute"]["quadratic_s"] = 10**18
    document["tables"] = {"1": {"lengths": [8, 64], "seconds_per_token": [1, 10**25]}}
    found = flexsp.plan([390, 90, 60], Profile.from_json(document))
    assert flexsp.violations(found, [390, 90, 60], Profile.from_json(document)) == []
