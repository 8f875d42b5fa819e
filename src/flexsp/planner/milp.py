"""The paper's planner: sequence blaster, DP bucketing, and a MILP for each micro-batch (arXiv 2412.01523, section 4).

For the least count of micro-batches that memory allows and the four after it: sort the sequences, cut the row into that
many chunks of balanced tokens (`blaster`), bucket each chunk's lengths, and choose groups and assignment by MILP
(`milp_model`). The count whose micro-batches take least together is the plan. It is the yardstick that `flex` is held
against; its MILPs take seconds each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from flexsp.lengths import LengthArray, lengths_sha256
from flexsp.planner.assemble import GroupChoice, assemble, infeasible, too_long
from flexsp.planner.blaster import BUCKETINGS, balanced_chunks, buckets
from flexsp.planner.degrees import usable_degrees
from flexsp.planner.milp_model import solve
from flexsp.planner.placement import place
from flexsp.planner.tables import Ints, sorted_order, tables
from flexsp.plans import Plan, Status
from flexsp.profile import Profile

COUNTS = 5
"""The least count of micro-batches and the four after it."""
LEAST_S = 0.2
"""A MILP that has no more than this is not begun where there are groups already; else it gets this."""


def plan_milp(
    lengths: LengthArray,
    profile: Profile,
    time_limit_s: float = 60.0,
    sort: bool = True,
    bucketing: str = "dp",
    num_buckets: int = 16,
    warm_start: bool = True,
) -> Plan:
    """The paper's formulation; policies of the profile are not used, as in the paper.

    The plan's `extra["milp"]` reports the token estimation error (tokens that bucketing adds over tokens, the paper's
    Table 4), and how many MILPs were solved and how many of them to proven optimality.

    Args:
        lengths: (K,) tokens.
        profile: the cost model.
        time_limit_s: for all MILPs together; what one leaves is for those after it.
        sort: False leaves the order as it is (the paper's ablation).
        bucketing: `dp`, `naive` (equal widths) or `none`.
        num_buckets: Q.
        warm_start: whether a MILP begins with the groups that `flex` would make of its chunk.

    Raises:
        ValueError: an option is out of its range, or CP-SAT is not installed.
    """
    began = time.perf_counter()
    if bucketing not in BUCKETINGS:
        raise ValueError(f"bucketing={bucketing!r} is unknown; choose one of {', '.join(BUCKETINGS)}")
    if num_buckets < 1:
        raise ValueError(f"num_buckets={num_buckets} must be at least 1; give a positive integer")
    if not time_limit_s > 0:
        raise ValueError(f"time_limit_s={time_limit_s} must be above 0; give seconds")
    degrees = usable_degrees(profile)
    if reason := too_long(lengths, profile, degrees):
        return infeasible("milp", lengths, profile, reason, time.perf_counter() - began)
    order = sorted_order(lengths) if sort else np.arange(len(lengths))
    room_tokens = profile.capacity_tokens(1) * profile.num_devices
    fewest = max(1, math.ceil(int(lengths.sum()) / room_tokens))
    run = _Run(lengths, profile, degrees, began + time_limit_s, bucketing, num_buckets, warm_start)

    counts = list(range(fewest, min(fewest + COUNTS, len(lengths) + 1)))
    chunked = {count: [order[held] for held in balanced_chunks(lengths[order], count)] for count in counts}
    best_s, best = math.inf, None
    if warm_start:
        best_s = min(run.seconds(run.begun(chunked[count])) for count in counts)
    # A count whose fixed costs and work over devices alone take longer cannot be the best: no time for it.
    area_s = float(tables(lengths, profile, degrees).area_s.sum()) / profile.num_devices
    worthwhile = [count for count in counts if count * profile.compute.fixed_s + area_s <= best_s]
    best_s, chosen = math.inf, fewest
    for number, count in enumerate(worthwhile):
        micro_batches = run.micro_batches(chunked[count], 1 / (len(worthwhile) - number))
        if run.seconds(micro_batches) < best_s:
            best_s, best, chosen = run.seconds(micro_batches), micro_batches, count
    solve_s = time.perf_counter() - began
    if best is None:
        return _unknown(lengths, profile, solve_s, f"none of the counts {counts} of micro-batches was solved")
    plan = assemble("milp", lengths, profile, best, solve_s)
    said = {
        "token_error": run.error(chunked[chosen]),
        "bucketing": bucketing,
        "solved": run.solved,
        "proven": run.proven,
    }
    return replace(plan, extra={"milp": said})


class _Run:
    """The MILPs of one batch and what they share."""

    def __init__(
        self,
        lengths: LengthArray,
        profile: Profile,
        degrees: list[int],
        deadline: float,
        bucketing: str,
        num_buckets: int,
        warm_start: bool,
    ) -> None:
        self.lengths, self.profile, self.degrees = lengths, profile, degrees
        self.deadline, self.bucketing, self.num_buckets, self.warm_start = deadline, bucketing, num_buckets, warm_start
        self.solved = self.proven = 0

    def micro_batches(self, chunks: Sequence[Ints], share: float) -> list[list[GroupChoice]] | None:
        """Groups for every chunk, within this share of the time left; None where one has none."""
        end = time.perf_counter() + share * max(0.0, self.deadline - time.perf_counter())
        found = []
        for number, chunk in enumerate(chunks):
            left_s = max(LEAST_S, (end - time.perf_counter()) / (len(chunks) - number))
            groups = self._groups(chunk, left_s)
            if groups is None:
                return None
            found.append([(degree, chunk[members].tolist()) for degree, members in groups])
        return found

    def begun(self, chunks: Sequence[Ints]) -> list[list[GroupChoice]] | None:
        """The groups that the MILPs of these chunks begin with; None where one has none."""
        found = []
        for chunk in chunks:
            groups = self._warm(self._represented(chunk))
            if groups is None:
                return None
            found.append([(degree, chunk[members].tolist()) for degree, members in groups])
        return found

    def seconds(self, micro_batches: list[list[GroupChoice]] | None) -> float:
        """Predicted time of these micro-batches; infinite where there are none."""
        if micro_batches is None:
            return math.inf
        return sum(
            self.profile.compute.fixed_s + max(self.profile.group_s(d, self.lengths[members]) for d, members in groups)
            for groups in micro_batches
        )

    def error(self, chunks: Sequence[Ints]) -> float:
        """Tokens that bucketing adds, relative to the tokens there are."""
        added = sum(int((self._represented(chunk) - self.lengths[chunk]).sum()) for chunk in chunks)
        return added / int(self.lengths.sum())

    def _groups(self, chunk: Ints, time_limit_s: float) -> list[GroupChoice] | None:
        represented = self._represented(chunk)
        warm = self._warm(represented) if self.warm_start else None
        if warm and time_limit_s <= LEAST_S:
            return warm
        solved = solve(represented, self.profile, self.degrees, time_limit_s, warm)
        self.solved += 1
        self.proven += solved.status is Status.OPTIMAL
        groups = solved.groups or warm
        if not groups:
            return None
        n, per_node = self.profile.num_devices, self.profile.devices_per_node
        placed = place([degree for degree, _ in groups], n, per_node)  # (20) counts ranks and knows no places
        return groups if placed is not None else None

    def _represented(self, chunk: Ints) -> Ints:
        """Lengths by which the chunk's sequences are represented; a bucket's top must fit a group as well."""
        represented = buckets(self.lengths[chunk], self.num_buckets, self.bucketing)
        return np.minimum(represented, max(self.profile.capacity_tokens(d) for d in self.degrees))

    def _warm(self, represented: Ints) -> list[GroupChoice] | None:
        """The groups that `flex` makes of one micro-batch, positions in the chunk; None where it finds none."""
        from flexsp.planner.packing import fill, fit_all, space_for

        plain = replace(self.profile, memory=replace(self.profile.memory, policies={}))
        t = tables(represented, plain, self.degrees)
        space, order, where = space_for(t), np.arange(len(represented)), np.empty(len(represented), dtype=np.int64)
        best_s, target_s, best_mode = math.inf, 0.0, 0
        for mode in range(len(self.degrees)):
            slowest_s, reached_s = fit_all(t, space, order, len(order), mode, 1e9, -20, where)
            if slowest_s < best_s:
                best_s, target_s, best_mode = slowest_s, reached_s, mode
        if best_s == math.inf:
            return None
        fill(t, space, order, len(order), target_s, best_mode, where)
        position, degree_of = sorted_order(represented), np.repeat(t.degrees, t.at_once)
        held: dict[int, list[int]] = {}
        for i, g in enumerate(where.tolist()):
            held.setdefault(g, []).append(int(position[i]))
        groups = [(int(degree_of[g]), members) for g, members in held.items()]
        return sorted(groups, key=lambda group: (-group[0], -int(represented[group[1]].sum())))


def _unknown(lengths: LengthArray, profile: Profile, solve_s: float, reason: str) -> Plan:
    return Plan(
        num_devices=profile.num_devices,
        micro_batches=(),
        planner="milp",
        lengths_sha256=lengths_sha256(lengths),
        status=Status.UNKNOWN,
        reason=f"{reason}; give it more time_limit_s or another planner",
        solve_s=solve_s,
    )
