"""All compiled kernels of the planner, loaded before anybody waits for one."""

from __future__ import annotations

import numpy as np

from flexsp.planner.flex import plan_flex
from flexsp.planner.problem import FEW, problem_of
from flexsp.planner.starts import greedy
from flexsp.profile import AllToAll, Compute, Memory, Profile

TWO_DEVICES = Profile(
    name="two devices",
    num_devices=2,
    devices_per_node=2,
    sp_degrees=(1, 2),
    compute=Compute(quadratic_s=1e-9, linear_s=1e-6, fixed_s=1e-3),
    all_to_all=AllToAll(bytes_per_token=1, bandwidth_bytes_per_s={2: 1e9}, latency_s={}),
    memory=Memory(memory_bytes=100, model_state_bytes=0, activation_bytes_per_token=1, policies={}),
)


def load_kernels() -> None:
    """Loads every kernel of `flex` and of the bound, or compiles those that are not cached yet.

    Some are first met where no target fills a batch's micro-batches, which may be a thousand steps into a run.
    """
    for count in (2, FEW + 1):  # few sequences are searched otherwise
        lengths = np.arange(50, 50 + count)
        plan_flex(lengths, TWO_DEVICES)
        greedy(problem_of(lengths, TWO_DEVICES))
