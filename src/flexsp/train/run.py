"""A training run, from a configuration file to a saved model."""

from __future__ import annotations

import datetime
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from flexsp import jsonfields
from flexsp.data import PlannedBatch, PlannedLoader, Sequences
from flexsp.parallel import GroupPool, StepResult, forward_backward
from flexsp.parallel.clock import clock_of
from flexsp.planner import find_planner
from flexsp.planner.replay import read_plan_log
from flexsp.plans import Plan
from flexsp.profile import Profile
from flexsp.profiler.measure import from_first_rank
from flexsp.train import build
from flexsp.train.checkpoint import Checkpoints, load_checkpoint
from flexsp.train.compare import compare_planners, summary_line
from flexsp.train.config import Config, load_config
from flexsp.train.display import Display, step_text
from flexsp.train.export import save_pretrained
from flexsp.train.learn import FILE, Learner, go_on
from flexsp.train.out_of_memory import OutOfMemoryError, describe, is_out_of_memory
from flexsp.train.ranks import StopSignal, announce_failure, joined_ranks
from flexsp.train.records import Records
from flexsp.train.resume import Start, find_start

log = logging.getLogger(__name__)


def run_from_config(path: str, overrides: Sequence[str]) -> int:
    """What `flexsp train` does; returns the exit status.

    Raises:
        ValueError: bad configuration, data, model or profile; the message is one line.
    """
    config = load_config(path, overrides)
    with joined_ranks(config.run.timeout_s), Display() as display:
        train(config, display)
    return 0


