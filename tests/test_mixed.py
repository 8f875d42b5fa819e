"""A profile of few devices, taken for a cluster: what was measured stays, the rest is estimated and says so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from flexsp.estimate import estimate_profile, load_cluster, load_model_shape
from flexsp.profile import Layout, Profile
from flexsp.profiler.mixed import fill_from_estimate
from profiles import profile

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
