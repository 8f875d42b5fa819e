"""Smaller groups where nothing is lost: of two plans of the same predicted time, the one that exchanges less.

The slowest group sets a micro-batch's time; the others often have time to spare, and a search that looks at the time
alone leaves them at a higher degree than they need. Here every group of a power-of-two degree is halved in place, its
sequences divided longest first, as long as both halves hold theirs and end within the micro-batch's time. That takes
less of the network and fewer device-seconds, which the cost model does not charge to others but real machines do.
Cost: O(K log N).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from flexsp.lengths import LengthArray
from flexsp.planner.assemble import GroupChoice, MicroBatchChoice
from flexsp.planner.placement import legal_starts, place
from flexsp.profile import Profile


def loosened(choices: Sequence[MicroBatchChoice], lengths: LengthArray, profile: Profile) -> list[MicroBatchChoice]:
    """The same micro-batches, none slower, with groups halved where that costs no time.

    Args:
        choices: micro-batches that have a placement.
        lengths: (K,) tokens.
        profile: the cost model.
    """
    tokens: list[int] = lengths.tolist()
    return [_loosened(choice, tokens, profile) for choice in choices]


def _loosened(choice: MicroBatchChoice, tokens: list[int], profile: Profile) -> MicroBatchChoice:
    starts = choice.starts
    if starts is None:
        starts = place([degree for degree, _ in choice.groups], profile.num_devices, profile.devices_per_node)
    assert starts is not None
    policy = choice.policy
    limit_s = max(profile.group_s(degree, (tokens[i] for i in held), policy) for degree, held in choice.groups)
    placed = [
        part
        for start, (degree, held) in zip(starts, choice.groups, strict=True)
        for part in _halves(start, degree, held, limit_s, policy, tokens, profile)
    ]
    return replace(choice, groups=[group for _, group in placed], starts=[start for start, _ in placed])


def _halves(
    start: int, degree: int, held: list[int], limit_s: float, policy: str | None, tokens: list[int], profile: Profile
) -> Iterator[tuple[int, GroupChoice]]:
    """The group at `start`, or the groups that its halves become."""
    half = degree // 2
    power_of_two = degree & (degree - 1) == 0
    if power_of_two and half in profile.sp_degrees:
        legal = legal_starts(half, profile.num_devices, profile.devices_per_node)
        parts = _divided(held, half, limit_s, policy, tokens, profile)
        if parts is not None and start in legal and start + half in legal:
            for at, part in zip((start, start + half), parts, strict=True):
                if part:
                    yield from _halves(at, half, part, limit_s, policy, tokens, profile)
            return
    yield start, (degree, held)


def _divided(
    held: list[int], degree: int, limit_s: float, policy: str | None, tokens: list[int], profile: Profile
) -> tuple[list[int], list[int]] | None:
    """The sequences in two groups of `degree`, longest first to the less busy; None where one would be late or full."""
    factor = profile.memory.policies[policy].compute_factor if policy else 1.0
    exchange_s = profile.exchange_s_per_token(degree)
    parts: tuple[list[int], list[int]] = ([], [])
    busy_s, used = [profile.latency_s(degree)] * 2, [0, 0]
    for i in sorted(held, key=lambda i: -tokens[i]):
        to = 0 if busy_s[0] <= busy_s[1] else 1
        busy_s[to] += factor * profile.sequence_work_s(tokens[i]) / degree + tokens[i] * exchange_s
        used[to] += tokens[i]
        parts[to].append(i)
        if busy_s[to] > limit_s:
            return None
    if not all(profile.fits(degree, u, policy) for u in used):
        return None
    return parts
