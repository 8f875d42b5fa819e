"""Evaluation: one device's loss on any plan, each held-out sequence once, and a run that does not notice it."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import CONFIG_MAPPING

import evaluate_ranks as on_ranks
from flexsp.data import Sequences, hold_out, open_corpus
from flexsp.train.config import load_config, parse_config
from flexsp.train.records import SEQUENCES
from flexsp.train.run_data import build_sequences
from flexsp.watch.rows import METRICS, last_rows
from reference import small_config
from test_equality import MIXED, SPECIAL, generated_cases, plan, ring
from test_families import EXPERTS, SIZES

pytestmark = pytest.mark.alone

STEPS = 7
FP64 = 1e-12

WAYS = {
    "two ranks": (2, (1, 2), {}, {}, "groups"),
    "four ranks": (4, (1, 2, 4), {}, {}, "groups"),
    "rings": (4, (1, 2, 4), ring((2, 2), (1, 2)), {}, "groups"),
    "three ranks of four in a ring, peers": (4, (1, 2, 3), ring((1, 3)), {}, "peers"),
    "the loss in chunks": (4, (1, 2, 4), {}, {"loss_chunk_tokens": 5}, "groups"),
    "parameters kept gathered": (2, (1, 2), {}, {"reshard_after_forward": False}, "groups"),
    "parameters gathered at once": (2, (1, 2), {}, {"shard_layers": False}, "groups"),
    "checkpointed": (2, (1, 2), {}, {"activation_checkpointing": True, "loss_chunk_tokens": 7}, "groups"),
}


@pytest.mark.parametrize(("world_size", "degrees", "layouts", "prepare", "transport"), WAYS.values(), ids=WAYS.keys())
def test_the_loss_is_one_devices(ranks, world_size, degrees, layouts, prepare, transport):
    cases = generated_cases(world_size, 3, seed=40 + len(prepare), degrees=degrees)
    cases += [(*case, 0.0) for case in SPECIAL.values()] if world_size == 4 and degrees == (1, 2, 4) else []
    ranks(world_size).run(on_ranks.check_losses, small_config(), cases, prepare, layouts, transport)


def test_the_loss_of_experts_is_one_devices(ranks):
    config = CONFIG_MAPPING["mixtral"](**{**SIZES, **EXPERTS})
    ranks(4).run(on_ranks.check_losses, config, [(*MIXED, 0.2)])


def test_dropout_is_off(ranks):
    sizes = {**SIZES, "attention_dropout": 0.0, "embedding_dropout": 0.4, "residual_dropout": 0.4}
    config = CONFIG_MAPPING["starcoder2"](**sizes)
    ranks(2).run(on_ranks.check_losses, config, generated_cases(2, 1, seed=3), {"exact": False})


def with_policies(case, policies):
    lengths, made, masked = case
    micro_batches = tuple(
        replace(each, policy=policy)
        for each, policy in zip(made.micro_batches, policies * len(made.micro_batches), strict=False)
    )
    return lengths, replace(made, micro_batches=micro_batches), masked


def test_the_loss_under_policies_is_one_devices(ranks):
    cases = [
        with_policies(case, order)
        for case in generated_cases(2, 2, seed=7)
        for order in (("full", "selective", "offload"), ("offload", "full"))
    ]
    ranks(2).run(on_ranks.check_losses, small_config(), cases, {"loss_chunk_tokens": 16})


def test_a_batch_in_which_no_label_counts(ranks):
    ranks(2).run(on_ranks.check_no_label_counts, plan(2, [([0], [0]), ([1], [1])]))


KNOBS = {
    "sharded layers": {},
    "kept gathered": {"reshard_after_forward": False},
    "gathered at once": {"shard_layers": False, "loss_chunk_tokens": 9},
    "checkpointed": {"activation_checkpointing": True},
}


@pytest.mark.parametrize("prepare", KNOBS.values(), ids=KNOBS.keys())
def test_training_goes_on_as_if_nothing_had_been_evaluated(ranks, prepare):
    cases = [with_policies(case, ("selective", None, "offload")) for case in generated_cases(4, 4, seed=50)]
    ranks(4).run(on_ranks.check_undisturbed, cases, prepare, ring((2, 2)))


# held-out documents


class Corpus:
    name, num_empty = "text", 2

    def __init__(self, lengths: list[int]) -> None:
        self.lengths = np.array(lengths)

    def read(self, document, start, stop):
        tokens = document * 1000 + np.arange(start, stop)
        return tokens, tokens

    def describe(self, document):
        return f"document {document}"


LENGTHS = [7, 250, 1, 99, 100, 101, 30, 5, 430, 2, 64, 12]


@pytest.mark.parametrize("count", [0, 1, 5, 11])
def test_documents_are_trained_or_held_out(count):
    corpus = Corpus(LENGTHS)
    trained, held = hold_out(corpus, count, seed=3)
    assert len(held.documents) == count
    assert sorted([*trained.documents, *held.documents]) == list(range(len(LENGTHS)))
    for part in (trained, held):
        for index, document in enumerate(part.documents):
            assert part.lengths[index] == LENGTHS[document]
            assert part.read(index, 0, 1)[0].tolist() == [document * 1000]
            assert part.describe(index) == f"document {document}"
        assert part.num_empty == 2
    assert hold_out(corpus, count, seed=3)[1].documents.tolist() == held.documents.tolist()


def test_the_seed_chooses_and_every_document_can_be_chosen():
    chosen = [tuple(hold_out(Corpus(LENGTHS), 3, seed)[1].documents) for seed in range(60)]
    assert len(set(chosen)) > 30
    assert set().union(*chosen) == set(range(len(LENGTHS)))


def rows_of(folder: Path, count: int = 70) -> list[list[int]]:
    """Writes rows.jsonl; its documents, of which some exceed 100 tokens."""
    draw = random.Random(1)
    lengths = [draw.choice([3, 8, 20, 45, 90, 100, 130, 270]) for _ in range(count)]
    rows = [[int(64 * draw.random() ** 3) for _ in range(length)] for length in lengths]  # low ones are frequent
    (folder / "rows.jsonl").write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    made = tmp_path_factory.mktemp("evaluate")
    rows_of(made)
    return made


def written(run: Path) -> list[dict]:
    """All rows of a run's evaluations."""
    return [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]


