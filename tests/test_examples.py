"""The training loops in examples/ run, and train."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own_loop.py", "hybrid_sharding.py"])
def test_an_example_trains_on_four_ranks(name):
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", str(EXAMPLES / name)],
        capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    losses = [float(loss) for loss in re.findall(r"^step \d+: loss ([\d.]+)", done.stdout, re.MULTILINE)]
    assert len(losses) == 5
    assert losses[-1] < losses[0] - 0.2
    if name == "hybrid_sharding.py":
        assert "degrees run as {2: '1 x 2', 4: '1 x 4'}" in done.stdout
