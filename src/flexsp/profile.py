"""The cost model: seconds and bytes of a sequence-parallel group (arXiv 2412.01523, eq. 11-14).

For a group of degree d that holds sequences of s tokens each:

    compute(d)  = compute_factor * sum(quadratic_s * s^2 + linear_s * s) / d
    exchange(d) = 0 if d == 1 else bytes_per_token * sum(s) / (d * bandwidth[d]) + latency[d]
    group(d)    = compute(d) + exchange(d)
    micro_batch = fixed_s + max over its groups of group(d)
    memory(d)   = model_state_bytes + activation_bytes_per_token * sum(s) / d   <=   memory_bytes
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flexsp import jsonfields as jf

FORMAT = "flexsp-profile/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """What forward and backward of one micro-batch cost, apart from the exchange."""

    quadratic_s: float
    """Seconds per token squared of a sequence, on one device: attention."""
    linear_s: float
    """Seconds per token, on one device: everything else that grows with tokens."""
    fixed_s: float
    """Seconds per micro-batch, whatever it holds: parameter gathers, launches."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AllToAll:
    """What a group's exchange costs."""

    bytes_per_token: float
    """Bytes that one token moves through all exchanges of forward and backward."""
    bandwidth_bytes_per_s: Mapping[int, float]
    """Effective bytes per second and device, by degree."""
    latency_s: Mapping[int, float]
    """Seconds per micro-batch, by degree; a degree that is not listed has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A way to hold fewer activations, chosen per micro-batch."""

    activation_bytes_per_token: float
    compute_factor: float = 1.0
    """What compute takes under this policy, relative to none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """What a device can hold."""

    memory_bytes: float
    model_state_bytes: float
    """Parameters, gradients and optimizer state on one device."""
    activation_bytes_per_token: float
    policies: Mapping[str, Policy]


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a degree splits into heads x context."""

    ulysses: int
    ring: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """The measured, published or estimated cost of one model on one cluster."""

    name: str
    num_devices: int
    devices_per_node: int
    sp_degrees: tuple[int, ...]
    """The degrees that a plan may use, ascending."""
    compute: Compute
    all_to_all: AllToAll
    memory: Memory
    layouts: Mapping[int, Layout] = field(default_factory=dict)
    """Degrees that are not pure Ulysses."""
    optimizer_s: float | None = None
    """Seconds of the optimizer's step; no part of a plan's predicted_s."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Where the numbers come from."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the file that this version does not know, nested as they were; kept when it is saved."""

    def __post_init__(self) -> None:
        degrees = self.sp_degrees
        if not degrees or degrees != tuple(sorted(set(degrees))) or degrees[0] < 1:
            raise ValueError(
                f"sp_degrees={list(degrees)} must be ascending positive integers; sort and de-duplicate them"
            )
        if degrees[-1] > self.num_devices:
            raise ValueError(
                f"sp_degrees={list(degrees)} has a degree above num_devices={self.num_devices}; remove {degrees[-1]}"
            )
        for degree in degrees:
            if degree > 1 and degree not in self.all_to_all.bandwidth_bytes_per_s:
                raise ValueError(
                    f"sp_degrees={list(degrees)}: degree {degree} has no entry in all_to_all.bandwidth_bytes_per_s; "
                    f"add one or remove the degree"
                )
        if self.memory.memory_bytes <= self.memory.model_state_bytes:
            raise ValueError(
                f"memory_bytes={self.memory.memory_bytes} must be above "
                f"model_state_bytes={self.memory.model_state_bytes}; nothing is left for activations"
            )

    # ---- the formulas

    def sequence_work_s(self, tokens: int) -> float:
        """Seconds of compute of one sequence of `tokens` tokens, on one device."""
        return (self.compute.quadratic_s * tokens + self.compute.linear_s) * tokens

    def exchange_s_per_token(self, degree: int) -> float:
        """Seconds of exchange per token of a group of `degree`, latency apart."""
        if degree == 1:
            return 0.0
        return self.all_to_all.bytes_per_token / (degree * self.all_to_all.bandwidth_bytes_per_s[degree])

    def latency_s(self, degree: int) -> float:
        return 0.0 if degree == 1 else self.all_to_all.latency_s.get(degree, 0.0)

    def group_s(self, degree: int, lengths: Iterable[int], policy: str | None = None) -> float:
        """Seconds of a group of `degree` ranks that holds sequences of these `lengths` (tokens)."""
        work_s, tokens = 0.0, 0
        for length in lengths:
            work_s += self.sequence_work_s(int(length))
            tokens += int(length)
        factor = self.memory.policies[policy].compute_factor if policy else 1.0
        return factor * work_s / degree + tokens * self.exchange_s_per_token(degree) + self.latency_s(degree)

    def activation_bytes_per_token(self, policy: str | None = None) -> float:
        return (
            self.memory.policies[policy].activation_bytes_per_token
            if policy
            else self.memory.activation_bytes_per_token
        )

    def group_bytes(self, degree: int, tokens: int, policy: str | None = None) -> float:
        """Bytes on each device of a group of `degree` ranks that holds `tokens` tokens."""
        return self.memory.model_state_bytes + self.activation_bytes_per_token(policy) * tokens / degree

    def fits(self, degree: int, tokens: int, policy: str | None = None) -> bool:
        """Whether memory(degree) <= memory_bytes, free of rounding where the bytes are integers."""
        room_bytes = self.memory.memory_bytes - self.memory.model_state_bytes
        return self.activation_bytes_per_token(policy) * tokens <= room_bytes * degree

    def capacity_tokens(self, degree: int, policy: str | None = None) -> int:
        """The most tokens that a group of `degree` ranks can hold."""
        room_bytes = self.memory.memory_bytes - self.memory.model_state_bytes
        return int(room_bytes * degree // self.activation_bytes_per_token(policy))

    # ---- other clusters

    def for_devices(self, num_devices: int) -> Profile:
        """This model's profile on `num_devices` devices of the same kind, e.g. to plan for half the cluster.

        Model states are taken as sharded over all devices (ZeRO-3), so each device's share changes in proportion;
        degrees above `num_devices` go; seconds, bandwidths and nodes stay. What was assumed is appended to
        `provenance["assumptions"]`.

        Raises:
            ValueError: no degree is left, or the model states no longer fit.
        """
        if num_devices < 1:
            raise ValueError(f"num_devices={num_devices} must be at least 1; give the number of devices")
        if num_devices == self.num_devices:
            return self
        degrees = tuple(d for d in self.sp_degrees if d <= num_devices)
        if not degrees:
            raise ValueError(
                f"num_devices={num_devices} is below every degree of sp_degrees={list(self.sp_degrees)}; use more"
            )
        assumption = (
            f"for {num_devices} devices from a profile of {self.num_devices}: model_state_bytes sharded evenly over "
            f"all devices; fixed_s, bandwidths and latencies unchanged; no degree above {degrees[-1]}"
        )
        return replace(
            self,
            num_devices=num_devices,
            devices_per_node=min(self.devices_per_node, num_devices),
            sp_degrees=degrees,
            memory=replace(
                self.memory, model_state_bytes=self.memory.model_state_bytes * self.num_devices / num_devices
            ),
            provenance={
                **self.provenance,
                "assumptions": [*self.provenance.get("assumptions", []), assumption],
            },
        )

    # ---- the file

    @classmethod
    def load(cls, path: str | Path) -> Profile:
        """Reads a flexsp-profile/1 file.

        Raises:
            ValueError: the file cannot be read, or a field is missing or wrong; the message names it.
        """
        return cls.from_json(jf.read_object(path), str(path))

    def save(self, path: str | Path) -> None:
        """Writes a flexsp-profile/1 file."""
        jf.write_object(path, self.to_json())

    @classmethod
    def from_json(cls, document: Mapping[str, Any], where: str = "profile") -> Profile:
        found = jf.required(document, "format", where)
        if found != FORMAT:
            raise ValueError(f"{where}: format={found!r} must be {FORMAT!r}; give a profile file")
        compute = _Section(document, "compute", where)
        exchange = _Section(document, "all_to_all", where)
        memory = _Section(document, "memory", where)
        layouts = jf.as_object(document.get("layouts", {}), f"{where}: layouts")
        optimizer_s = document.get("optimizer_s")
        try:
            profile = cls(
                name=jf.as_string(jf.required(document, "name", where), f"{where}: name"),
                num_devices=jf.as_integer(jf.required(document, "num_devices", where), f"{where}: num_devices", 1),
                devices_per_node=jf.as_integer(
                    jf.required(document, "devices_per_node", where), f"{where}: devices_per_node", 1
                ),
                sp_degrees=tuple(
                    jf.as_integer(d, f"{where}: sp_degrees", 1)
                    for d in jf.as_list(jf.required(document, "sp_degrees", where), f"{where}: sp_degrees")
                ),
                compute=Compute(
                    quadratic_s=compute.number("quadratic_s"),
                    linear_s=compute.number("linear_s"),
                    fixed_s=compute.number("fixed_s"),
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
                ),
                layouts={
                    _degree(key, f"{where}: layouts"): _layout(key, entry, where) for key, entry in layouts.items()
                },
                optimizer_s=None if optimizer_s is None else jf.as_number(optimizer_s, f"{where}: optimizer_s"),
                provenance=jf.as_object(document.get("provenance", {}), f"{where}: provenance"),
            )
        except ValueError as error:
            text = str(error)
            raise ValueError(text if text.startswith(where) else f"{where}: {text}") from None
        return replace(profile, extra=jf.remainder(document, profile.to_json()))

    def to_json(self) -> dict[str, Any]:
        memory: dict[str, Any] = {
            "memory_bytes": self.memory.memory_bytes,
            "model_state_bytes": self.memory.model_state_bytes,
            "activation_bytes_per_token": self.memory.activation_bytes_per_token,
        }
        if self.memory.policies:
            memory["policies"] = {
                name: {
                    "activation_bytes_per_token": policy.activation_bytes_per_token,
                    "compute_factor": policy.compute_factor,
                }
                for name, policy in self.memory.policies.items()
            }
        document: dict[str, Any] = {
            "format": FORMAT,
            "name": self.name,
            "num_devices": self.num_devices,
            "devices_per_node": self.devices_per_node,
            "sp_degrees": list(self.sp_degrees),
            "compute": {
                "quadratic_s": self.compute.quadratic_s,
                "linear_s": self.compute.linear_s,
                "fixed_s": self.compute.fixed_s,
            },
            "all_to_all": {
                "bytes_per_token": self.all_to_all.bytes_per_token,
                "bandwidth_bytes_per_s": {str(d): v for d, v in self.all_to_all.bandwidth_bytes_per_s.items()},
                "latency_s": {str(d): v for d, v in self.all_to_all.latency_s.items()},
            },
            "memory": memory,
        }
        if self.layouts:
            document["layouts"] = {str(d): {"ulysses": v.ulysses, "ring": v.ring} for d, v in self.layouts.items()}
        if self.optimizer_s is not None:
            document["optimizer_s"] = self.optimizer_s
        document["provenance"] = dict(self.provenance)
        return jf.merged(document, self.extra)


class _Section:
    """One nested object of the file, whose fields are named with their path in errors."""

    def __init__(self, document: Mapping[str, Any], name: str, where: str) -> None:
        self.where = f"{where}: {name}"
        self.fields = jf.as_object(jf.required(document, name, where), self.where)

    def number(self, key: str, positive: bool = False) -> int | float:
        return jf.as_number(jf.required(self.fields, key, self.where), f"{self.where}.{key}", positive)

    def by_degree(self, key: str, positive: bool = False, optional: bool = False) -> dict[int, float]:
        where = f"{self.where}.{key}"
        table = self.fields.get(key, {}) if optional else jf.required(self.fields, key, self.where)
        return {
            _degree(degree, where): jf.as_number(value, f"{where}[{degree}]", positive)
            for degree, value in jf.as_object(table, where).items()
        }


def _degree(key: str, where: str) -> int:
    if not (key.isascii() and key.isdigit() and int(key) > 0):
        raise ValueError(f"{where}: key {key!r} must be a degree, a positive integer in quotes; correct it")
    return int(key)


def _policies(memory: _Section) -> dict[str, Policy]:
    where = f"{memory.where}.policies"
    policies = {}
    for name, entry in jf.as_object(memory.fields.get("policies", {}), where).items():
        fields = _Section({name: entry}, name, where)
        factor = fields.number("compute_factor", positive=True) if "compute_factor" in fields.fields else 1.0
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