def test_no_piece_of_a_held_out_document_is_trained(tmp_path):
    rows = rows_of(tmp_path)
    data = {"source": str(tmp_path / "rows.jsonl"), "max_length": 100, "overlong": "split", "held_out": 13}
    config = parse_config({"model": {"path": "x"}, "data": data})
    found: list[list[tuple[int, ...]]] = []
    for held_out in (False, True):
        sequences = build_sequences(config, open_corpus(config.data.source, config.data), held_out)
        found.append([tuple(sequences.read(i, 0, n)[0].tolist()) for i, n in enumerate(sequences.lengths.tolist())])
    pieces = [[tuple(row[at : at + 100]) for at in range(0, len(row), 100)] for row in rows]
    assert sorted(found[0] + found[1]) == sorted(piece for row in pieces for piece in row)
    parts = [{sum(p in part for p in row) == len(row) for row in pieces} for part in map(set, found)]
    assert parts == [{True, False}, {True, False}]  # a document's pieces are all in one part
    assert sum(set(row) <= set(found[1]) for row in pieces) == 13


def held_out_of(folder: Path) -> Sequences:
    config = parse_config(
        {
            "model": {"path": "x"},
            "data": {
                "source": str(folder / "rows.jsonl"), "max_length": 100, "overlong": "split", "held_out": 11,
            },
        }
    )  # fmt: skip
    return build_sequences(config, open_corpus(config.data.source, config.data), held_out=True)


def loss_of(sequences: Sequences) -> float:
    """Of one device."""
    return on_ranks.expected_loss(
        [sequences.read(i, 0, n)[0].tolist() for i, n in enumerate(sequences.lengths.tolist())]
    )


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("batch_size", [0, 5])
def test_every_held_out_sequence_counts_once(ranks, folder, world_size, batch_size):
    sequences = held_out_of(folder)
    expected = loss_of(sequences)
    for loss, mixed in ranks(world_size).run(
        on_ranks.evaluated, str(folder), f"once-{world_size}-{batch_size}", {"eval": {"batch_size": batch_size}}
    ):
        assert abs(loss - expected) <= FP64 * expected
        assert len(mixed) > 1 or (world_size, batch_size) != (4, 0)
    rows = written(folder / f"once-{world_size}-{batch_size}")
    assert [row["step"] for row in rows] == [2, 2]
    for row in rows:
        assert row["sequences"] == len(sequences.lengths)
        assert row["num_labels"] == int((sequences.lengths - 1).sum())
        assert row["perplexity"] == np.exp(row["loss"])
        assert row["eval_s"] > 0


