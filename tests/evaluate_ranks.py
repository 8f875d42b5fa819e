"""What runs on each rank in the tests of evaluation."""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from channel_pools import pool
from equality_ranks import make_batch
from flexsp.data import Overlong, Sequences, apply_context_limit, plans_ahead
from flexsp.parallel import RankError, forward_backward, forward_only, prepare_model
from flexsp.planner.service import PlannerError
from flexsp.plans import Plan
from flexsp.profile import Layout, Profile
from flexsp.train import evaluate
from flexsp.train.config import Config, parse_config
from flexsp.train.display import Display
from flexsp.train.evaluate import Evaluation, held_out_sequences
from flexsp.train.failures import Guard
from flexsp.train.run import train
from flexsp.train.run_data import open_on_all_ranks
from profiles import profile
from reference import build, reference_step, small_config

EXACT = 1e-12
LEARNING_RATE = 0.05


def check_losses(
    config: Any,
    cases: list[tuple[list[int], Plan, float]],
    prepare: Mapping[str, Any] | None = None,
    layouts: Mapping[int, Layout] | None = None,
    transport: str = "groups",
) -> None:
    """The loss of every batch, and that of all together, is one device's in fp64, with dropout off."""
    model = prepare_model(build(config, torch.float64), **(prepare or {}))
    one = build(copy.deepcopy(config), torch.float64).eval()  # a config says which attention its models use
    total, count, sequences, labels = 0.0, 0, [], []
    for seed, (lengths, plan, masked) in enumerate(cases):
        batch = make_batch(lengths, plan, seed, masked, layouts=layouts)
        result = forward_only(model, batch, pool(transport))
        expected, _ = reference_step(one, batch.source.sequences, batch.source.labels)
        assert abs(result.loss - expected) <= EXACT * expected, f"off by {result.loss - expected} on {plan}"
        assert len(result.times) == len(plan.micro_batches)
        total, count = total + result.loss * result.num_labels, count + result.num_labels
        sequences += batch.source.sequences
        labels += batch.source.labels
    expected, _ = reference_step(one, sequences, labels)
    assert abs(total / count - expected) <= EXACT * expected
    assert all(parameter.grad is None for parameter in model.parameters())


def check_no_label_counts(plan: Plan) -> None:
    """As a training step that is an error; an evaluation may hold such a batch."""
    model = prepare_model(build(small_config(), torch.float64))
    result = forward_only(model, make_batch([1, 1], plan, 0, 0.0), pool())
    assert (result.loss, result.num_labels) == (0.0, 0)


def check_undisturbed(
    cases: list[tuple[list[int], Plan, float]], prepare: Mapping[str, Any], layouts: Mapping[int, Layout]
) -> None:
    """Three steps with an evaluation wherever one can be end in the losses and weights of three steps without."""
    batches = [make_batch(*case[:2], seed, case[2], layouts=layouts) for seed, case in enumerate(cases)]
    alone, evaluated = (_trained(batches[:3], other, prepare) for other in (None, batches[3]))
    assert alone[0] == evaluated[0], "losses differ"
    for ours, theirs in zip(alone[1], evaluated[1], strict=True):
        assert torch.equal(ours, theirs)


def _trained(batches: list[Any], other: Any, prepare: Mapping[str, Any]) -> tuple[list[float], list[torch.Tensor]]:
    model = prepare_model(build(small_config(), torch.float32), **prepare)
    model.model.norm.eval()  # a module that is in a mode of its own
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    losses = []

    def look() -> None:
        if other is not None:
            _look(model, other)

    look()
    for batch in batches:
        result = forward_backward(model, batch, pool())
        assert len(result.times) == len(batch.plan.micro_batches)
        look()  # the gradients are there
        optimizer.step()
        optimizer.zero_grad()
        look()
        losses.append(result.loss)
    if other is not None:
        held = _live_bytes()
        look()
        assert _live_bytes() == held, "an evaluation holds on to memory"
    assert len(set(losses)) == len(batches)
    return losses, [parameter.detach().full_tensor() for parameter in model.parameters()]


def _look(model: Any, batch: Any) -> None:
    """Evaluates, and compares what must stay."""
    before = _state(model)
    first = forward_only(model, batch, pool()).loss
    assert first == forward_only(model, batch, pool()).loss
    after = _state(model)
    assert before.keys() == after.keys()
    for key, value in before.items():
        same = torch.equal(value, after[key]) if isinstance(value, torch.Tensor) else value == after[key]
        assert same, f"{key} has changed"
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters()), "parameters are gathered still"


