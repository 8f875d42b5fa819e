"""What a document must be, written down a second time: a document that breaks its schema must be refused.

The reverse need not hold: a reader has rules between fields that are not here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class Int:
    least: int | None = None
    most: int = 2**63 - 1


@dataclass(frozen=True)
class Num:
    """A finite number; integers count."""

    least: float = 0.0
    positive: bool = False
    """Above 0, by more than rounding."""
    most: float = 1e30


@dataclass(frozen=True)
class Str:
    among: tuple[str, ...] = ()


@dataclass(frozen=True)
class Bool:
    pass


@dataclass(frozen=True)
class Anything:
    pass


@dataclass(frozen=True)
class Null:
    """`kind`, or null."""

    kind: Any


@dataclass(frozen=True)
class Either:
    kinds: tuple[Any, ...]


@dataclass(frozen=True)
class List:
    of: Any
    ascending: bool = False
    filled: bool = False


@dataclass(frozen=True)
class Map:
    """Any keys; `degrees`: positive integers, each written once."""

    of: Any
    degrees: bool = False


@dataclass(frozen=True)
class Obj:
    required: Mapping[str, Any]
    optional: Mapping[str, Any] = field(default_factory=dict)
    closed: bool = False
    """Whether a key beyond these is a fault."""


def fault(value: Any, kind: Any, where: str = "") -> str | None:
    """The first thing that is wrong with `value`, or None."""
    match kind:
        case Anything():
            return None
        case Null(inner):
            return None if value is None else fault(value, inner, where)
        case Either(kinds):
            return None if any(fault(value, each) is None for each in kinds) else f"{where}: {value!r:.40} is none of"
        case Bool():
            wrong = not isinstance(value, bool)
        case Int(least, most):
            wrong = type(value) is not int or (least is not None and value < least) or value > most
        case Num():
            wrong = _wrong_number(value, kind)
        case Str(among):
            wrong = not isinstance(value, str) or (bool(among) and value not in among)
        case List():
            return _list_fault(value, kind, where)
        case Map(inner, degrees):
            if not isinstance(value, dict):
                return f"{where}: no object"
            if degrees and not all(key.isascii() and key.isdigit() and len(key) < 20 and int(key) > 0 for key in value):
                return f"{where}: a key is no degree"
            if degrees and len({int(key) for key in value}) < len(value):
                return f"{where}: a degree is there twice"
            return next((found for k, v in value.items() if (found := fault(v, inner, f"{where}.{k}"))), None)
        case Obj():
            return _object_fault(value, kind, where)
        case _:
            raise TypeError(kind)
    return f"{where}: {value!r:.40} is no {kind}" if wrong else None


def _wrong_number(value: Any, kind: Num) -> bool:
    if type(value) not in (int, float) or (type(value) is float and not math.isfinite(value)):
        return True
    return value < kind.least or value > kind.most or (kind.positive and value < 1e-30)


def _list_fault(value: Any, kind: List, where: str) -> str | None:
    if not isinstance(value, list):
        return f"{where}: no list"
    if kind.filled and not value:
        return f"{where}: empty"
    for index, item in enumerate(value):
        if found := fault(item, kind.of, f"{where}[{index}]"):
            return found
    if kind.ascending and any(a >= b for a, b in pairwise(value)):
        return f"{where}: does not ascend"
    return None


def _object_fault(value: Any, kind: Obj, where: str) -> str | None:
    if not isinstance(value, dict):
        return f"{where}: no object"
    for key, inner in kind.required.items():
        if key not in value:
            return f"{where}.{key}: missing"
        if found := fault(value[key], inner, f"{where}.{key}"):
            return found
    for key, item in value.items():
        if key in kind.optional:
            if found := fault(item, kind.optional[key], f"{where}.{key}"):
                return found
        elif kind.closed and key not in kind.required:
            return f"{where}.{key}: unknown"
    return None


# ---- the formats

DEGREES = Int(1)
PROFILE = Obj(
    {
        "format": Str(("flexsp-profile/1",)),
        "name": Str(),
        "num_devices": Int(1, 2**17),
        "devices_per_node": Int(1, 2**17),
        "sp_degrees": List(DEGREES, ascending=True, filled=True),
        "compute": Obj({"quadratic_s": Num(), "linear_s": Num(), "fixed_s": Num()}),
        "all_to_all": Obj(
            {"bytes_per_token": Num(), "bandwidth_bytes_per_s": Map(Num(positive=True), degrees=True)},
            {"latency_s": Map(Num(), degrees=True)},
        ),
        "memory": Obj(
            {
                "memory_bytes": Num(positive=True),
                "model_state_bytes": Num(),
                "activation_bytes_per_token": Num(positive=True),
            },
            {
                "unsharded_bytes": Int(0),
                "policies": Map(
                    Obj(
                        {"activation_bytes_per_token": Num(positive=True)},
                        {"compute_factor": Num(positive=True)},
                    )
                ),
            },
        ),
    },
    {
        "layouts": Map(Obj({"ulysses": DEGREES, "ring": DEGREES}), degrees=True),
        "optimizer_s": Null(Num()),
        "provenance": Map(Anything()),
        "tables": Map(
            Obj({"lengths": List(DEGREES, ascending=True, filled=True), "seconds_per_token": List(Num(), filled=True)}),
            degrees=True,
        ),
    },
)
SECONDS = Null(Num())
GROUP = Obj({"ranks": List(Int()), "sequences": List(Int())}, {"predicted_s": SECONDS})
PLAN = Obj(
    {
        "format": Str(("flexsp-plan/1",)),
        "num_devices": DEGREES,
        "micro_batches": List(Obj({"groups": List(GROUP)}, {"predicted_s": SECONDS, "policy": Null(Str())})),
    },
    {
        "planner": Null(Str()),
        "lengths_sha256": Null(Str()),
        "status": Str(("optimal", "feasible", "infeasible", "unknown")),
        "reason": Null(Str()),
        **dict.fromkeys(("predicted_s", "predicted_table_s", "lower_bound_s", "solve_s"), SECONDS),
    },
)
PLAN_ROW = Obj({"step": Int(0), "plan": PLAN})
STATE = Obj(
    {
        "format": Str(("flexsp-checkpoint/1",)),
        "step": Int(0),
        "world_size": Int(1),
        "config": Map(Anything()),
        "schedule": Map(Anything()),
        "profile": PROFILE,
    }
)
SHARE = Num(positive=True, most=1)
FIGURE = Num(positive=True)


def _figure(kind: Any) -> Either:
    return Either((kind, Obj({"value": kind}, {"source": Str()})))


CLUSTER = Obj(
    {
        "name": Str(),
        "device": Str(),
        "devices_per_node": Int(1, 2**17),
        "data_sheet": Obj(
            {
                name: _figure(FIGURE)
                for name in (
                    "memory_bytes", "memory_bytes_per_s", "link_bytes_per_s", "nic_bytes_per_s", "host_bytes_per_s",
                    "bfloat16_flops_per_s", "float32_flops_per_s",
                )
            }
        ),
        "assumed": Obj(
            {
                **{
                    name: _figure(SHARE)
                    for name in (
                        "linear_efficiency", "attention_efficiency", "exchange_link_efficiency",
                        "exchange_nic_efficiency", "gather_link_efficiency", "gather_nic_efficiency", "gather_exposed",
                        "host_efficiency",
                    )
                },
                **{
                    name: _figure(Num())
                    for name in ("exchange_copies", "layer_launch_s", "exchange_launch_s", "exchange_node_s")
                },
            }
        ),
    },
    {"num_devices": Int(1, 2**17), "link_topology": Str(("switch", "mesh"))},
)  # fmt: skip
SIZE = Int(1)
MODEL = Obj(
    {name: SIZE for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")},
    {
        "model_type": Null(Str()),
        "tie_word_embeddings": Null(Bool()),
        **dict.fromkeys(("intermediate_size", "num_key_value_heads", "head_dim", "num_experts"), Null(SIZE)),
    },
)
