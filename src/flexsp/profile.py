"""The cost model: seconds and bytes of a sequence-parallel group (arXiv 2412.01523, eq. 11-14).

For a group of degree d that holds sequences of s tokens each:

    compute(d)  = compute_factor * sum(quadratic_s * s^2 + linear_s * s) / d
    exchange(d) = 0 if d == 1 else bytes_per_token * sum(s) / (d * bandwidth[d]) + latency[d]
    group(d)    = compute(d) + exchange(d)
    micro_batch = fixed_s + max over its groups of group(d)
    memory(d)   = model_state_bytes + activation_bytes_per_token * sum(s) / d   <=   memory_bytes

Where two terms do not fit what was measured, a profile carries tables by length and degree beside the formula.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flexsp import jsonfields as jf

FloatArray = npt.NDArray[np.float64]

MOST_TOKENS = (2**63 - 1) // 8
"""A capacity beyond any batch, for activations that cost next to nothing: sums of some still fit into 64 bits."""
MOST_DEVICES = 1 << 17
"""More are taken for a slip of the keyboard: planning for them would take hours or all memory."""


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
    """What one device holds whatever its tokens: its share of parameters, gradients and optimizer state, and
    `unsharded_bytes`."""
    activation_bytes_per_token: float
    policies: Mapping[str, Policy]
    unsharded_bytes: int = 0
    """The part of `model_state_bytes` that is the same on any number of devices: what is gathered whole, a chunk of the
    loss, on a CPU the process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a degree splits into heads x context."""

    ulysses: int
    ring: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Measured seconds of rows that hold sequences of one length, at one degree."""

    lengths: tuple[int, ...]
    """Tokens of each of a row's sequences, ascending."""
    seconds_per_token: tuple[float, ...]
    """Of the group, exchange included, the micro-batch's fixed cost apart; one for each length."""

    def at(self, lengths: FloatArray) -> FloatArray:
        """Seconds a token at these lengths: between two measured ones on a line over the logarithm of the length."""
        return np.asarray(np.interp(np.log(lengths), np.log(self.lengths), self.seconds_per_token))


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
    tables: Mapping[int, Table] = field(default_factory=dict)
    """By degree, where two terms do not fit: for `group_table_s`; no part of a plan's predicted_s."""
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
        if not 0 <= self.memory.unsharded_bytes <= self.memory.model_state_bytes:
            raise ValueError(
                f"unsharded_bytes={self.memory.unsharded_bytes} must be from 0 to "
                f"model_state_bytes={self.memory.model_state_bytes}, whose part it is; correct one"
            )

    def require_costs(self) -> None:
        """Refuses a profile in which nothing but the exchange takes any time.

        Raises:
            ValueError: quadratic_s, linear_s and fixed_s are all 0.
        """
        if self.compute.quadratic_s == self.compute.linear_s == self.compute.fixed_s == 0:
            raise ValueError(f"{self.name}: quadratic_s, linear_s and fixed_s are all 0; give a profile with costs")

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

    def group_table_s(self, degree: int, lengths: Sequence[int], policy: str | None = None) -> float:
        """Seconds of a group by the measured table of its degree; by the formula where there is none."""
        if degree not in self.tables:
            return self.group_s(degree, lengths, policy)
        tokens = np.asarray(lengths, dtype=np.float64)
        seconds = float((self.table_s_per_token(degree, tokens) * tokens).sum())
        if policy:
            work_s = float(((self.compute.quadratic_s * tokens + self.compute.linear_s) * tokens).sum())
            seconds += (self.memory.policies[policy].compute_factor - 1.0) * work_s / degree
        return seconds

    def table_s_per_token(self, degree: int, tokens: FloatArray) -> FloatArray:
        """(n,) seconds a token by the table of a degree at (n,) lengths.

        Beyond the longest length measured, attention goes on growing as the formula says.
        """
        table = self.tables[degree]
        beyond = np.maximum(tokens - table.lengths[-1], 0.0) * self.compute.quadratic_s / degree
        return np.asarray(table.at(tokens) + beyond)

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
        """The most tokens that a group of `degree` ranks can hold, but for what is beyond any batch."""
        room_bytes = self.memory.memory_bytes - self.memory.model_state_bytes
        held = room_bytes * degree // self.activation_bytes_per_token(policy)
        return int(held) if held < MOST_TOKENS else MOST_TOKENS

    def degree_text(self, degree: int) -> str:
        """A degree for people: "8", or "64 (32x2)", ulysses x ring, where it is not Ulysses alone."""
        layout = self.layouts.get(degree)
        return str(degree) if layout is None or layout.ring == 1 else f"{degree} ({layout.ulysses}x{layout.ring})"

    # ---- other clusters

    def for_devices(self, num_devices: int) -> Profile:
        """This model's profile on another number of devices of the same kind, e.g. to plan for half the cluster.

        Model states but for `unsharded_bytes` are taken as sharded over all devices (ZeRO-3), so each device's share
        changes in proportion, and with it the optimizer's step; degrees above `num_devices` go, and none is added:
        their exchange is not known. Other seconds, bandwidths and the size of a node stay. What was assumed is appended
        to `provenance["assumptions"]`.

        Raises:
            ValueError: no degree is left, or the model states no longer fit.
        """
        if not 1 <= num_devices <= MOST_DEVICES:
            raise ValueError(f"num_devices={num_devices} must be from 1 to {MOST_DEVICES:,}; give their number")
        if num_devices == self.num_devices:
            return self
        degrees = tuple(d for d in self.sp_degrees if d <= num_devices)
        if not degrees:
            raise ValueError(
                f"num_devices={num_devices} is below every degree of sp_degrees={list(self.sp_degrees)}; use more"
            )
        whole_bytes = self.memory.unsharded_bytes
        whole = f" but for unsharded_bytes={whole_bytes}, which each holds" if whole_bytes else ""
        assumption = (
            f"for {num_devices} devices from a profile of {self.num_devices}: model_state_bytes sharded evenly over "
            f"all devices{whole}{'' if self.optimizer_s is None else ', optimizer_s in proportion'}; fixed_s, "
            f"bandwidths and latencies unchanged; no degree above {degrees[-1]}; "
            f"{min(self.devices_per_node, num_devices)} devices a node"
        )
        shared_bytes = (self.memory.model_state_bytes - whole_bytes) * self.num_devices
        if self.memory.memory_bytes <= whole_bytes + shared_bytes / num_devices:
            raise ValueError(self._too_few(num_devices, shared_bytes))
        return replace(
            self,
            num_devices=num_devices,
            devices_per_node=min(self.devices_per_node, num_devices),
            sp_degrees=degrees,
            memory=replace(self.memory, model_state_bytes=whole_bytes + shared_bytes / num_devices),
            optimizer_s=None if self.optimizer_s is None else self.optimizer_s * self.num_devices / num_devices,
            provenance={
                **self.provenance,
                "assumptions": [*self.provenance.get("assumptions", []), assumption],
            },
        )

    def _too_few(self, num_devices: int, shared_bytes: float) -> str:
        """Why the model states do not fit on so many devices, and how many they need."""
        room_bytes = self.memory.memory_bytes - self.memory.unsharded_bytes
        held_bytes = self.memory.unsharded_bytes + shared_bytes / num_devices
        return (
            f"num_devices={num_devices}: model_state_bytes={int(held_bytes)} a device, of profile {self.name!r} of "
            f"{self.num_devices}, leave nothing for activations in memory_bytes={int(self.memory.memory_bytes)}; use "
            f"at least {int(shared_bytes // room_bytes) + 1} devices"
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
        """The profile of a flexsp-profile/1 document; `where` names it in errors."""
        from flexsp.profile_file import profile_from_json

        return profile_from_json(document, where)

    def to_json(self) -> dict[str, Any]:
        """The flexsp-profile/1 document of this profile."""
        from flexsp.profile_file import profile_to_json

        return profile_to_json(self)
