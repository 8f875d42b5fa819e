"""The nouns: a plan is micro-batches, a micro-batch is groups, a group is ranks and sequences."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import groupby
from pathlib import Path
from typing import Any

from flexsp import jsonfields as jf

FORMAT = "flexsp-plan/1"


class Status(StrEnum):
    """How planning ended."""

    OPTIMAL = "optimal"  # proven: predicted_s equals the bound
    FEASIBLE = "feasible"  # a legal plan, optimality unproven
    INFEASIBLE = "infeasible"  # proven: no legal plan exists; see reason
    UNKNOWN = "unknown"  # stopped without a plan; see reason


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """One sequence-parallel group inside one micro-batch.

    Nothing is refused here: an illegal plan must be representable for `violations` to say every way in which it is.
    """

    ranks: tuple[int, ...]
    """Global ranks, ascending; their count is the sp_degree."""
    sequences: tuple[int, ...]
    """Indices into the lengths of the global batch; never lengths."""
    predicted_s: float | None = None
    """Seconds of this group by the cost model."""

    @property
    def sp_degree(self) -> int:
        return len(self.ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Groups on disjoint ranks that run at once."""

    groups: tuple[Group, ...]
    predicted_s: float | None = None
    """Seconds by the cost model: the fixed cost and the slowest group."""
    policy: str | None = None
    """Name of an entry of the profile's memory policies, or None."""

    @property
    def sp_degrees(self) -> list[int]:
        return sorted((group.sp_degree for group in self.groups), reverse=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How one global batch runs on `num_devices` ranks."""

    num_devices: int
    micro_batches: tuple[MicroBatch, ...]
    planner: str | None = None
    lengths_sha256: str | None = None
    """Names the lengths that this plan is for; see `flexsp.lengths.lengths_sha256`."""
    status: Status = Status.FEASIBLE
    reason: str | None = None
    """Why there are no micro-batches, where status is infeasible or unknown."""
    predicted_s: float | None = None
    """Seconds of all micro-batches by the cost model."""
    predicted_table_s: float | None = None
    """The same by the profile's measured tables, where it has them."""
    lower_bound_s: float | None = None
    """No legal plan for these lengths and this profile is predicted to take less."""
    solve_s: float | None = None
    """Seconds that planning took."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the file that this version does not know, nested as they were; kept when it is saved."""

    def __post_init__(self) -> None:
        if not self.has_plan and (self.reason is None or self.micro_batches):
            raise ValueError(
                f"status={self.status.value!r} needs a reason and no micro_batches, but there are "
                f"reason={self.reason!r} and {len(self.micro_batches)} micro_batches; correct one of them"
            )

    @property
    def has_plan(self) -> bool:
        """Whether there is something to run."""
        return self.status in (Status.OPTIMAL, Status.FEASIBLE)

    @property
    def gap(self) -> float | None:
        """How far predicted_s can be above the optimum, relative to the bound."""
        if self.predicted_s is None or not self.lower_bound_s:
            return None
        return self.predicted_s / self.lower_bound_s - 1

    def __str__(self) -> str:
        """Degrees by micro-batch, e.g. `<4> <2,1,1>`.

        More than eight groups are counted, `<8,4x14>` being one of 8 and fourteen of 4; so are three or more alike
        micro-batches in a row, `5 x <4>`.
        """
        if not self.has_plan:
            return f"{self.status.value}: {self.reason}"
        texts = [f"<{degrees_text(micro_batch.sp_degrees)}>" for micro_batch in self.micro_batches]
        runs = [(text, len(list(alike))) for text, alike in groupby(texts)]
        return " ".join(f"{count} x {text}" if count > 2 else " ".join([text] * count) for text, count in runs)

    # ---- the file

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Reads a flexsp-plan/1 file, made by a planner or by hand.

        Raises:
            ValueError: the file cannot be read, or a field is missing or wrong; the message names it.
        """
        return cls.from_json(jf.read_object(path), str(path))

    def save(self, path: str | Path) -> None:
        """Writes a flexsp-plan/1 file."""
        jf.write_object(path, self.to_json())

    @classmethod
    def from_json(cls, document: Mapping[str, Any], where: str = "plan") -> Plan:
        found = jf.required(jf.as_object(document, where), "format", where)
        if found != FORMAT:
            raise ValueError(f"{where}: format={jf.short(found)} must be {FORMAT!r}; give a plan file")
        status = document.get("status", Status.FEASIBLE.value)
        if status not in list(Status):
            raise ValueError(f"{where}: status={jf.short(status)} must be one of {', '.join(Status)}; correct it")
        micro_batches = jf.as_list(jf.required(document, "micro_batches", where), f"{where}: micro_batches")
        try:
            plan = cls(
                num_devices=jf.as_integer(jf.required(document, "num_devices", where), f"{where}: num_devices", 1),
                micro_batches=tuple(
                    _micro_batch(entry, f"{where}: micro_batches[{b}]") for b, entry in enumerate(micro_batches)
                ),
                planner=_optional(document, "planner", where, jf.as_string),
                lengths_sha256=_optional(document, "lengths_sha256", where, jf.as_string),
                status=Status(status),
                reason=_optional(document, "reason", where, jf.as_string),
                predicted_s=_optional(document, "predicted_s", where, jf.as_number),
                predicted_table_s=_optional(document, "predicted_table_s", where, jf.as_number),
                lower_bound_s=_optional(document, "lower_bound_s", where, jf.as_number),
                solve_s=_optional(document, "solve_s", where, jf.as_number),
            )
        except ValueError as error:
            text = str(error)
            raise ValueError(text if text.startswith(where) else f"{where}: {text}") from None
        return replace(plan, extra=jf.remainder(document, plan.to_json()))

    def to_json(self) -> dict[str, Any]:
        document: dict[str, Any] = {
            "format": FORMAT,
            "num_devices": self.num_devices,
            "planner": self.planner,
            "lengths_sha256": self.lengths_sha256,
            "status": self.status.value,
            "reason": self.reason,
            "predicted_s": self.predicted_s,
            "lower_bound_s": self.lower_bound_s,
            "solve_s": self.solve_s,
            "micro_batches": [
                {
                    "predicted_s": micro_batch.predicted_s,
                    "policy": micro_batch.policy,
                    "groups": [
                        {
                            "ranks": list(group.ranks),
                            "sequences": list(group.sequences),
                            "predicted_s": group.predicted_s,
                        }
                        for group in micro_batch.groups
                    ],
                }
                for micro_batch in self.micro_batches
            ],
        }
        if self.predicted_table_s is not None:
            document["predicted_table_s"] = self.predicted_table_s
        return jf.merged(document, self.extra)


def degrees_text(degrees: list[int]) -> str:
    """Degrees side by side; more than eight are counted, `8,4x14`."""
    if len(degrees) <= 8:
        return ",".join(str(d) for d in degrees)
    counts = {d: degrees.count(d) for d in degrees}
    return ",".join(str(d) if n == 1 else f"{d}x{n}" for d, n in counts.items())


def _optional(document: Mapping[str, Any], key: str, where: str, read: Any) -> Any:
    value = document.get(key)
    return None if value is None else read(value, f"{where}: {key}")


def _micro_batch(entry: Any, where: str) -> MicroBatch:
    fields = jf.as_object(entry, where)
    groups = jf.as_list(jf.required(fields, "groups", where), f"{where}.groups")
    return MicroBatch(
        groups=tuple(_group(group, f"{where}.groups[{g}]") for g, group in enumerate(groups)),
        predicted_s=_optional(fields, "predicted_s", where, jf.as_number),
        policy=_optional(fields, "policy", where, jf.as_string),
    )


def _group(entry: Any, where: str) -> Group:
    fields = jf.as_object(entry, where)
    integers = {}
    for key in ("ranks", "sequences"):
        values = jf.as_list(jf.required(fields, key, where), f"{where}.{key}")
        integers[key] = tuple(jf.as_integer(value, f"{where}.{key}") for value in values)
    return Group(**integers, predicted_s=_optional(fields, "predicted_s", where, jf.as_number))
