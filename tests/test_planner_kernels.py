"""Compiled kernels are loaded at the start of a planner's process, not when a batch first needs one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

MEETS_NONE = """
import gc
import random
from numba.core.dispatcher import Dispatcher
import flexsp
from flexsp.planner.kernels import load_kernels
from profiles import profile

def loaded():
    kernels = [each for each in gc.get_objects() if isinstance(each, Dispatcher)]
    return {each.py_func.__qualname__: len(each.overloads) for each in kernels if "flexsp" in each.py_func.__module__}

load_kernels()
before = loaded()
assert before["in_turn"] and before["commit"] and before["best_first"], before
draw = random.Random(0)
for devices, capacity in ((1, 400), (4, 400), (8, 100), (16, 10_000)):
    for count in (1, 5, 30, 200):
        for _ in range(5):
            lengths = [min(capacity, max(1, int(draw.lognormvariate(4.3, 1.2)))) for _ in range(count)]
            assert flexsp.plan(lengths, profile(devices, capacity=capacity)).has_plan
after = loaded()
assert after == before, {name: (before.get(name), n) for name, n in after.items() if before.get(name) != n}
"""


def test_after_loading_no_batch_meets_a_kernel_that_is_not_there():
    done = subprocess.run(
        [sys.executable, "-c", MEETS_NONE], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
