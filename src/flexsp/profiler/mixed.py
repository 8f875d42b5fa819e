"""What cannot be measured where a profile is made: taken from an estimate for a named cluster, field by field."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

from flexsp.estimate import Cluster
from flexsp.profile import Profile, Table


def other_device(device: str, cluster: Cluster) -> str | None:
    """What a profile mixes where the device measured is not known to be the cluster's; None where it is.

    Args:
        device: what is measured, as torch calls it.
        cluster: what the rest is estimated for.
    """
    if device in cluster.device_names:
        return None
    if not cluster.device_names:
        return (
            f"measured on {device}, and the file of cluster {cluster.name!r} has no device_names: whether that is its "
            f"{cluster.device} is not known; name there what torch calls it"
        )
    return (
        f"measured on {device}, which is not the {cluster.device} of the cluster: compute and memory of the one are "
        f"mixed with links of the other; measure on such a device, or name another cluster"
    )


def fill_from_estimate(measured: Profile, estimate: Profile, doubt: str | None = None) -> Profile:
    """The measured profile for the estimate's cluster: its degrees, nodes and number of devices.

    A device's own seconds and bytes stay measured. Degrees that were measured keep their exchange and how they split
    into heads x context, where their group lies in one node there too; other degrees, and the gathers of more devices,
    are the estimate's. Where degree 1 has a measured table every degree gets one.

    Args:
        measured: of few devices, but with the model states and the optimizer's step of the cluster's number of them.
        estimate: of the cluster, same model and type.
        doubt: from `other_device`; it is among the assumptions then.
    """
    own = {
        d
        for d in measured.sp_degrees
        if d > 1 and d in estimate.sp_degrees and d <= min(measured.devices_per_node, estimate.devices_per_node)
    }
    bandwidth, latency = estimate.all_to_all.bandwidth_bytes_per_s, estimate.all_to_all.latency_s
    layouts = {d: layout for d, layout in estimate.layouts.items() if d not in own}
    layouts |= {d: layout for d, layout in measured.layouts.items() if d in own}
    fixed_s, fixed_from = _fixed_s(measured, estimate)
    mixed = replace(
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
    )
    mixed = replace(mixed, tables=_tables(measured, mixed, own))
    return replace(
        mixed,
        provenance={
            **measured.provenance,
            "source": "mixed",
            "assumptions": [
                *_strings(measured.provenance, "assumptions"),
                f"measured on {measured.num_devices} x {measured.provenance.get('device')}; taken for "
                f"{estimate.num_devices} devices: {estimate.provenance.get('device')}",
                *([] if doubt is None else [doubt]),
                *(f"of what is estimated: {text}" for text in _strings(estimate.provenance, "assumptions")),
            ],
            "fields": {
                "compute.quadratic_s": "measured",
                "compute.linear_s": "measured",
                "compute.fixed_s": fixed_from,
                **_memory_fields(measured, estimate),
                **_cluster_fields(mixed, estimate, own),
            },
            "sources": _strings(estimate.provenance, "sources"),
            **{
                key: {d: value for d, value in by_degree.items() if int(d) not in own}
                for key in ("splits_s_per_token", "ring_hidden")
                if isinstance(by_degree := estimate.provenance.get(key), Mapping)
            },
        },
    )


def _tables(measured: Profile, mixed: Profile, own: set[int]) -> dict[int, Table]:
    """Tables of all degrees, or of none.

    Beside a table of seconds above the formula's, a degree that has the formula alone would look too cheap. What was
    not measured gets degree 1's seconds, shared by its ranks, and its exchange, the latency spread over a full row.
    """
    if 1 not in measured.tables:
        return {}
    kept = {d: table for d, table in measured.tables.items() if d == 1 or d in own}
    alone = kept[1]

    def shared(degree: int) -> Table:
        exchange_s = mixed.exchange_s_per_token(degree) + mixed.latency_s(degree) / (degree * alone.lengths[-1])
        return Table(
            lengths=alone.lengths, seconds_per_token=tuple(s / degree + exchange_s for s in alone.seconds_per_token)
        )

    return {d: kept.get(d) or shared(d) for d in sorted({1, *mixed.sp_degrees})}


def _fixed_s(measured: Profile, estimate: Profile) -> tuple[float, str]:
    """The fixed cost and where it is from: gathers over more devices, or other nodes, take no less than measured."""
    own_s, said_s = measured.compute.fixed_s, estimate.compute.fixed_s
    if (measured.num_devices, measured.devices_per_node) == (estimate.num_devices, estimate.devices_per_node):
        return own_s, "measured"
    why, on = _why(estimate, "compute.fixed_s"), f"measured on {_devices(measured)}: {own_s:.4g} s"
    if said_s > own_s:
        return said_s, f"estimated: {why}; {on}"
    return own_s, f"{on}, not below the {said_s:.4g} s estimated for {_devices(estimate)}: {why}"


def _memory_fields(measured: Profile, estimate: Profile) -> dict[str, str]:
    """Where the bytes are from, and the optimizer's seconds, which are in proportion to them."""
    limit = measured.provenance.get("memory_limit")
    artificial = "max_tokens_per_rank" in measured.provenance
    # Under an artificial limit what a token holds at other degrees is not measured: nothing depends on it.
    run = [1] if artificial else sorted({1, *measured.sp_degrees})
    others = [d for d in estimate.sp_degrees if d not in run]
    activations = f"measured at {_degrees(run)}"
    if others:
        activations += f", the most; not run at {_degrees(others)}, taken to hold no more a token"
    share = f"a share of 1/{estimate.num_devices} of the parameters"
    held = f"what a rank held at rest beyond its share, measured on {_devices(measured)}"
    fields = {
        "memory.memory_bytes": "measured" if limit is None else f"measured, less a margin: {limit}",
        "memory.model_state_bytes": f"counted: weights, gradients and Adam's moments of {share}; and {held}",
        "memory.unsharded_bytes": f"{held}; of a model of which few layers were run, put together",
        "memory.activation_bytes_per_token": activations,
        "optimizer_s": f"measured on {_devices(measured)}, in proportion for {share}",
    }
    if artificial:
        fields["memory.memory_bytes"] = str(limit)
    if measured.memory.policies:
        fields["memory.policies"] = "measured at degree 1; bytes of higher degrees in the proportion of those without"
    return fields


