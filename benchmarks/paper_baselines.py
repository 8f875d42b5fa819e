"""The published solver's own baselines, so that what differs from ours can be told apart from what differs in data.

Rules, after `solve_homo_sp_ffd_bfd_globalbatch` of the published solver (Hetu-Galvatron, branch flexsp), written anew:
best-fit decreasing into 0.9 of a group's memory; groups share a micro-batch in the order in which they were opened;
a group that would be empty takes one sequence of the last group that has several; and from degree 16 on the last
micro-batch is evened out, if it had empty groups. The static baseline has degree 64 whatever the limit; the adaptive
one the fastest degree of each batch. On twelve batches of its lengths these functions give the seconds that the
solver's own code predicts, to seven digits.
"""

from __future__ import annotations

import math

import numpy as np
import paper_claims as claims

from flexsp.lengths import LengthArray
from flexsp.profile import Profile

Groups = list[list[int]]
EVENED_FROM = 16
"""Degree."""


def static_s(lengths: LengthArray, profile: Profile) -> float:
    """Predicted seconds of a step under the published static baseline."""
    degree = min(claims.PUBLISHED_SP_DEGREE, profile.sp_degrees[-1])
    return step_s(micro_batches(lengths, profile, degree), lengths, profile, degree)


def adaptive(lengths: LengthArray, profile: Profile) -> tuple[float, int]:
    """Predicted seconds of a step under the published batch-adaptive baseline, and its degree."""
    longest = int(lengths.max())
    fitting = [degree for degree in profile.sp_degrees if profile.capacity_tokens(degree) >= longest]
    return min((step_s(micro_batches(lengths, profile, d), lengths, profile, d), d) for d in fitting)


def step_s(rounds: list[Groups], lengths: LengthArray, profile: Profile, degree: int) -> float:
    return sum(
        profile.compute.fixed_s + max(profile.group_s(degree, lengths[group].tolist()) for group in groups if group)
        for groups in rounds
    )


def micro_batches(lengths: LengthArray, profile: Profile, degree: int) -> list[Groups]:
    """Groups of one degree by micro-batch; a group may be empty."""
    capacity = max(profile.capacity_tokens(1) * degree * claims.PUBLISHED_FILL, int(lengths.max()))
    groups = _best_fit(lengths, int(capacity))
    at_once = profile.num_devices // degree
    filled = len(groups)
    groups += [[] for _ in range(-filled % at_once)]
    for taker in range(filled, len(groups)):
        giver = next((group for group in reversed(groups[:filled]) if len(group) > 1), None)
        if giver is not None:
            groups[taker].append(giver.pop(0))
    rounds = [groups[at : at + at_once] for at in range(0, len(groups), at_once)]
    if degree >= EVENED_FROM and filled < len(groups):
        _even_out(rounds[-1], lengths, int(capacity))
    return rounds


def _best_fit(lengths: LengthArray, capacity: int) -> Groups:
    """Longest first, each into the group where the least room is left; members in the order of the batch."""
    groups: Groups = []
    rooms = np.full(len(lengths), math.inf)  # of the groups that are open
    for index in np.argsort(-lengths, kind="stable").tolist():
        fits = rooms[: len(groups)] >= lengths[index]
        if fits.any():
            group = int(np.argmin(np.where(fits, rooms[: len(groups)], math.inf)))
        else:
            group = len(groups)
            groups.append([])
            rooms[group] = capacity
        groups[group].append(index)
        rooms[group] -= lengths[index]
    return [sorted(group) for group in groups]


def _even_out(groups: Groups, lengths: LengthArray, capacity: int) -> None:
    """Moves sequences to later groups until these hold the average, as long as the giver holds more than that."""
    held = [int(lengths[group].sum()) for group in groups]
    average = sum(held) // len(groups)
    for taker in range(1, len(groups)):
        for giver in range(taker):
            for index in sorted(groups[giver]):
                if held[taker] >= average or held[giver] <= average or len(groups[giver]) == 1:
                    break
                tokens = int(lengths[index])
                if held[taker] + tokens <= capacity:
                    groups[giver].remove(index)
                    groups[taker].append(index)
                    held[giver] -= tokens
                    held[taker] += tokens
