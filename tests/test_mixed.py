"""A profile of few devices, taken for a cluster: what was measured stays, the rest is estimated and says so."""

from __future__ import annotations

from dataclasses import replace

from flexsp.profiler.mixed import fill_from_estimate
from profiles import profile


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
