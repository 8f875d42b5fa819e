"""benchmarks/kills.py: its proof finds faults in made-up logs, and a short form of it runs."""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from kills import summary, survived
from kills_campaign import strays, whole_checkpoints
from kills_proof import begins_at, read_log, trained_once, worst_difference

STEPS, BATCH, SEQUENCES = 10, 4, 15
"""Two epochs, the first of which ends inside a step, and ten sequences of a third."""


def batches() -> list[list[int]]:
    draw = random.Random(0)
    ids = [i for _ in range(3) for i in draw.sample(range(SEQUENCES), SEQUENCES)]
    return [ids[step * BATCH : (step + 1) * BATCH] for step in range(STEPS)]


def written(path: Path, rows: list[tuple[int, list[int]]], torn_after: int | None = None) -> Path:
    """A log of these (step, ids), with a torn row after one of them."""
    text = ""
    for number, (step, ids) in enumerate(rows):
        text += json.dumps({"step": step, "ids": ids, "loss": step / 7}) + "\n"
        text += '{"step": 3, "ids": [1, 2\n' if number == torn_after else ""
    path.write_text(text)
    return path


def test_the_last_row_of_a_step_counts_and_a_torn_one_is_none(tmp_path):
    good = list(enumerate(batches()))
    of_the_dead = [(step, [0, 0, 0, 0]) for step in (2, 3, 4)]
    log = read_log(written(tmp_path / "log", good[:2] + of_the_dead + good[2:], torn_after=4))
    once = trained_once(log, STEPS, SEQUENCES)
    assert (once.epochs, once.sequences, once.beyond) == (2, SEQUENCES, 10)
    assert log.torn == 1 and len(log.steps) == 13
    assert begins_at(log, 5) == 2 and begins_at(log, 13) is None
    with pytest.raises(AssertionError, match="one start wrote steps"):
        begins_at(log, 0)


@pytest.mark.parametrize(
    ("step", "ids", "said"),
    [
        (None, None, "1 of 10 steps have no row, the first is 4"),
        (4, lambda ids, _: [*ids[:3], ids[0]], "trained twice, the second time in step 4"),
        (4, lambda ids, _: [*ids[:3], SEQUENCES], "step 4: id 15 is none of the 15"),
        (4, lambda ids, before: before, "trained twice"),  # the batch of another step
        (9, lambda ids, before: before, "trained twice, the second time in step 9"),  # in the epoch that has not ended
    ],
)
def test_a_fault_of_one_step_is_found(tmp_path, step, ids, said):
    rows = dict(enumerate(batches()))
    if ids is None:
        del rows[4]
    else:
        rows[step] = ids(rows[step], rows[step - 1])
    with pytest.raises(AssertionError, match=said):
        trained_once(read_log(written(tmp_path / "log", list(rows.items()))), STEPS, SEQUENCES)


def test_losses_of_other_weights_differ(tmp_path):
    rows = list(enumerate(batches()))
    one, other = (read_log(written(tmp_path / name, rows)) for name in "ab")
    assert worst_difference(one, other) == 0
    other.lineage[7]["loss"] += 2e-5
    assert worst_difference(one, other) == pytest.approx(2e-5)
    with pytest.raises(AssertionError, match="10 steps against 9"):
        worst_difference(one, read_log(written(tmp_path / "c", rows[:-1])))


def test_half_a_checkpoint_under_its_name_and_strange_files_are_found(tmp_path):
    run, unbroken = tmp_path / "run", tmp_path / "unbroken"
    for folder in (run, unbroken):
        whole = folder / "checkpoints" / "step-00000003"
        whole.mkdir(parents=True)
        for name in ("state.json", ".metadata", "__0_0.distcp"):
            (whole / name).touch()
        (folder / "metrics.jsonl").touch()
    (run / "checkpoints" / "step-00000006.part").mkdir()
    assert whole_checkpoints(run) == [3] and strays(run, unbroken) == []
    (run / "core").touch()
    assert strays(run, unbroken) == ["core"]
    (run / "checkpoints" / "step-00000003" / ".metadata").unlink()
    with pytest.raises(AssertionError, match="has its name and holds"):
        whole_checkpoints(run)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_four_kills_of_the_script(tmp_path):
    campaign, _ = survived(tmp_path, kills=4, seed=5, max_ranks=3, torchrun_share=0.25, steps=60)
    found = summary(campaign)
    assert found["number_of_kills"] == 4 and found["worst_loss_difference"] <= 1e-5
    assert [proof["epochs_proven"] for proof in campaign.proofs] == [1] * len(campaign.proofs)
