"""One degree for the whole run: what users of Ulysses or context parallelism have today."""

from __future__ import annotations

import time

from flexsp.lengths import LengthArray
from flexsp.planner.assemble import assemble, infeasible, too_long
from flexsp.planner.best_fit import pack_one_degree
from flexsp.planner.degrees import usable_degrees
from flexsp.plans import Plan
from flexsp.profile import Profile


def plan_static(
    lengths: LengthArray, profile: Profile, sp_degree: int | None = None, max_length: int | None = None
) -> Plan:
    """Every group has one degree; sequences are packed by best fit.

    Args:
        lengths: (K,) tokens.
        profile: the cost model.
        sp_degree: the degree; by default the least that holds the context limit.
        max_length: the context limit in tokens; by default the longest of `lengths`.

    Raises:
        ValueError: `sp_degree` is not in the profile's sp_degrees.
    """
    began = time.perf_counter()
    usable = usable_degrees(profile)
    if sp_degree is not None and sp_degree not in usable:
        raise ValueError(
            f"sp_degree={sp_degree} is not among the profile's usable degrees {usable}; choose one of them"
        )
    degrees = usable if sp_degree is None else [sp_degree]
    if reason := too_long(lengths, profile, degrees):
        return infeasible("static", lengths, profile, reason, time.perf_counter() - began)
    if sp_degree is None:
        sp_degree = static_degree(profile, max(max_length or 0, int(lengths.max())))
    _, micro_batches = pack_one_degree(lengths, profile, sp_degree)
    return assemble("static", lengths, profile, micro_batches, time.perf_counter() - began)


def static_degree(profile: Profile, max_length: int, policy: str | None = None) -> int:
    """The least degree of which a group holds a sequence of `max_length` tokens, under a policy of the profile or none.

    Raises:
        ValueError: no degree does.
    """
    usable = usable_degrees(profile)
    for degree in usable:
        if profile.capacity_tokens(degree, policy) >= max_length:
            return degree
    most = max((profile.capacity_tokens(d, policy) for d in usable), default=0)
    raise ValueError(
        f"max_length={max_length} tokens fit into no group: the most that any degree of {usable} holds is {most}; "
        f"lower the limit, allow a higher degree, or give each device more memory"
    )