def _state(model: Any) -> dict[str, Any]:
    state: dict[str, Any] = {"random": torch.get_rng_state(), "grad mode": torch.is_grad_enabled()}
    for name, module in model.named_modules():
        state[f"mode of {name}"] = module.training
    for name, parameter in model.named_parameters():
        state[name] = parameter.detach().to_local().clone()
        state[f"gradient of {name}"] = None if parameter.grad is None else parameter.grad.to_local().clone()
    return state


def _live_bytes() -> int:
    gc.collect()
    found = [each for each in gc.get_objects() if type(each) in (torch.Tensor, torch.nn.Parameter)]
    return sum({each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in found}.values())


MODEL = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "pad_token_id": None,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip


def given(capacity: int = 60) -> Profile:
    """A profile under which sequences of up to 100 tokens need several ranks, and short ones one."""
    # an artificial limit, which no process can be found to exceed
    provenance = {"source": "estimated", "max_tokens_per_rank": capacity}
    return profile(dist.get_world_size(), capacity, provenance=provenance)


def config_of(folder: str, name: str, **sections: dict[str, Any]) -> Config:
    """A run on rows.jsonl in the folder with a profile that is given, so that plans are the same in every run."""
    path = Path(folder) / f"profile-{dist.get_world_size()}.json"
    if dist.get_rank() == 0 and not path.exists():
        given().save(path)
    dist.barrier()
    document: dict[str, dict[str, Any]] = {
        "model": {"config": MODEL},
        "data": {
            "source": str(Path(folder) / "rows.jsonl"),
            "max_length": 100,
            "overlong": "split",
            "held_out": 11,
            "cache_dir": str(Path(folder) / "data"),
        },
        "planner": {"profile": str(path), "correct": False},
        "train": {"steps": 7, "batch_size": 8, "lr": 0.01},
        "checkpoint": {"every": 2, "keep_last": 9},
        "run": {"dir": str(Path(folder) / name), "save_model": False},
        "eval": {"every": 3},
    }
    for section, changes in sections.items():
        document[section] = {**document.get(section, {}), **changes}
    return parse_config(document)


def unexpected(text: str, status: int) -> None:
    raise AssertionError(f"status {status}: {text}")


def run_training(folder: str, name: str, sections: dict[str, dict[str, Any]]) -> None:
    config = config_of(folder, name, **sections)
    with ExitStack() as held, Display() as display:
        train(config, display, Guard(Path(config.run.dir), config.run.timeout_s, unexpected), held)


def evaluation_of(
    config: Config, append: bool = False, seed: int = 0, sequences: Sequences | None = None
) -> Evaluation:
    """Of a model in fp64, untrained; on what the configuration says unless it is given."""
    model = prepare_model(build(small_config(), torch.float64, seed))
    Path(config.run.dir).mkdir(exist_ok=True)
    sequences = sequences or held_out_sequences(config, model, open_on_all_ranks(config))
    return Evaluation(config, model, sequences, given(), pool(), append)


def evaluated(folder: str, name: str, sections: dict[str, dict[str, Any]]) -> tuple[float, set[int]]:
    """The loss after three steps of an evaluation, and the degrees that its plans mix in a micro-batch."""
    evaluation = evaluation_of(config_of(folder, name, **sections))
    for _ in range(2):  # the second time by the plans that are there
        found = evaluation.after_step(3, given(), lambda: False)
    mixed = {
        degree
        for plan in evaluation._plans
        for micro_batch in plan.micro_batches
        if len(set(micro_batch.sp_degrees)) > 1
        for degree in micro_batch.sp_degrees
    }
    return found["eval_loss"], mixed


def expected_loss(documents: list[list[int]]) -> float:
    return reference_step(build(small_config(), torch.float64), documents, documents)[0]


def due_steps(folder: str) -> list[int]:
    """After which of 8 steps one evaluates where it is every 3."""
    evaluation = evaluation_of(config_of(folder, "due", train={"steps": 8}, eval={"batches": 1}))
    said = given()
    return [steps for steps in range(1, 9) if evaluation.after_step(steps, said, lambda: False)]


def stopped_and_caught_up(folder: str) -> list[int]:
    """How many rows there are after an evaluation that was given up, and after each start of the run that follows."""
    config, counts = config_of(folder, "stopped", eval={"batch_size": 3}), []
    asked = iter([False, True])
    said = given()
    assert evaluation_of(config).after_step(3, said, lambda: next(asked)) == {}
    path = Path(config.run.dir) / evaluate.FILE
    counts.append(len(path.read_text().splitlines()) if path.exists() else 0)
    for steps in (2, 3, 3):
        evaluation_of(config, append=True).catch_up(steps, said, lambda: False)
        counts.append(len(path.read_text().splitlines()) if path.exists() else 0)
    return counts