def test_fewer_batches_and_another_source(ranks, folder):
    sections = {"eval": {"source": str(folder / "rows.jsonl"), "batches": 2, "batch_size": 6}}
    ranks(2).run(on_ranks.evaluated, str(folder), "fewer", sections)
    assert [row["sequences"] for row in written(folder / "fewer")] == [12, 12]


def test_it_is_due_every_so_many_steps_and_after_the_last(ranks, folder):
    assert ranks(2).run(on_ranks.due_steps, str(folder)) == [[3, 6, 8]] * 2


def test_an_evaluation_that_was_given_up_is_done_by_the_next_start_once(ranks, folder):
    assert ranks(2).run(on_ranks.stopped_and_caught_up, str(folder)) == [[0, 0, 1, 1]] * 2


def test_a_row_that_a_kill_tore_is_left_alone(ranks, folder):
    assert ranks(2).run(on_ranks.appends_after_a_torn_row, str(folder))[0] == [2, 5]


def test_plans_are_made_anew_when_memory_turned_out_less(ranks, folder):
    for found in ranks(4).run(on_ranks.plans_after_memory_went_down, str(folder)):
        (_, first), *rest = found
        assert [kept for kept, _ in rest] == [1, 0, 1]
        assert 40 < first <= 60
        assert rest[1][1] == rest[2][1] <= 40


@pytest.mark.parametrize(
    ("planner", "message"),
    [
        (
            "slow_planners:raises",
            r"^evaluation after step 3, batch 0: the planner failed: .*ArithmeticError: no plan",
        ),
        ("slow_planners:dies", r"^evaluation after step 3, batch 0: the planner's process ended with status 3"),
        ("slow_planners:illegal", r"^evaluation after step 3, batch 0: the plan is illegal in 1 ways, the first is: 1"),
    ],
)
def test_a_planner_that_fails_is_one_line_on_all_ranks(ranks, folder, planner, message):
    ranks(2).run(on_ranks.planner_error, str(folder), planner, message)


@pytest.mark.parametrize(
    ("planner", "said"),
    [("raises", "the planner failed"), ("illegal", "is illegal"), ("dies", "status 3"), ("stalls", "timeout_s=0.5")],
)
def test_with_a_fallback_a_planner_that_fails_is_a_warning(ranks, folder, planner, said):
    expected = loss_of(held_out_of(folder))
    first, second = ranks(2).run(
        on_ranks.evaluated_with_a_fallback, str(folder), planner, 0.5 if planner == "stalls" else 300.0, timeout_s=120.0
    )
    for loss, planners, _ in (first, second):
        assert abs(loss - expected) <= FP64 * expected
        assert len(planners) > 2 and set(planners) == {"batch-adaptive"}
    assert second[2] == [] and said in first[2][0]
    assert first[2][0].startswith("evaluation after step 3, batch 0: ")
    assert first[2][0].endswith("; planned by batch-adaptive instead")


def test_a_row_that_cannot_be_written_is_an_error_on_all_ranks(ranks, folder):
    ranks(2).run(on_ranks.unwritable_error, str(folder))


def test_labels(ranks, folder):
    ranks(2).run(on_ranks.only_one_label, str(folder))


BAD = {
    "no document would be left to train": ({"data": {"held_out": 70}}, r"^held_out=70 must be at least 0 and below"),
    "overlong ones are an error": ({"data": {"overlong": "error"}}, r"exceeds max_length=100, as do \d of 11 doc"),
    "no such source": ({"eval": {"source": "none.jsonl"}}, r"^none.jsonl: cannot be read"),
}  # fmt: skip


def test_bad_values_are_one_line(ranks, folder):
    for sections, message in BAD.values():
        ranks(2).run(on_ranks.bad_config, str(folder), sections, message)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--eval.every", "5"], r"eval.every=5 has nothing to evaluate on; set data.held_out"),
        (["--eval.every", "-1"], r"eval.every=-1 must be at least 0"),
        (["--data.held_out", "-2"], r"data.held_out=-2 must be at least 0"),
        (
            ["--eval.batchs", "1"],
            r"eval.batchs is unknown; the keys of \[eval\] are every, source, batch_size, batches",
        ),
    ],
)
def test_wrong_flags_are_named(tmp_path, flags, message):
    (tmp_path / "c.toml").write_text('[model]\npath = "x"\n')
    with pytest.raises(ValueError, match=message) as raised:
        load_config(tmp_path / "c.toml", flags)
    assert "\n" not in str(raised.value)


