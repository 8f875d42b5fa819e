"""Profiles as files, flexsp-profile/1: read field by field, so that what is wrong is named; written as they were.

Seconds and rates become floating point: a Python integer of them would make numpy compute in 64 bits, and wrap around.
Bytes stay the integers that they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from flexsp import jsonfields as jf
from flexsp.profile import MOST_DEVICES, AllToAll, Compute, Layout, Memory, Policy, Profile, Table

FORMAT = "flexsp-profile/1"


def profile_from_json(document: Mapping[str, Any], where: str) -> Profile:
    """The profile of a document that `where` names in errors.

    Raises:
        ValueError: a field is missing or wrong; the message names it.
    """
    found = jf.required(jf.as_object(document, where), "format", where)
    if found != FORMAT:
        raise ValueError(f"{where}: format={jf.short(found)} must be {FORMAT!r}; give a profile file")
    compute = _Section(document, "compute", where)
    exchange = _Section(document, "all_to_all", where)
    memory = _Section(document, "memory", where)
    layouts = jf.as_object(document.get("layouts", {}), f"{where}: layouts")
    tables = jf.as_object(document.get("tables", {}), f"{where}: tables")
    optimizer_s = document.get("optimizer_s")
    try:
        profile = Profile(
            name=jf.as_string(jf.required(document, "name", where), f"{where}: name"),
            num_devices=jf.as_integer(
                jf.required(document, "num_devices", where), f"{where}: num_devices", 1, MOST_DEVICES
            ),
            devices_per_node=jf.as_integer(
                jf.required(document, "devices_per_node", where), f"{where}: devices_per_node", 1, MOST_DEVICES
            ),
            sp_degrees=tuple(
                jf.as_integer(d, f"{where}: sp_degrees", 1)
                for d in jf.as_list(jf.required(document, "sp_degrees", where), f"{where}: sp_degrees")
            ),
            compute=Compute(
                quadratic_s=float(compute.number("quadratic_s")),
                linear_s=float(compute.number("linear_s")),
                fixed_s=float(compute.number("fixed_s")),
            ),
            all_to_all=AllToAll(
                bytes_per_token=exchange.number("bytes_per_token"),
                bandwidth_bytes_per_s=exchange.by_degree("bandwidth_bytes_per_s", positive=True),
                latency_s=exchange.by_degree("latency_s", optional=True),
            ),
            memory=Memory(
                memory_bytes=memory.number("memory_bytes", positive=True),
                model_state_bytes=memory.number("model_state_bytes"),
                activation_bytes_per_token=memory.number("activation_bytes_per_token", positive=True),
                policies=_policies(memory),
                unsharded_bytes=memory.integer("unsharded_bytes"),
            ),
            layouts={_degree(key, f"{where}: layouts"): _layout(key, entry, where) for key, entry in layouts.items()},
            optimizer_s=None if optimizer_s is None else float(jf.as_number(optimizer_s, f"{where}: optimizer_s")),
            provenance=jf.as_object(document.get("provenance", {}), f"{where}: provenance"),
            tables={_degree(key, f"{where}: tables"): _table(key, entry, where) for key, entry in tables.items()},
        )
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(where) else f"{where}: {text}") from None
    return replace(profile, extra=jf.remainder(document, profile.to_json()))


def profile_to_json(profile: Profile) -> dict[str, Any]:
    """The document of a profile, with the fields that it did not know when it was read."""
    memory: dict[str, Any] = {
        "memory_bytes": profile.memory.memory_bytes,
        "model_state_bytes": profile.memory.model_state_bytes,
        "activation_bytes_per_token": profile.memory.activation_bytes_per_token,
    }
    if profile.memory.unsharded_bytes:
        memory["unsharded_bytes"] = profile.memory.unsharded_bytes
    if profile.memory.policies:
        memory["policies"] = {
            name: {
                "activation_bytes_per_token": policy.activation_bytes_per_token,
                "compute_factor": policy.compute_factor,
            }
            for name, policy in profile.memory.policies.items()
        }
    document: dict[str, Any] = {
        "format": FORMAT,
        "name": profile.name,
        "num_devices": profile.num_devices,
        "devices_per_node": profile.devices_per_node,
        "sp_degrees": list(profile.sp_degrees),
        "compute": {
            "quadratic_s": profile.compute.quadratic_s,
            "linear_s": profile.compute.linear_s,
            "fixed_s": profile.compute.fixed_s,
        },
        "all_to_all": {
            "bytes_per_token": profile.all_to_all.bytes_per_token,
            "bandwidth_bytes_per_s": {str(d): v for d, v in profile.all_to_all.bandwidth_bytes_per_s.items()},
            "latency_s": {str(d): v for d, v in profile.all_to_all.latency_s.items()},
        },
        "memory": memory,
    }
    if profile.layouts:
        document["layouts"] = {str(d): {"ulysses": v.ulysses, "ring": v.ring} for d, v in profile.layouts.items()}
    if profile.optimizer_s is not None:
        document["optimizer_s"] = profile.optimizer_s
    if profile.tables:
        document["tables"] = {
            str(d): {"lengths": list(t.lengths), "seconds_per_token": list(t.seconds_per_token)}
            for d, t in profile.tables.items()
        }
    document["provenance"] = dict(profile.provenance)
    return jf.merged(document, profile.extra)


class _Section:
    """One nested object of the file, whose fields are named with their path in errors."""

    def __init__(self, document: Mapping[str, Any], name: str, where: str) -> None:
        self.where = f"{where}: {name}"
        self.fields = jf.as_object(jf.required(document, name, where), self.where)

    def number(self, key: str, positive: bool = False) -> int | float:
        return jf.as_number(jf.required(self.fields, key, self.where), f"{self.where}.{key}", positive)

    def integer(self, key: str) -> int:
        """At least 0, which it is where it is not there."""
        return jf.as_integer(self.fields.get(key, 0), f"{self.where}.{key}", 0)

    def by_degree(self, key: str, positive: bool = False, optional: bool = False) -> dict[int, float]:
        where = f"{self.where}.{key}"
        table = self.fields.get(key, {}) if optional else jf.required(self.fields, key, self.where)
        return {
            _degree(degree, where): float(jf.as_number(value, f"{where}[{degree}]", positive))
            for degree, value in jf.as_object(table, where).items()
        }


def _degree(key: str, where: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 7 and str(int(key)) == key and int(key) > 0):
        raise ValueError(f"{where}: key {key[:40]!r} must be a degree, a positive integer in quotes; correct it")
    return int(key)


def _policies(memory: _Section) -> dict[str, Policy]:
    where = f"{memory.where}.policies"
    policies = {}
    for name, entry in jf.as_object(memory.fields.get("policies", {}), where).items():
        fields = _Section({name: entry}, name, where)
        factor = float(fields.number("compute_factor", positive=True)) if "compute_factor" in fields.fields else 1.0
        policies[name] = Policy(
            activation_bytes_per_token=fields.number("activation_bytes_per_token", positive=True), compute_factor=factor
        )
    return policies


def _layout(key: str, entry: Any, where: str) -> Layout:
    where = f"{where}: layouts[{key}]"
    fields = jf.as_object(entry, where)
    layout = Layout(
        ulysses=jf.as_integer(jf.required(fields, "ulysses", where), f"{where}.ulysses", 1),
        ring=jf.as_integer(jf.required(fields, "ring", where), f"{where}.ring", 1),
    )
    if layout.ulysses * layout.ring != int(key):
        raise ValueError(f"{where}: ulysses={layout.ulysses} x ring={layout.ring} must be {key}; correct one")
    return layout


def _table(key: str, entry: Any, where: str) -> Table:
    where = f"{where}: tables[{key}]"
    fields = jf.as_object(entry, where)
    lengths = jf.as_list(jf.required(fields, "lengths", where), f"{where}.lengths")
    seconds = jf.as_list(jf.required(fields, "seconds_per_token", where), f"{where}.seconds_per_token")
    table = Table(
        lengths=tuple(jf.as_integer(value, f"{where}.lengths", 1) for value in lengths),
        seconds_per_token=tuple(float(jf.as_number(value, f"{where}.seconds_per_token")) for value in seconds),
    )
    if not lengths or len(lengths) != len(seconds) or list(table.lengths) != sorted(set(table.lengths)):
        raise ValueError(
            f"{where}: lengths={lengths[:4]} must ascend, with one of seconds_per_token each; correct the table"
        )
    return table