def _cluster_fields(mixed: Profile, estimate: Profile, own: set[int]) -> dict[str, str]:
    """Where the exchange, splits and tables are from, by degree: `own` were measured as they are on the cluster."""
    cluster = f"of the cluster: {estimate.provenance.get('device')}"
    fields = dict.fromkeys(("num_devices", "devices_per_node", "sp_degrees"), cluster)
    fields["all_to_all.bytes_per_token"] = "counted from the model's shape and the type it computes in"
    by_degree = {
        "all_to_all.bandwidth_bytes_per_s": list(mixed.all_to_all.bandwidth_bytes_per_s),
        "layouts": list(mixed.layouts),
    }
    for field, degrees in by_degree.items():
        for d in degrees:
            fields[f"{field}.{d}"] = "measured" if d in own else f"estimated: {_why(estimate, field)}"
    fields["all_to_all.latency_s"] = "as the bandwidth of the same degree"
    shared = "estimated: the table of degree 1 shared by the ranks, and the exchange of the degree"
    return {**fields, **{f"tables.{d}": "measured" if d == 1 or d in own else shared for d in mixed.tables}}


def _devices(profile: Profile) -> str:
    return f"{profile.num_devices} {'device' if profile.num_devices == 1 else 'devices'}"


def _degrees(degrees: Iterable[int]) -> str:
    each = [str(d) for d in degrees]
    return f"{'degree' if len(each) == 1 else 'degrees'} {', '.join(each)}"


def _why(estimate: Profile, field: str) -> str:
    fields = estimate.provenance.get("fields", {})
    return str(fields.get(field, "data sheets")) if isinstance(fields, Mapping) else "data sheets"


def _strings(provenance: Mapping[str, object], key: str) -> list[str]:
    found = provenance.get(key, [])
    return [str(item) for item in found] if isinstance(found, list) else []
