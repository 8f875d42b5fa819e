"""A lower bound on the predicted time of every legal plan."""

from __future__ import annotations

import math

import numpy as np

from flexsp.lengths import LengthArray
from flexsp.profile import Profile


def lower_bound_s(lengths: LengthArray, profile: Profile) -> float:
    """Seconds that no legal plan for these lengths (tokens) can be predicted to beat.

    Two bounds, of which the larger counts; both add the fixed cost of the fewest micro-batches that memory allows:

    - work over devices: a group of degree d keeps d devices busy, so a sequence costs at least
      min over d of d * (its seconds in a group of d) device-seconds, and a micro-batch of t seconds offers
      num_devices * t of them;
    - the longest sequence must run somewhere, alone at best, at the degree that is fastest for it.
    """
    policies = [None, *profile.memory.policies]
    compute_factor = min([1.0, *(policy.compute_factor for policy in profile.memory.policies.values())])
    capacity = {d: max(profile.capacity_tokens(d, policy) for policy in policies) for d in profile.sp_degrees}
    tokens = lengths.astype(np.float64)
    work_s = compute_factor * (profile.compute.quadratic_s * tokens + profile.compute.linear_s) * tokens

    device_s = np.full(len(lengths), math.inf)
    alone_s = math.inf
    longest = int(lengths.argmax())
    for d in profile.sp_degrees:
        exchange_s = tokens * profile.exchange_s_per_token(d)
        holds = lengths <= capacity[d]
        device_s = np.where(holds, np.minimum(device_s, work_s + d * exchange_s), device_s)
        if holds[longest]:
            alone_s = min(alone_s, float(work_s[longest] / d + exchange_s[longest]) + profile.latency_s(d))

    # The capacity of a group grows with its degree, so no micro-batch holds more than one group of all devices would.
    room_bytes = (profile.memory.memory_bytes - profile.memory.model_state_bytes) * profile.num_devices
    least_bytes_per_token = min(profile.activation_bytes_per_token(policy) for policy in policies)
    micro_batches = max(1, math.ceil(float(lengths.sum()) * least_bytes_per_token / room_bytes * (1 - 1e-12)))
    return micro_batches * profile.compute.fixed_s + max(float(device_s.sum()) / profile.num_devices, alone_s)
