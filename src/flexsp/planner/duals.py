"""The kernels of the lower bound: the value of one choice of prices, and the search for good prices (see `bound`).

Letters: S = classes of sequences, T = time windows, P = policies, D = degrees, W = T + 1 windows, the last of which is
the top micro-batch's own.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from flexsp.planner.jit import kernel
from flexsp.planner.tables import Floats

MOST_NODES = 96


class Relaxation(NamedTuple):
    """What the kernels read: the batch in classes, and the profile."""

    tokens: Floats
    """(S,) the shortest sequence of each class, ascending."""
    work_s: Floats
    """(S,) its seconds of compute on one device."""
    weight: Floats
    """(S,) the class's tokens over those of its shortest sequence."""
    window_s: Floats
    """(T + 1,) ascending ends of the windows, from 0 to infinity."""
    degrees: Floats
    """(D,)"""
    exchange_s: Floats
    """(D,) seconds per token."""
    latency_s: Floats
    """(D,)"""
    capacity: Floats
    """(P, D) tokens."""
    factor: Floats
    """(P,) of compute."""
    num_devices: float
    fixed_s: float


@kernel
def priced(
    x: Relaxation,
    low_s: float,
    high_s: float,
    least: int,
    time_share: Floats,
    mu: float,
    top: float,
    gradient: Floats,
    slopes: Floats,
) -> float:
    """The bound that one choice of prices proves for plans whose slowest micro-batch takes within [low_s, high_s].

    Args:
        least: M, the count of micro-batches that `mu` speaks of.
        time_share: (W, P, D) in [0, 1]: how much of a micro-batch's price is for time, the rest is for memory.
        mu: the price of one micro-batch more, at most fixed_s.
        top: what the top micro-batch's price has in place of fixed_s - mu, at least -low_s.
        gradient: (W, P, D) written: a supergradient by time_share.
        slopes: (2,) written: by mu and by top.

    Returns:
        Seconds; infinite where a sequence fits no micro-batch of at most high_s.
    """
    gradient[:] = 0.0
    num_windows = len(x.window_s) - 1
    by_mu, by_top = least - 1.0, -1.0
    total_s = x.fixed_s - top + mu * (least - 1.0)
    for i in range(len(x.tokens)):
        best_s, at_w, at_p, at_d, at_t, at_a, at_b = math.inf, -1, 0, 0, 0.0, 0.0, 0.0
        for p in range(len(x.factor)):
            for d in range(len(x.degrees)):
                if x.tokens[i] > x.capacity[p, d]:
                    continue
                alone_s = x.factor[p] * x.work_s[i] / x.degrees[d] + x.tokens[i] * x.exchange_s[d]
                latency_s = x.latency_s[d]
                if alone_s + latency_s > high_s:
                    continue
                # Shares of the devices' time and memory, per second of the micro-batch for the first.
                a = x.degrees[d] * alone_s / x.num_devices
                b = x.degrees[d] * x.tokens[i] / (x.capacity[p, d] * x.num_devices)
                for w in range(num_windows + 1):
                    if w < num_windows:
                        begin_s, end_s, price = x.window_s[w], min(x.window_s[w + 1], high_s), x.fixed_s - mu
                        if begin_s > high_s:
                            continue
                    else:
                        begin_s, end_s, price = low_s, high_s, top
                    begin_s, end_s = max(begin_s - latency_s, alone_s), end_s - latency_s
                    if end_s < begin_s:
                        continue
                    price += latency_s
                    time_a, memory_b = time_share[w, p, d] * a, (1.0 - time_share[w, p, d]) * b
                    # min over t in [begin, end] of (price + t) (time_a / t + memory_b), which is convex in t
                    if price >= 0.0 and (memory_b == 0.0 or memory_b * end_s * end_s <= time_a * price):
                        t = end_s
                    elif memory_b * begin_s * begin_s >= time_a * price:
                        t = begin_s
                    else:
                        t = math.sqrt(time_a * price / memory_b)
                    if t == math.inf:
                        cost_s = time_a
                    elif t > 0.0:
                        cost_s = (price + t) * (time_a / t + memory_b)
                    else:
                        cost_s = price * memory_b
                    if cost_s < best_s:
                        best_s, at_w, at_p, at_d, at_t, at_a, at_b = cost_s, w, p, d, t, a, b
        if at_w < 0:
            return math.inf
        total_s += x.weight[i] * best_s
        t = at_t
        share = time_share[at_w, at_p, at_d]
        price = (top if at_w == num_windows else x.fixed_s - mu) + x.latency_s[at_d]
        if t == math.inf:
            gradient[at_w, at_p, at_d] += x.weight[i] * at_a
            continue
        per_time = at_a / t if t > 0.0 else 0.0
        gradient[at_w, at_p, at_d] += x.weight[i] * (price + t) * (per_time - at_b)
        by_price = x.weight[i] * (share * per_time + (1.0 - share) * at_b)
        if at_w == num_windows:
            by_top += by_price
        else:
            by_mu -= by_price
    slopes[0], slopes[1] = by_mu, by_top
    return total_s


