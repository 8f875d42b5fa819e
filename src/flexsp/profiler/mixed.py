"""What cannot be measured where a profile is made: taken from an estimate for a named cluster, field by field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from flexsp.profile import Profile


def fill_from_estimate(measured: Profile, estimate: Profile) -> Profile:
    """The measured profile for the estimate's cluster: its degrees, nodes and number of devices.

    A device's own seconds and bytes stay measured. Degrees that were measured keep their exchange and how they split
    into heads x context, where their group lies in one node there too; other degrees, and the gathers of more devices,
    are the estimate's.

    Args:
        measured: of few devices, but with the model states and the optimizer's step of the cluster's number of them.
        estimate: of the cluster, same model and type.
    """
    own = {
        d
        for d in measured.sp_degrees
        if d > 1 and d in estimate.sp_degrees and d <= min(measured.devices_per_node, estimate.devices_per_node)
    }
    bandwidth, latency = estimate.all_to_all.bandwidth_bytes_per_s, estimate.all_to_all.latency_s
    same_size = measured.num_devices == estimate.num_devices
    fixed_s = measured.compute.fixed_s if same_size else max(measured.compute.fixed_s, estimate.compute.fixed_s)
    fields: dict[str, str] = {name: "measured" for name in (
        "compute.quadratic_s", "compute.linear_s", "memory.memory_bytes", "memory.activation_bytes_per_token",
    )}  # fmt: skip
    fields["compute.fixed_s"] = (
        "measured"
        if fixed_s == measured.compute.fixed_s
        else f"estimated: {_why(estimate, 'compute.fixed_s')}; measured on {measured.num_devices} devices: "
        f"{measured.compute.fixed_s:.4g} s"
    )
    for d in estimate.sp_degrees:
        if d > 1:
            field = "all_to_all.bandwidth_bytes_per_s"
            fields[f"{field}.{d}"] = "measured" if d in own else f"estimated: {_why(estimate, field)}"
    layouts = {d: layout for d, layout in estimate.layouts.items() if d not in own}
    layouts |= {d: layout for d, layout in measured.layouts.items() if d in own}
    for d in sorted(layouts):
        fields[f"layouts.{d}"] = "measured" if d in own else f"estimated: {_why(estimate, 'layouts')}"
    fields["all_to_all.latency_s"] = "as the bandwidth of the same degree"
    share = f"measured on {measured.num_devices} devices, for a share of 1/{estimate.num_devices} of the parameters"
    fields["memory.model_state_bytes"] = fields["optimizer_s"] = share
    if measured.memory.policies:
        fields["memory.policies"] = "measured"
    return replace(
        estimate,
        name=f"{measured.name}, for {estimate.num_devices} devices of {estimate.provenance.get('device', 'a cluster')}",
        compute=replace(measured.compute, fixed_s=fixed_s),
        all_to_all=replace(
            measured.all_to_all,
            bandwidth_bytes_per_s={
                d: measured.all_to_all.bandwidth_bytes_per_s[d] if d in own else v for d, v in bandwidth.items()
            },
            latency_s={d: measured.latency_s(d) if d in own else v for d, v in latency.items()},
        ),
        memory=measured.memory,
        layouts={d: layouts[d] for d in sorted(layouts)},
        optimizer_s=measured.optimizer_s,
        tables={d: table for d, table in measured.tables.items() if d == 1 or d in own},
        provenance={
            **measured.provenance,
            "source": "mixed",
            "assumptions": [
                *_strings(measured.provenance, "assumptions"),
                f"measured on {measured.num_devices} x {measured.provenance.get('device')}; taken for "
                f"{estimate.num_devices} devices: {estimate.provenance.get('device')}",
                *(f"of what is estimated: {text}" for text in _strings(estimate.provenance, "assumptions")),
            ],
            "fields": fields,
            "sources": _strings(estimate.provenance, "sources"),
            **{
                key: {d: value for d, value in by_degree.items() if int(d) not in own}
                for key in ("splits_s_per_token", "ring_hidden")
                if isinstance(by_degree := estimate.provenance.get(key), Mapping)
            },
        },
    )


def _why(estimate: Profile, field: str) -> str:
    fields = estimate.provenance.get("fields", {})
    return str(fields.get(field, "data sheets")) if isinstance(fields, Mapping) else "data sheets"


def _strings(provenance: Mapping[str, object], key: str) -> list[str]:
    found = provenance.get(key, [])
    return [str(item) for item in found] if isinstance(found, list) else []
