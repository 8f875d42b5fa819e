"""A kind of cluster: what its data sheets say, and what share of that programs reach, each figure with its source.

A cluster file is TOML. `[data_sheet]` holds facts, `[assumed]` shares and costs that were measured elsewhere or
guessed; a figure is a number, or `{ value = ..., source = "..." }`. Rates are per device and, for links, per direction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

from flexsp import jsonfields as jf
from flexsp.profile import MOST_DEVICES

DTYPES = {"bfloat16": 2, "float32": 4}
"""Bytes of an element, by the name of what a model computes in."""
TOPOLOGIES = ("switch", "mesh")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """Devices in nodes, all alike."""

    name: str
    device: str
    devices_per_node: int
    num_devices: int
    """How many devices an estimate is for, unless it says otherwise."""
    link_topology: str
    """How devices of a node are joined: `switch` gives any pair the whole rate, `mesh` one link per pair."""
    device_names: tuple[str, ...] = ()
    """What torch and the driver call the device, to the letter: another form of it may have another peak."""

    # ---- the data sheets
    memory_bytes: float
    memory_bytes_per_s: float
    """Rate of the device's memory."""
    link_bytes_per_s: float
    """All links inside the node together; in a mesh each peer gets an equal part."""
    nic_bytes_per_s: float
    """Between nodes: the node's network cards over its devices."""
    host_bytes_per_s: float
    """Between device and host memory."""
    peak_flops_per_s: Mapping[str, float]
    """Dense matrix products, by dtype."""

    # ---- assumed
    linear_efficiency: float
    """Share of the peak that what is linear in tokens reaches: matrix products, with the time of norms and the rest."""
    attention_efficiency: float
    """Share of the peak that causal FlashAttention reaches, forward and backward."""
    exchange_link_efficiency: float
    """Share of the links' rate that an all-to-all inside a node reaches."""
    exchange_nic_efficiency: float
    """Share of the network cards' rate that an all-to-all across nodes reaches."""
    exchange_copies: float
    """Passes over device memory that an exchange costs beside the transfer, in bytes moved per byte exchanged."""
    gather_link_efficiency: float
    """Share of the links' rate that all-gather and reduce-scatter reach."""
    gather_nic_efficiency: float
    """Share of the network cards' rate that all-gather and reduce-scatter reach."""
    gather_exposed: float
    """Share of the parameters' and gradients' traffic that compute does not hide."""
    host_efficiency: float
    """Share of the host link's rate that a copy reaches."""
    layer_launch_s: float
    """Seconds of kernel launches of one layer, forward and backward."""
    exchange_launch_s: float
    """Seconds before the first byte of one all-to-all, inside a node."""
    exchange_node_s: float
    """Seconds added to that for every other node."""

    sources: Mapping[str, str]
    """Where each figure comes from, by the name of its field."""

    def __post_init__(self) -> None:
        if self.link_topology not in TOPOLOGIES:
            raise ValueError(
                f"link_topology={jf.short(self.link_topology)} must be one of {', '.join(TOPOLOGIES)}; correct it"
            )
        for name in SHARES:
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0 and at most 1; give a share")

    def with_devices(self, num_devices: int) -> Cluster:
        """The same kind of cluster with this number of devices.

        Raises:
            ValueError: they do not fill whole nodes.
        """
        if not 1 <= num_devices <= MOST_DEVICES:
            raise ValueError(f"num_devices={num_devices} must be from 1 to {MOST_DEVICES:,}; give their number")
        if num_devices > self.devices_per_node and num_devices % self.devices_per_node:
            raise ValueError(
                f"num_devices={num_devices} must be at most devices_per_node={self.devices_per_node} or a multiple of "
                f"it; use {num_devices // self.devices_per_node * self.devices_per_node} or "
                f"{math.ceil(num_devices / self.devices_per_node) * self.devices_per_node}"
            )
        return replace(self, num_devices=num_devices)

    @property
    def num_nodes(self) -> int:
        return math.ceil(self.num_devices / self.devices_per_node)

    def links_bytes_per_s(self, num_devices: int) -> float:
        """What a device can send to `num_devices - 1` others of its node at once."""
        if self.link_topology == "switch":
            return self.link_bytes_per_s
        return self.link_bytes_per_s * (num_devices - 1) / (self.devices_per_node - 1)