@kernel
def ascend(
    x: Relaxation,
    low_s: float,
    high_s: float,
    least: int,
    least_mu: float,
    time_share: Floats,
    scalars: Floats,
    value_s: float,
    steps: int,
) -> float:
    """Betters the prices of one node by supergradient steps of Polyak's length; the best value found.

    Args:
        least_mu: mu may go down to this.
        time_share: (W, P, D), scalars: (2,) mu and top; both are replaced by the best found.
        value_s: the value known for the node.
    """
    share, gradient, slopes = time_share.copy(), np.zeros_like(time_share), np.zeros(2)
    mu, top = scalars[0], scalars[1]
    ambition, idle = 0.03, 0
    for _ in range(steps):
        found_s = priced(x, low_s, high_s, least, share, mu, top, gradient, slopes)
        if found_s == math.inf:
            return math.inf
        if found_s > value_s * (1.0 + 1e-5):
            idle = 0
        else:
            idle += 1
        if found_s > value_s:
            value_s = found_s
            time_share[:] = share
            scalars[0], scalars[1] = mu, top
        if idle >= 6:  # the target is out of reach: aim lower, from the best
            ambition, idle = ambition * 0.5, 0
            if ambition < 2e-4:
                break
        norm = slopes[0] ** 2 + slopes[1] ** 2 + np.sum(gradient**2)
        if norm == 0.0:
            break
        step = (value_s * (1.0 + ambition) - found_s) / norm
        share = np.minimum(np.maximum(share + step * gradient, 0.0), 1.0)
        mu = min(max(mu + step * slopes[0], least_mu), x.fixed_s)
        top = max(top + step * slopes[1], -low_s)
    return value_s


@kernel
def best_first(x: Relaxation, ends_s: Floats, least: int, extra: int, budget: int, start: Floats) -> float:
    """The least bound over all plans: nodes by count of micro-batches and by the slowest one's seconds, worst first.

    Args:
        ends_s: (V + 1,) ascending: intervals of the slowest micro-batch's seconds; together they must cover all.
        least: the fewest micro-batches.
        extra: nodes are made for `least` ... `least + extra - 1` exactly and for `least + extra` or more.
        budget: calls of `priced`.
        start: (W, P, D) first time shares.
    """
    intervals = len(ends_s) - 1
    size = MOST_NODES + intervals * (extra + 1)
    low_s, high_s, value_s = np.zeros(size), np.zeros(size), np.zeros(size)
    count, rounds = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
    share = np.zeros((size, *start.shape))
    scalars = np.zeros((size, 2))
    gradient, slopes = np.zeros_like(start), np.zeros(2)
    nodes = 0
    for e in range(extra + 1):
        for v in range(intervals):
            low_s[nodes], high_s[nodes], count[nodes] = ends_s[v], ends_s[v + 1], least + e
            share[nodes] = start
            scalars[nodes, 0] = x.fixed_s  # with these, the bound is work over devices and the fixed costs
            value_s[nodes] = priced(
                x, low_s[nodes], high_s[nodes], count[nodes], start, x.fixed_s, 0.0, gradient, slopes
            )
            nodes += 1
    spent = nodes
    while spent < budget:
        n = int(np.argmin(value_s[:nodes]))
        if value_s[n] == math.inf:
            break
        if rounds[n] >= 2 and nodes < size and low_s[n] > 0.0 and high_s[n] > low_s[n] * 1.01:
            middle_s = 2.0 * low_s[n] if high_s[n] == math.inf else math.sqrt(low_s[n] * high_s[n])
            low_s[nodes], high_s[nodes], count[nodes], value_s[nodes] = middle_s, high_s[n], count[n], value_s[n]
            share[nodes], scalars[nodes] = share[n], scalars[n]
            high_s[n] = middle_s
            rounds[n] = rounds[nodes] = 1
            nodes += 1
            continue
        if rounds[n] >= 6:
            break
        least_mu = 0.0 if count[n] == least + extra else -1e30  # exactly so many: more may cost or save
        value_s[n] = ascend(x, low_s[n], high_s[n], count[n], least_mu, share[n], scalars[n], value_s[n], 40)
        rounds[n] += 1
        spent += 40
    return float(np.min(value_s[:nodes]))