def train(config: Config, display: Display) -> None:
    """One run.

    1. Find the checkpoint to go on from, if any.
    2. Open the corpus, build the model, join it to the ranks.
    3. Load or measure the profile; go on from what an earlier run in the same folder learned.
    4. Train on planned batches; one line of metrics a step. Measured times and memory correct the profile. Checkpoints.
    5. Compare the planners on further batches, weights untouched.
    6. Save the model.

    SIGTERM ends it after a step and a checkpoint.
    """
    transformers_logging.disable_progress_bar()
    find_planner(config.planner.name)  # a wrong name is an error before anything slow
    timeout = datetime.timedelta(seconds=config.run.timeout_s)
    groups = GroupPool(timeout=timeout, transport=config.run.transport or None)
    start = from_first_rank(lambda: find_start(config), groups)
    first_step = 0 if start is None else start.steps
    replay = from_first_rank(lambda: read_plan_log(config.planner.replay) if config.planner.replay else {}, groups)
    sequences = build.build_sequences(config)
    model = build.build_model(config.model, config.train.seed)
    build.check_fit(model, sequences, config.data.max_length)
    num_parameters = sum(p.numel() for p in model.parameters())
    log.info(
        "model: %s, %s parameters, on %d ranks (%s)",
        type(model).__name__, f"{num_parameters:,}", dist.get_world_size(), dist.get_backend(),
    )  # fmt: skip
    model = build.prepare(model, config.model)
    folder = Path(config.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    measured = build.build_profile(config, model, groups, display)
    saved = None if start is None else start.profile
    profile = from_first_rank(lambda: go_on(measured, folder, config.planner.correct, saved), groups)
    build.check_profile(profile, config, None if profile == measured else folder / FILE)
    device = next(model.parameters()).device
    learner = Learner(measured, profile, groups, device, folder, config.planner.correct, first_step)

    with _loader(config, sequences, profile, groups, first_step, replay) as loader:
        if not _train_steps(config, model, loader, groups, learner, start, display):
            return
        compared = [loader.unplanned(config.train.steps + i) for i in range(config.run.compare_batches)]
    if compared and build.policy_for(learner.profile, config.data.max_length):
        log.info("comparison: left out: one degree for all holds the context limit under no policy, and chooses none")
        compared = []
    if compared:
        report = compare_planners(model, compared, learner.profile, groups, config.data.max_length, display)
        if dist.get_rank() == 0:
            jsonfields.write_object(folder / "comparison.json", report)
        log.info("%s", summary_line(report))
    if config.run.save_model:
        save_pretrained(model, folder / "model")


def _loader(
    config: Config,
    sequences: Sequences,
    profile: Profile,
    groups: GroupPool,
    first_step: int,
    replay: Mapping[int, Plan],
) -> PlannedLoader:
    options: dict[str, Any] = dict(config.planner.options)
    if config.planner.name == "static":
        options.setdefault("max_length", int(config.data.max_length))
    return PlannedLoader(
        sequences,
        profile,
        groups.control,
        batch_size=config.train.batch_size,
        steps=config.train.steps,
        first_step=first_step,
        seed=config.train.seed,
        planner=config.planner.name,
        options=options,
        plan_ahead=config.planner.plan_ahead,
        plan_timeout_s=config.planner.timeout_s,
        replay=replay,
    )


def _train_steps(
    config: Config,
    model: PreTrainedModel,
    loader: PlannedLoader,
    groups: GroupPool,
    learner: Learner,
    start: Start | None,
    display: Display,
) -> bool:
    """Trains what is left of the steps; False where SIGTERM ended it before the last."""
    optimizer, schedule = build.build_optimizer(model, config.train)
    checkpoints = Checkpoints(config, groups.control)
    first_step = 0
    if start is not None:
        load_checkpoint(start.path, start.state, model, optimizer, schedule)
        if start.path.parent.parent.resolve() == Path(config.run.dir).resolve():
            checkpoints.loaded(start.steps)
        first_step = start.steps
        log.info("checkpoint: going on after step %d of %d, from %s", first_step, config.train.steps, start.path)
    mixed, steps = 0, config.train.steps
    kernels: frozenset[str] = frozenset()
    with StopSignal() as stop, Records(Path(config.run.dir), append=start is not None) as records:
        for batch, line in display.track(loader, steps, "training", first_step):
            learner.watch()
            try:
                metrics, result = _train_step(config, model, batch, groups, optimizer, learner)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise _out_of_memory(model, batch, learner) from None
            if more := result.kernels - kernels:
                kernels |= more
                log.info("attention: computed by %s", ", ".join(sorted(more)))
            schedule.step()
            capacity_tokens = learner.profile.capacity_tokens(1)
            profile, learned = learner.learn(batch, result)
            if profile is not None:
                loader.update_profile(profile, replan=profile.capacity_tokens(1) < capacity_tokens)
            metrics |= learned
            mixed += any(len(set(degrees)) > 1 for degrees in metrics["micro_batches"])
            line.say(step_text(metrics, str(batch.plan)))
            records.write(metrics, batch)
            stopping = stop.asked(groups.control)
            checkpoints.after_step(batch.step + 1, model, optimizer, schedule, learner.profile, last=stopping)
            if stopping and batch.step + 1 < steps:
                checkpoints.finish()
                saved = (
                    "saved; the same command goes on" if config.checkpoint.every else "checkpoint.every=0: not saved"
                )
                log.info("stopped by SIGTERM after step %d of %d, %s", batch.step + 1, steps, saved)
                return False
        checkpoints.finish()
    log.info(
        "training: %d of %d steps mixed degrees in a micro-batch; %s", mixed, steps - first_step, groups.describe()
    )
    if learner.most_bytes:
        log.info("training: a rank held %.2f GiB at the most", learner.most_bytes / 2**30)
    return True


def _out_of_memory(model: PreTrainedModel, batch: PlannedBatch, learner: Learner) -> RuntimeError:
    """The error of a rank that ran out of memory, after the estimate for the next run has been raised and saved.

    Only the first rank that runs out does so: others end quietly, as those that wait for it.
    """
    if not announce_failure():
        return RuntimeError("another rank has failed already")
    num_layers = model.config.get_text_config().num_hidden_layers
    said, raised, policy = describe(batch, clock_of(model), learner.profile, num_layers)
    path = learner.save_raised(raised, policy)
    return OutOfMemoryError(
        f"{said}; the estimate is raised to {raised:,} bytes a token and saved in {path}: start the same command again "
        f"to plan within it"
    )


def _train_step(
    config: Config,
    model: PreTrainedModel,
    batch: PlannedBatch,
    groups: GroupPool,
    optimizer: torch.optim.Optimizer,
    learner: Learner,
) -> tuple[dict[str, Any], StepResult]:
    """One optimizer step; returns its part of a line of metrics.jsonl, and what it computed."""
    began = time.perf_counter()
    result = forward_backward(model, batch, groups)
    learner.computed()
    max_norm = config.train.grad_clip or float("inf")
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    grad_norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    optimizer.step()
    optimizer.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    step_s = time.perf_counter() - began
    tokens = int(batch.lengths.sum())
    metrics = {
        "step": batch.step,
        "loss": result.loss,
        "grad_norm": grad_norm,
        "num_sequences": len(batch.lengths),
        "tokens": tokens,
        "micro_batches": [micro_batch.sp_degrees for micro_batch in batch.plan.micro_batches],
        "predicted_s": batch.plan.predicted_s,
        "step_s": step_s,
        "plan_s": batch.plan_s,
        "plan_wait_s": batch.plan_wait_s,
        "tokens_per_s": tokens / step_s,
    }
    return metrics, result
