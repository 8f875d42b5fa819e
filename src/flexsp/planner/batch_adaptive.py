"""One degree per global batch, the best one (BatchAda of arXiv 2412.01523)."""

from __future__ import annotations

import time

from flexsp.lengths import LengthArray
from flexsp.planner.assemble import assemble, infeasible, too_long
from flexsp.planner.best_fit import pack_one_degree
from flexsp.planner.degrees import usable_degrees
from flexsp.plans import Plan
from flexsp.profile import Profile


def plan_batch_adaptive(lengths: LengthArray, profile: Profile) -> Plan:
    """Packs the batch once for every degree that holds its longest sequence and keeps the fastest.

    Args:
        lengths: (K,) tokens.
        profile: the cost model.
    """
    began = time.perf_counter()
    usable = usable_degrees(profile)
    if reason := too_long(lengths, profile, usable):
        return infeasible("batch-adaptive", lengths, profile, reason, time.perf_counter() - began)
    longest = int(lengths.max())
    candidates = [
        pack_one_degree(lengths, profile, degree) for degree in usable if profile.capacity_tokens(degree) >= longest
    ]
    _, micro_batches = min(candidates, key=lambda candidate: candidate[0])
    return assemble("batch-adaptive", lengths, profile, micro_batches, time.perf_counter() - began)
