"""Where a profile's degrees cross: from which length a degree pays, from which memory needs it, and what it costs.

All of it is about one sequence alone in a group of degree d. Its time is a quadratic of its length s (see
`flexsp.profile`), and so is what it saves against a lower degree e:

    saving(s) = group_s(e, [s]) - group_s(d, [s])
              = compute_factor * (1/e - 1/d) * (quadratic_s * s^2 + linear_s * s)
                + (exchange(e) - exchange(d)) * s + latency(e) - latency(d)

Crossovers are the formula's. Where a profile has measured tables beside it, a cost says what they say too.

The coefficient of s^2 is never negative, so the lengths at which d saves nothing are one interval, and beyond its upper
end d is sooner for good. Where the interval has no upper end, d is never sooner for good.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass

from flexsp.profile import Profile

LEAST_SAVING = 1e-9
"""A share of the time: a degree that saves less is not sooner. Two degrees that the formula makes equal differ by
rounding alone, and must not cross because of it."""

MOST_TOKENS = 2**40
"""Lengths are searched up to here, beyond what any memory holds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Crossover:
    """From where one degree is worth having, under one policy."""

    sp_degree: int
    policy: str | None
    """A name of the profile's policies; None is without one."""
    capacity_tokens: int
    """The most tokens that the degree holds."""
    pays_from_tokens: int | None
    """The shortest length from which on the degree is sooner than every lower one, whether memory holds it or not;
    1 is always, None is never."""
    needed_from_tokens: int | None
    """The shortest length that the degree holds and no lower one does; None where there is no such length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What one sequence alone in a group costs, under one policy."""

    sp_degree: int
    policy: str | None
    tokens: int
    """The length of the sequence."""
    token_s: float
    """Seconds of the group for each token, by the formula."""
    table_token_s: float | None
    """The same by the measured table of the degree; None where it has none."""
    exchange_share: float
    """Share of the exchange in the group's time by the formula, from 0 to 1."""

    @property
    def best_token_s(self) -> float:
        """Seconds of the group for each token: by the table where there is one."""
        return self.token_s if self.table_token_s is None else self.table_token_s

    @property
    def token_device_s(self) -> float:
        """The price: seconds of one device for each token, by the table where there is one."""
        return self.sp_degree * self.best_token_s


def policies(profile: Profile) -> tuple[str | None, ...]:
    """None and the profile's policies, those that hold more tokens later."""
    by_bytes = sorted(profile.memory.policies, key=profile.activation_bytes_per_token, reverse=True)
    return (None, *by_bytes)


def longest_tokens(profile: Profile) -> int:
    """The longest sequence that some degree holds under some policy."""
    return max(profile.capacity_tokens(profile.sp_degrees[-1], policy) for policy in policies(profile))


def powers_of_four(profile: Profile) -> tuple[int, ...]:
    """Lengths from 1K up to the longest that the profile holds; where that is below 1K, from 1 token."""
    lengths = [4**exponent for exponent in range(20) if 4**exponent <= longest_tokens(profile)]
    return tuple([length for length in lengths if length >= 1024] or lengths or [1024])


def crossovers(profile: Profile, policy: str | None = None) -> tuple[Crossover, ...]:
    """Each degree's crossovers under `policy`, ascending by degree."""
    found = []
    for index, degree in enumerate(profile.sp_degrees):
        lower = profile.sp_degrees[:index]
        capacity_tokens = profile.capacity_tokens(degree, policy)
        lower_tokens = max((profile.capacity_tokens(each, policy) for each in lower), default=0)
        found.append(
            Crossover(
                sp_degree=degree,
                policy=policy,
                capacity_tokens=capacity_tokens,
                pays_from_tokens=_pays_from_tokens(profile, degree, lower, policy),
                needed_from_tokens=lower_tokens + 1 if capacity_tokens > lower_tokens else None,
            )
        )
    return tuple(found)


def cost(profile: Profile, degree: int, tokens: int, policy: str | None = None) -> Cost | None:
    """The cost of a sequence of `tokens` tokens under `policy`; None where the degree does not hold it."""
    if tokens > profile.capacity_tokens(degree, policy):
        return None
    group_s = profile.group_s(degree, [tokens], policy)
    exchange_s = tokens * profile.exchange_s_per_token(degree) + profile.latency_s(degree)
    by_table = degree in profile.tables
    return Cost(
        sp_degree=degree,
        policy=policy,
        tokens=tokens,
        token_s=group_s / tokens,
        table_token_s=profile.group_table_s(degree, [tokens], policy) / tokens if by_table else None,
        exchange_share=exchange_s / group_s if group_s else 0.0,
    )


def least_cost(profile: Profile, degree: int, tokens: int) -> Cost | None:
    """The cost under the policy that is soonest, without one where that is as soon; None where no policy holds it."""
    found = [each for policy in policies(profile) if (each := cost(profile, degree, tokens, policy)) is not None]
    return min(found, key=lambda each: each.token_s, default=None)  # the first of equals, and no policy is the first


def formula_over_table(profile: Profile, degree: int) -> dict[int, float]:
    """What the formula says over what was measured, at each length of the degree's table.

    A table is of rows full of sequences of one length, so the formula is taken for such rows, as long as the longest.
    """
    table = profile.tables[degree]
    found = {}
    for tokens, measured_s in zip(table.lengths, table.seconds_per_token, strict=True):
        row_tokens = table.lengths[-1] // tokens * tokens
        work_s = profile.sequence_work_s(tokens) / tokens / degree
        formula_s = work_s + profile.exchange_s_per_token(degree) + profile.latency_s(degree) / row_tokens
        if measured_s > 0:
            found[tokens] = formula_s / measured_s
    return found


def _pays_from_tokens(profile: Profile, degree: int, lower: tuple[int, ...], policy: str | None) -> int | None:
    shortest = 1
    for each in lower:
        tokens = _sooner_from_tokens(profile, degree, each, policy)
        if tokens is None:
            return None
        shortest = max(shortest, tokens)
    return shortest


def _sooner_from_tokens(profile: Profile, degree: int, lower: int, policy: str | None) -> int | None:
    """The shortest length from which on `degree` is sooner than `lower`; None where there is none."""

    def sooner(tokens: int) -> bool:
        lower_s = profile.group_s(lower, [tokens], policy)
        return profile.group_s(degree, [tokens], policy) < lower_s * (1 - LEAST_SAVING)

    # The saving is least at its vertex, or at one token, and grows from there on: what is not sooner there is the
    # beginning of a range that bisection can split.
    vertex = _vertex_tokens(profile, degree, lower, policy)
    begin = next((tokens for tokens in (vertex, vertex + 1) if not sooner(tokens)), None)
    if begin is None:
        return 1
    lengths = range(begin, MOST_TOKENS + 1)
    index = bisect_left(lengths, True, key=sooner)
    return lengths[index] if index < len(lengths) else None


def _vertex_tokens(profile: Profile, degree: int, lower: int, policy: str | None) -> int:
    """The whole length at, or next below, which `degree` saves least against `lower`."""
    factor = profile.memory.policies[policy].compute_factor if policy else 1.0
    share = factor * ((1 - LEAST_SAVING) / lower - 1 / degree)
    square = share * profile.compute.quadratic_s
    linear = (
        share * profile.compute.linear_s
        + (1 - LEAST_SAVING) * profile.exchange_s_per_token(lower)
        - profile.exchange_s_per_token(degree)
    )
    if linear >= 0:
        return 1  # the saving grows all the way
    if square <= 0:
        return MOST_TOKENS  # it shrinks all the way
    return max(1, int(min(-linear / (2 * square), MOST_TOKENS)))
