"""Planners: lengths and a profile become a plan. Pure functions; one file per idea.

A planner is any function `lengths, profile, **options -> Plan`. Those here are known by name; one of your own is
named by `module:function`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any, cast

from flexsp.lengths import Lengths, as_lengths
from flexsp.planner.batch_adaptive import plan_batch_adaptive
from flexsp.planner.exact import plan_exact
from flexsp.planner.flex import plan_flex
from flexsp.planner.flexible_cp import plan_flexible_cp
from flexsp.planner.megatron_dcp import plan_megatron_dcp
from flexsp.planner.milp import plan_milp
from flexsp.planner.static import plan_static
from flexsp.plans import Plan
from flexsp.profile import Profile

Planner = Callable[..., Plan]

PLANNERS: dict[str, Planner] = {
    "flex": plan_flex,
    "batch-adaptive": plan_batch_adaptive,
    "static": plan_static,
    "milp": plan_milp,
    "exact": plan_exact,
    "megatron-dcp": plan_megatron_dcp,
    "flexible-cp": plan_flexible_cp,
}

COMPARED = ("flex", "milp", "batch-adaptive", "megatron-dcp", "flexible-cp", "static")
"""What `--planners all` of `flexsp simulate` means: every planner but `exact`, which is for small cases alone."""


def plan(lengths: Lengths, profile: Profile, planner: str = "flex", **options: Any) -> Plan:
    """Plans one global batch.

    Args:
        lengths: (K,) tokens of each sequence.
        profile: the cost model and the cluster.
        planner: a name in `PLANNERS`, or `module:function` of your own.
        options: for the planner, e.g. `sp_degree=8` for `static`.

    Returns:
        A plan; where nothing legal exists its status is infeasible and its reason says why.

    Raises:
        ValueError: malformed lengths, an unknown planner or an option it does not have.
    """
    function = find_planner(planner)
    accepted = inspect.signature(function).parameters
    for name in options:
        if name not in accepted and not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
            raise ValueError(f"planner={planner!r} has no option {name!r}; it has {sorted(set(accepted) - _COMMON)}")
    if planner in PLANNERS:
        return function(as_lengths(lengths), profile, **options)
    try:
        found = function(as_lengths(lengths), profile, **options)
    except Exception as error:  # of the user's own code
        said = " ".join(str(error).split())
        raise ValueError(f"planner={planner!r} failed ({type(error).__name__}: {said}); correct it") from error
    if not isinstance(found, Plan):
        raise ValueError(f"planner={planner!r} returned {type(found).__name__} instead of a flexsp.Plan; return a Plan")
    return found


_COMMON = {"lengths", "profile"}


def find_planner(name: str) -> Planner:
    """The planner called `name`.

    Raises:
        ValueError: there is none.
    """
    if name in PLANNERS:
        return PLANNERS[name]
    module, colon, function = name.partition(":")
    if not colon:
        raise ValueError(f"planner={name!r} is unknown; choose one of {', '.join(PLANNERS)}, or name module:function")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"planner={name!r} cannot be imported ({error}); name an importable module:function") from None
    if not callable(found):
        raise ValueError(f"planner={name!r} is a {type(found).__name__}; name a function of lengths and profile")
    return cast(Planner, found)
