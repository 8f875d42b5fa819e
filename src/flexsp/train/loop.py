"""The steps of a run: train on planned batches, learn from what they took, write it down, save."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from flexsp.data import PlannedBatch, PlannedLoader
from flexsp.parallel import GroupPool, StepResult, forward_backward
from flexsp.parallel.clock import clock_of
from flexsp.train import build
from flexsp.train.checkpoint import Checkpoints, load_checkpoint
from flexsp.train.config import Config
from flexsp.train.display import step_text
from flexsp.train.failures import Guard
from flexsp.train.learn import Learner
from flexsp.train.out_of_memory import OutOfMemoryError, describe, is_out_of_memory
from flexsp.train.resume import Start
from flexsp.train.roll_call import Place
from flexsp.train.throughput import Throughput
from flexsp.train.watch import Watch

log = logging.getLogger(__name__)


def train_steps(
    config: Config,
    model: PreTrainedModel,
    loader: PlannedLoader,
    groups: GroupPool,
    learner: Learner,
    start: Start | None,
    guard: Guard,
    watch: Watch,
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
    throughput = Throughput(model, dist.get_world_size(), groups.device, config.model.dtype, config.watch.peak_tflops)
    place = guard.place
    place.progress = clock_of(model).progress
    with watch.records() as records:
        for batch, line in watch.display.track(loader, steps, "training", first_step):
            watch.begin(batch.step)
            place.at("forward and backward", batch.step, bounded=True)
            learner.watch()
            try:
                metrics, result = _train_step(config, model, batch, groups, optimizer, learner, place)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                raise _out_of_memory(model, batch, learner, guard) from None
            if more := result.kernels - kernels:
                kernels |= more
                log.info("attention: computed by %s", ", ".join(sorted(more)))
            schedule.step()
            place.at("correcting the profile", batch.step, bounded=True)
            capacity_tokens = learner.profile.capacity_tokens(1)
            profile, learned = learner.learn(batch, result)
            if profile is not None:
                loader.update_profile(profile, replan=profile.capacity_tokens(1) < capacity_tokens)
            metrics |= {**throughput.of(batch.lengths, metrics["step_s"]), **learned}
            mixed += any(len(set(degrees)) > 1 for degrees in metrics["micro_batches"])
            line.say(step_text(metrics, str(batch.plan)))
            place.at("writing the records in run.dir", batch.step)
            records.write(metrics, batch)
            place.at("asking for a stop", batch.step, bounded=True)
            stopping = guard.stop.asked(groups.control)
            place.at("saving a checkpoint", batch.step)
            checkpoints.after_step(batch.step + 1, model, optimizer, schedule, learner.profile, last=stopping)
            if stopping and batch.step + 1 < steps:
                checkpoints.finish()
                saved = (
                    "saved; the same command goes on" if config.checkpoint.every else "checkpoint.every=0: not saved"
                )
                log.info("stopped by SIGTERM after step %d of %d, %s", batch.step + 1, steps, saved)
                return False
            place.at("waiting for its plan", batch.step + 1)
        place.at("saving the last checkpoint", steps)
        checkpoints.finish()
    log.info(
        "training: %d of %d steps mixed degrees in a micro-batch; %s", mixed, steps - first_step, groups.describe()
    )
    if learner.most_bytes:
        log.info("training: a rank held %.2f GiB at the most", learner.most_bytes / 2**30)
    return True


def _out_of_memory(model: PreTrainedModel, batch: PlannedBatch, learner: Learner, guard: Guard) -> RuntimeError:
    """The error of a rank that ran out of memory, after the estimate for the next run has been raised and saved.

    Only the first rank that runs out does so: others end quietly, as those that wait for it.
    """
    if not guard.has_word():
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
    place: Place,
) -> tuple[dict[str, Any], StepResult]:
    """One optimizer step; returns its part of a line of metrics.jsonl, and what it computed."""
    began = time.perf_counter()
    result = forward_backward(model, batch, groups)
    learner.computed()
    place.at("the optimizer's step", batch.step, bounded=True)
    max_norm = config.train.grad_clip or float("inf")
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    grad_norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
    lr = float(optimizer.param_groups[0]["lr"])
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
        "lr": lr,
        "num_sequences": len(batch.lengths),
        "tokens": tokens,
        "micro_batches": [micro_batch.sp_degrees for micro_batch in batch.plan.micro_batches],
        "predicted_s": batch.plan.predicted_s,
        "step_s": step_s,
        "plan_s": batch.plan_s,
        "plan_wait_s": batch.plan_wait_s,
        "data_wait_s": batch.data_wait_s,
        "tokens_per_s": tokens / step_s,
        "communicators": groups.num_groups,
    }
    if batch.fallback:
        metrics["fallback"] = True
    return metrics, result
