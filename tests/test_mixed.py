"""A profile of few devices, taken for a cluster: what was measured stays, the rest is estimated and says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flexsp.estimate import estimate_profile, load_cluster, load_model_shape
from flexsp.profile import Layout, Profile, Table
from flexsp.profiler.mixed import fill_from_estimate, other_device
from profiles import profile, profile_json

LLAMA = Path(__file__).parent.parent / "examples" / "models" / "llama-3-8b.json"


def split(ulysses, ring):
    return Layout(ulysses=ulysses, ring=ring)


def test_what_was_measured_stays_and_the_rest_comes_from_the_estimate():
    measured = replace(
        profile(2, capacity=100), provenance={"source": "measured", "device": "card", "assumptions": ["a"]}
    )
    estimate = profile(16, capacity=7)
    estimate = replace(
        estimate,
        compute=replace(estimate.compute, fixed_s=0.5, linear_s=9.0),
        provenance={"source": "estimated", "device": "sixteen cards", "fields": {"compute.fixed_s": "gathers"}},
    )
    mixed = fill_from_estimate(measured, estimate)
    assert (mixed.num_devices, mixed.devices_per_node, mixed.sp_degrees) == (16, 8, (1, 2, 4, 8, 16))
    assert mixed.compute.linear_s == measured.compute.linear_s
    assert mixed.compute.fixed_s == 0.5  # more devices, more to gather
    bandwidth = mixed.all_to_all.bandwidth_bytes_per_s
    assert bandwidth[2] == measured.all_to_all.bandwidth_bytes_per_s[2]
    assert bandwidth[4] == estimate.all_to_all.bandwidth_bytes_per_s[4]
    assert mixed.memory == measured.memory
    fields = mixed.provenance["fields"]
    assert mixed.provenance["source"] == "mixed"
    assert fields["all_to_all.bandwidth_bytes_per_s.2"] == "measured"
    assert fields["all_to_all.bandwidth_bytes_per_s.4"].startswith("estimated")
    assert fields["compute.fixed_s"].startswith("estimated: gathers; measured on 2 devices: 0.02 s")
    assert mixed.provenance["assumptions"][:2] == ["a", "measured on 2 x card; taken for 16 devices: sixteen cards"]


@pytest.mark.parametrize(
    ("estimated_s", "taken_s", "said"),
    [
        (0.5, 0.5, "estimated: gathers; measured on 1 device: 0.02 s"),
        (0.01, 0.02, "measured on 1 device: 0.02 s, not below the 0.01 s estimated for 16 devices: gathers"),
        (0.02, 0.02, "measured on 1 device: 0.02 s, not below the 0.02 s estimated for 16 devices: gathers"),
    ],
)
def test_the_fixed_cost_is_the_larger_one_and_says_that_no_gather_over_so_many_was_run(estimated_s, taken_s, said):
    estimate = profile(16, compute={"quadratic_s": 0, "linear_s": 0, "fixed_s": estimated_s})
    estimate = replace(estimate, provenance={"fields": {"compute.fixed_s": "gathers"}})
    mixed = fill_from_estimate(profile(1), estimate)
    assert mixed.compute.fixed_s == taken_s
    assert mixed.provenance["fields"]["compute.fixed_s"] == said


def test_the_fixed_cost_is_measured_where_as_many_devices_in_such_nodes_were():
    estimate = profile(4, compute={"quadratic_s": 0, "linear_s": 0, "fixed_s": 0.5})
    mixed = fill_from_estimate(profile(4), estimate)
    assert (mixed.compute.fixed_s, mixed.provenance["fields"]["compute.fixed_s"]) == (0.02, "measured")
    other = fill_from_estimate(profile(4), replace(estimate, devices_per_node=2))
    assert other.compute.fixed_s == 0.5
    assert other.provenance["fields"]["compute.fixed_s"].startswith("estimated")


def leaves(document, path=""):
    """The paths of all numbers of a document."""
    if not isinstance(document, dict):
        return {path}
    return {leaf for key, value in document.items() for leaf in leaves(value, f"{path}.{key}" if path else key)}


def test_every_number_of_the_file_has_a_field_that_says_where_it_is_from():
    document = profile_json(
        2, tables={d: {"lengths": [1], "seconds_per_token": [1]} for d in "12"}, optimizer_s=1, layouts={}
    )
    document["memory"] |= {"unsharded_bytes": 7, "policies": {"full": {"activation_bytes_per_token": 2}}}
    estimate = profile(16, layouts={"16": {"ulysses": 8, "ring": 2}})
    mixed = fill_from_estimate(Profile.from_json(document), estimate)
    assert (mixed.memory.unsharded_bytes, list(mixed.tables)) == (7, [1, 2, 4, 8, 16])
    fields = mixed.provenance["fields"]
    told = {key: value for key, value in mixed.to_json().items() if key not in ("format", "name", "provenance")}
    for leaf in leaves(told):
        assert any(leaf == field or leaf.startswith(f"{field}.") for field in fields), leaf
    for field in fields:
        assert any(leaf == field or leaf.startswith(f"{field}.") for leaf in leaves(told)), field


def test_a_table_of_degree_1_alone_makes_no_other_degree_look_cheap():
    of_card = Table(lengths=(128, 2048, 32768), seconds_per_token=(3e-3, 2e-3, 0.4))
    measured = replace(profile(1), tables={1: of_card})  # the formula says 2.3e-3 at 128 tokens
    mixed = fill_from_estimate(measured, profile(8))
    assert mixed.tables[1] == of_card
    assert "measured" == mixed.provenance["fields"]["tables.1"]
    assert mixed.provenance["fields"]["tables.8"].startswith("estimated: the table of degree 1 shared by")
    for degree in (2, 4, 8):
        for length in (128, 500, 2048, 9000, 32768, 100_000):
            alone_s, shared_s = mixed.group_table_s(1, [length]), mixed.group_table_s(degree, [length])
            exchange_s = shared_s - alone_s / degree
            said_s = length * mixed.exchange_s_per_token(degree)
            row_s = mixed.latency_s(degree) * length / (degree * 32768)  # of a full row, what this length fills
            assert exchange_s == pytest.approx(said_s + row_s, rel=1e-6)
    assert fill_from_estimate(profile(1), profile(8)).tables == {}


def test_what_a_token_holds_is_said_of_the_degrees_that_were_run():
    def said(measured, estimate):
        return fill_from_estimate(measured, estimate).provenance["fields"]["memory.activation_bytes_per_token"]

    assert said(profile(2), profile(2)) == "measured at degrees 1, 2"
    assert said(profile(1), profile(8)) == (
        "measured at degree 1, the most; not run at degrees 2, 4, 8, taken to hold no more a token"
    )
    artificial = profile(
        2, provenance={"max_tokens_per_rank": 64, "memory_limit": "artificial: max_tokens_per_rank=64"}
    )
    assert said(artificial, profile(2)).startswith("measured at degree 1, the most; not run at degree 2")
    fields = fill_from_estimate(artificial, profile(2)).provenance["fields"]
    assert fields["memory.memory_bytes"] == "artificial: max_tokens_per_rank=64"


def test_a_device_that_is_not_the_clusters_is_told():
    h100 = load_cluster("h100")
    assert other_device("NVIDIA H100 80GB HBM3", h100) is None
    doubt = other_device("x86_64 CPU rank, 2 cores a machine", h100)
    assert doubt.startswith("measured on x86_64 CPU rank, 2 cores a machine, which is not the NVIDIA H100-SXM5-80GB of")
    assert doubt in fill_from_estimate(profile(2), profile(16), doubt).provenance["assumptions"]
    unnamed = other_device("NVIDIA H100 80GB HBM3", replace(h100, device_names=()))
    assert "has no device_names: whether that is its NVIDIA H100-SXM5-80GB is not known" in unnamed


def test_a_group_that_crosses_nodes_there_is_not_as_it_was_measured_inside_one():
    measured = profile(4)
    estimate = profile(8, devices_per_node=2)
    mixed = fill_from_estimate(measured, estimate)
    assert mixed.all_to_all.bandwidth_bytes_per_s[4] == estimate.all_to_all.bandwidth_bytes_per_s[4]
    assert mixed.provenance["fields"]["all_to_all.bandwidth_bytes_per_s.4"].startswith("estimated")


def test_measured_degrees_keep_how_they_split_and_the_others_split_as_estimated():
    estimated = estimate_profile(
        load_model_shape(LLAMA), load_cluster("h100"), num_devices=64, sp_degrees=[1, 2, 3, 4, 12, 64]
    )
    measured = replace(
        estimated,
        num_devices=4,
        devices_per_node=4,
        sp_degrees=(1, 2, 3, 4),
        layouts={3: split(1, 3), 4: split(2, 2)},
        provenance={"source": "measured", "device": "card", "splits_s": {"4": {"4x1": 2.0, "2x2": 1.0}}},
    )
    mixed = fill_from_estimate(measured, replace(estimated, layouts={**estimated.layouts, 2: split(1, 2)}))
    assert mixed.layouts == {3: split(1, 3), 4: split(2, 2), 12: split(4, 3), 64: split(8, 8)}
    assert 2 not in mixed.layouts  # measured as Ulysses
    told = mixed.provenance
    assert told["fields"]["layouts.4"] == "measured"
    assert told["fields"]["layouts.64"].startswith("estimated: of every split")
    assert "layouts.2" not in told["fields"]
    assert told["splits_s"] == {"4": {"4x1": 2.0, "2x2": 1.0}}
    assert list(told["splits_s_per_token"]) == list(told["ring_hidden"]) == ["12", "64"]
    assert Profile.from_json(mixed.to_json()) == mixed
