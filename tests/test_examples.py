"""The training loops in examples/ run, and train."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM

EXAMPLES = Path(__file__).parent.parent / "examples"


def run_example(name, *arguments, ranks=4) -> tuple[str, dict[int, float]]:
    """What it prints, and of that the losses by step."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), EXAMPLES / name, *arguments],
        capture_output=True, text=True, timeout=280, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = re.findall(r"^step (\d+): loss ([\d.]+)", done.stdout, re.MULTILINE)
    return done.stdout, {int(step): float(loss) for step, loss in found}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own_loop.py", "hybrid_sharding.py"])
def test_an_example_trains_on_four_ranks(name, tmp_path):
    stdout, losses = run_example(name, *([tmp_path / "run"] if name == "own_loop.py" else []))
    assert list(losses) == [0, 1, 2, 3, 4]
    assert losses[4] < losses[0] - 0.2
    if name == "hybrid_sharding.py":
        assert "degrees run as {2: '1 x 2', 4: '1 x 4'}" in stdout
        return
    # started again, on fewer ranks: from the checkpoint of step 3, as if nothing had been
    _, again = run_example(name, tmp_path / "run", ranks=2)
    assert again == pytest.approx({3: losses[3], 4: losses[4]}, abs=2e-3)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    assert trained.config.hidden_size == 64


def test_the_loop_in_the_readme_is_that_of_the_example():
    """`forward_backward` adds to .grad: a copied loop that clears nothing would accumulate for ever."""
    readme = (EXAMPLES.parent / "README.md").read_text(encoding="utf-8")
    section = readme.split("## Training with your own loop")[1].split("```python\n")[1].split("```")[0]
    calls = [line.split("#")[0].strip() for line in section.splitlines() if line.startswith("        ")]
    example = (EXAMPLES / "own_loop.py").read_text(encoding="utf-8")
    assert calls == [
        "result = forward_backward(model, batch, groups)", "optimizer.step()", "optimizer.zero_grad()",
    ]  # fmt: skip
    assert all(call in example for call in calls)