# runs


def rows_that_count(folder: Path) -> tuple[list[dict], dict[int, dict]]:
    """Of a run: loss and norm of each step, and the evaluations without their seconds."""
    metrics = last_rows(folder / METRICS)
    assert sorted(metrics) == list(range(STEPS))
    trained = [(metrics[step]["loss"], metrics[step]["grad_norm"]) for step in range(STEPS)]
    path = folder / "eval.jsonl"
    scores = last_rows(path) if path.exists() else {}
    for step, score in scores.items():
        assert metrics[step]["eval_loss"] == score["loss"]
        del score["eval_s"]
    assert all(("eval_loss" in row) == (step in scores) for step, row in metrics.items())
    return trained, scores


@pytest.fixture(scope="module")
def runs(ranks, folder) -> Path:
    """The folder with two whole runs: one without evaluations, one with some."""
    ranks(4).run(on_ranks.run_training, str(folder), "without", {"eval": {"every": 0}}, timeout_s=120)
    ranks(4).run(on_ranks.run_training, str(folder), "with", {}, timeout_s=120)
    return folder


def test_a_run_trains_the_same_with_evaluations(runs):
    alone, none = rows_that_count(runs / "without")
    trained, scores = rows_that_count(runs / "with")
    assert none == {}
    assert trained == alone
    assert last_rows(runs / "with" / SEQUENCES) == last_rows(runs / "without" / SEQUENCES)
    assert sorted(scores) == [2, 5, 6]
    assert scores[6]["loss"] < scores[2]["loss"]  # it learns which tokens are frequent


def test_a_run_that_goes_on_writes_the_same_rows(ranks, runs):
    """From the checkpoint after step 4, as if it had been killed before the next one."""
    expected = rows_that_count(runs / "with")
    shutil.copytree(runs / "with", runs / "again")
    for name in ("step-00000006", "step-00000007"):
        shutil.rmtree(runs / "again" / "checkpoints" / name)
    ranks(4).run(on_ranks.run_training, str(runs), "again", {}, timeout_s=120)
    assert (runs / "again" / METRICS).read_text().count("\n") == STEPS + 3
    assert [row["step"] for row in written(runs / "again")] == [2, 5, 6, 5, 6]
    assert rows_that_count(runs / "again") == expected


def test_an_evaluation_that_is_caught_up_is_in_the_row_of_its_step(ranks, runs):
    """As after SIGTERM while the last step was evaluated."""
    expected = rows_that_count(runs / "with")
    shutil.copytree(runs / "with", runs / "caught")
    scores = (runs / "caught" / "eval.jsonl").read_text().splitlines(keepends=True)
    (runs / "caught" / "eval.jsonl").write_text("".join(scores[:-1]))
    rows = [json.loads(line) for line in (runs / "caught" / METRICS).read_text().splitlines()]
    loss = rows[-1].pop("eval_loss")
    (runs / "caught" / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))
    watch = {"watch": {"tensorboard": True}}
    for _ in range(2):  # the second start has nothing to do
        ranks(4).run(on_ranks.run_training, str(runs), "caught", watch, timeout_s=120)
        assert (runs / "caught" / METRICS).read_text().count("\n") == STEPS + 1
        assert rows_that_count(runs / "caught") == expected
        assert len(written(runs / "caught")) == 3
    events = EventAccumulator(str(runs / "caught" / "tensorboard")).Reload().Scalars("eval/eval_loss")
    assert [(event.step, event.value) for event in events] == [(STEPS - 1, pytest.approx(loss))]


def test_held_out_may_not_change_when_a_run_goes_on_and_eval_may(ranks, runs):
    shutil.copytree(runs / "with", runs / "changed")
    changed = {"data": {"held_out": 10}}
    ranks(4).run(on_ranks.resume_error, str(runs), "changed", changed, r"^data.held_out=10 is not 11, with which")
    ranks(4).run(on_ranks.run_training, str(runs), "changed", {"eval": {"every": 7, "batches": 1}}, timeout_s=120)
    assert written(runs / "changed") == written(runs / "with")  # what is due after the last step has been done