DATA_SHEET = (
    "memory_bytes", "memory_bytes_per_s", "link_bytes_per_s", "nic_bytes_per_s", "host_bytes_per_s",
)  # fmt: skip
SHARES = (
    "linear_efficiency", "attention_efficiency", "exchange_link_efficiency", "exchange_nic_efficiency",
    "gather_link_efficiency", "gather_nic_efficiency", "gather_exposed", "host_efficiency",
)  # fmt: skip
COSTS = ("exchange_copies", "layer_launch_s", "exchange_launch_s", "exchange_node_s")


def cluster_names() -> list[str]:
    """Names of the clusters that come with flexsp."""
    folder = resources.files("flexsp.estimate") / "clusters"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_cluster(name_or_path: str | Path) -> Cluster:
    """A cluster that comes with flexsp, by its name, or one from a TOML file.

    Raises:
        ValueError: no such name or file, or a field is missing or wrong; the message names it.
    """
    text = str(name_or_path)
    if text in cluster_names():
        content = (resources.files("flexsp.estimate") / "clusters" / f"{text}.toml").read_text(encoding="utf-8")
        return _parse(content, f"{text}.toml")
    if not text.endswith(".toml"):
        raise ValueError(
            f"cluster={text!r} is unknown; choose one of {', '.join(cluster_names())}, or give the path of a .toml file"
        )
    return _parse(jf.read_text(text, "the path of a cluster file in TOML"), text)


def known_peak(device_name: str, dtype: str) -> float | None:
    """Peak FLOPs per second of a device by what torch calls it, by its data sheet; None where no cluster file names it.

    Args:
        device_name: of `torch.cuda.get_device_name`.
        dtype: what is computed in; float32 is without TF32, as torch has it by default.
    """
    for name in cluster_names():
        cluster = load_cluster(name)
        if device_name in cluster.device_names:
            return cluster.peak_flops_per_s.get(dtype)
    return None


def _parse(content: str, where: str) -> Cluster:
    document = jf.parse_toml(content, where)
    sources: dict[str, str] = {}
    sheet = _Figures(document, "data_sheet", where, sources)
    assumed = _Figures(document, "assumed", where, sources)
    per_node = jf.as_integer(
        jf.required(document, "devices_per_node", where), f"{where}: devices_per_node", 1, MOST_DEVICES
    )
    figures = {name: sheet.number(name) for name in DATA_SHEET}
    figures |= {name: assumed.number(name) for name in SHARES}
    figures |= {name: assumed.number(name, positive=False) for name in COSTS}
    try:
        cluster = Cluster(
            name=jf.as_string(jf.required(document, "name", where), f"{where}: name"),
            device=jf.as_string(jf.required(document, "device", where), f"{where}: device"),
            devices_per_node=per_node,
            num_devices=jf.as_integer(document.get("num_devices", per_node), f"{where}: num_devices", 1, MOST_DEVICES),
            link_topology=jf.as_string(document.get("link_topology", "switch"), f"{where}: link_topology"),
            device_names=tuple(
                jf.as_string(name, f"{where}: device_names")
                for name in jf.as_list(document.get("device_names", []), f"{where}: device_names")
            ),
            peak_flops_per_s={dtype: sheet.number(f"{dtype}_flops_per_s") for dtype in DTYPES},
            sources=sources,
            **figures,
        )
        return cluster.with_devices(cluster.num_devices)
    except ValueError as error:
        text = str(error)
        raise ValueError(text if text.startswith(where) else f"{where}: {text}") from None


class _Figures:
    """One table of a cluster file: numbers, or numbers with their source."""

    def __init__(self, document: Mapping[str, Any], name: str, where: str, sources: dict[str, str]) -> None:
        self.where = f"{where}: {name}"
        self.fields = jf.as_object(jf.required(document, name, where), self.where)
        self.name, self.sources = name.replace("_", " "), sources

    def number(self, key: str, positive: bool = True) -> float:
        value = jf.required(self.fields, key, self.where)
        source = "no source given"
        if isinstance(value, dict):
            source = jf.as_string(value.get("source", source), f"{self.where}.{key}.source")
            value = jf.required(value, "value", f"{self.where}.{key}")
        self.sources[key] = f"{self.name}: {source}"
        return float(jf.as_number(value, f"{self.where}.{key}", positive))