def appends_after_a_torn_row(folder: str) -> list[int]:
    config = config_of(folder, "torn", eval={"batches": 1})
    path = Path(config.run.dir) / evaluate.FILE
    said = given()
    evaluation_of(config).after_step(3, said, lambda: False)
    if dist.get_rank() == 0:
        path.write_text(path.read_text() + '{"step": 5, "lo')
    dist.barrier()
    evaluation_of(config, append=True).after_step(6, said, lambda: False)
    return sorted(evaluate.last_rows(path))


def plans_after_memory_went_down(folder: str) -> list[list[int]]:
    """The largest share of a rank in any plan: at first, with as much memory, with less, and with that again."""
    evaluation, found = evaluation_of(config_of(folder, "memory")), []
    for capacity in (60, 60, 40, 40):
        before = list(evaluation._plans)
        evaluation.after_step(3, given(capacity), lambda: False)
        kept = before == evaluation._plans
        found.append([int(kept), _fullest(evaluation)])
    return found


def _fullest(evaluation: Evaluation) -> int:
    lengths = evaluation._sequences.lengths
    return max(
        int(lengths[ids][list(group.sequences)].sum()) // group.sp_degree
        for ids, plan in zip(evaluation._ids, evaluation._plans, strict=True)
        for micro_batch in plan.micro_batches
        for group in micro_batch.groups
    )


def planner_error(folder: str, planner: str, message: str) -> None:
    """A planner that fails is one line on every rank, and the ranks can still talk."""
    evaluation = evaluation_of(config_of(folder, "failing", planner={"name": planner, "timeout_s": 5.0}))
    with pytest.raises((PlannerError, ValueError), match=message) as raised:
        evaluation.after_step(3, given(), lambda: False)
    assert "\n" not in str(raised.value)
    dist.barrier()


def evaluated_with_a_fallback(folder: str, planner: str, timeout_s: float) -> tuple[float, list[str], list[str]]:
    """The loss, who planned which batch, and what rank 0 warns of."""
    sections = {
        "planner": {"name": f"slow_planners:{planner}", "timeout_s": timeout_s, "fallback": "batch-adaptive"},
        "eval": {"batch_size": 5},
    }
    evaluation = evaluation_of(config_of(folder, f"fallback-{planner}", **sections))
    warnings: list[str] = []
    with patch.object(plans_ahead.log, "warning", lambda text, *given: warnings.append(text % given)):
        found = evaluation.after_step(3, given(), lambda: False)
    return found["eval_loss"], [plan.planner for plan in evaluation._plans], warnings


def unwritable_error(folder: str) -> None:
    config = config_of(folder, "unwritable", eval={"batches": 1})
    evaluation = evaluation_of(config)
    if dist.get_rank() == 0:
        (Path(config.run.dir) / evaluate.FILE).mkdir()
    with pytest.raises(RankError, match=r"step 3, rank 0 could not write the evaluation: .*eval\.jsonl"):
        evaluation.after_step(3, given(), lambda: False)


def bad_config(folder: str, sections: dict[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message) as raised:
        evaluation_of(config_of(folder, "bad", **sections)).after_step(3, given(), lambda: False)
    assert "\n" not in str(raised.value)


def only_one_label(folder: str) -> None:
    """A batch in which no label counts is fine, though none is made of a corpus; an evaluation without one is not."""
    path = Path(folder) / "short.jsonl"
    if dist.get_rank() == 0:
        path.write_text("".join(json.dumps({"input_ids": [1] * (1 + (i == 0))}) + "\n" for i in range(3)))
    dist.barrier()
    config = config_of(folder, "short", eval={"source": str(path), "batch_size": 1})
    assert evaluation_of(config).after_step(3, given(), lambda: False)
    corpus = open_on_all_ranks(replace(config, data=replace(config.data, source=str(path))))
    whole, _ = apply_context_limit(corpus, 100, Overlong.DROP)
    assert evaluation_of(config, sequences=whole).after_step(3, given(), lambda: False)
    ones = replace(whole, documents=whole.documents[1:], offsets=whole.offsets[1:], lengths=whole.lengths[1:])
    with pytest.raises(ValueError, match=r"evaluation: num_labels=0: no label of the 2 sequences counts"):
        evaluation_of(config, sequences=ones).after_step(3, given(), lambda: False)


def resume_error(folder: str, name: str, sections: dict[str, dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_training(folder, name, sections)
