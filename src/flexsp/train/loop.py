"""The steps of a run: train on planned batches, learn from what they took, write it down, save."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from flexsp.data import PlannedBatch, PlannedLoader
from flexsp.parallel import GroupPool, StepResult, forward_backward
from flexsp.parallel.clock import clock_of
from flexsp.parallel.control import from_first_rank
from flexsp.planner.policies import policy_for
from flexsp.profile import Profile
from flexsp.train.again import same_command
from flexsp.train.checkpoint import Checkpoints, Schedule, load_checkpoint
from flexsp.train.config import Config
from flexsp.train.display import step_text
from flexsp.train.evaluate import Evaluation
from flexsp.train.failures import Guard
from flexsp.train.learn import Learner
from flexsp.train.not_finite import NotFinite, NotFiniteError
from flexsp.train.optimizers import build_optimizer
from flexsp.train.out_of_memory import HEADROOM, OutOfMemoryError, describe, is_out_of_memory
from flexsp.train.resume import Start
from flexsp.train.resume_checks import check_order, say_missing_rows, say_versions
from flexsp.train.run_dir import write_began
from flexsp.train.throughput import Throughput
from flexsp.train.watch import Watch

log = logging.getLogger(__name__)

Evaluating = Callable[[int, Profile, Callable[[], bool]], dict[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """The steps of one run, and what they are made with."""

    config: Config
    model: PreTrainedModel
    """From `prepare_model`."""
    groups: GroupPool
    loader: PlannedLoader
    learner: Learner
    evaluation: Evaluation
    guard: Guard
    """Is told where this rank is."""
    watch: Watch
    """Shows and records."""
    start: Start | None
    """The checkpoint to go on from."""
    data: Mapping[str, Any]
    """What names the tokens, for checkpoints; see `TokenStore.identity`."""

    def run(self) -> bool:
        """Trains what is left of the steps; False where a request to stop ended it before the last."""
        config, learner, place, steps = self.config, self.learner, self.guard.place, self.config.train.steps
        optimizer, schedule = build_optimizer(self.model, config.train)
        origin = "" if self.start is None else self.start.origin
        checkpoints = Checkpoints(config, self.groups.control, self.data, self.loader.sequence_ids, origin)
        first_step = 0 if self.start is None else self._load(self.start, checkpoints, optimizer, schedule)
        self.guard.again = lambda: same_command(config, self.start, checkpoints.has_saved())
        mixed, not_finite = 0, NotFinite(config.train.on_not_finite)
        kernels: frozenset[str] = frozenset()
        throughput = Throughput(
            self.model, dist.get_world_size(), self.groups.device, config.model.dtype, config.watch.peak_tflops
        )
        place.progress = clock_of(self.model).progress
        from_first_rank(lambda: write_began(config, origin), self.groups)
        with self.watch.records() as records:
            if first_step:
                place.at("evaluating", first_step - 1)
                if caught_up := self._evaluate(first_step - 1, self.evaluation.catch_up):
                    records.amend(first_step - 1, caught_up)
                place.at("preparing the first step")
            for batch, line in self.watch.display.track(self.loader, steps, "training", first_step):
                self.watch.begin(batch.step)
                try:
                    metrics, result = self._guarded_step(batch, optimizer, not_finite)
                except NotFiniteError:  # on all ranks
                    checkpoints.finish()  # what is being written is the one to go on from
                    raise
                if more := result.kernels - kernels:
                    kernels |= more
                    log.info("attention: computed by %s", ", ".join(sorted(more)))
                schedule.step()
                place.at("correcting the profile", batch.step, bounded=True)
                metrics |= {**throughput.of(batch.lengths, metrics["step_s"]), **self._learned(batch, result)}
                mixed += any(len(set(degrees)) > 1 for degrees in metrics["micro_batches"])
                place.at("evaluating", batch.step)
                metrics |= self._evaluate(batch.step, self.evaluation.after_step)
                line.say(step_text(metrics, str(batch.plan)))
                place.at("writing the records in run.dir", batch.step)
                records.write(metrics, batch)
                place.at("asking for a stop", batch.step, bounded=True)
                stopping = self.guard.stop.asked(self.groups.control)
                place.at("saving a checkpoint", batch.step)
                checkpoints.after_step(
                    batch.step + 1, self.model, optimizer, schedule, learner.profile, last=bool(stopping)
                )
                if stopping and batch.step + 1 < steps:
                    checkpoints.finish()
                    saved = "saved" if config.checkpoint.every else "checkpoint.every=0: not saved"
                    log.info(
                        "stopped by %s after step %d of %d, %s; %s",
                        stopping, batch.step + 1, steps, saved, self.guard.again(),
                    )  # fmt: skip
                    return False
                place.at("waiting for its plan", batch.step + 1)
            place.at("saving the last checkpoint", steps)
            checkpoints.finish()
        log.info(
            "training: %d of %d steps mixed degrees in a micro-batch; %s",
            mixed, steps - first_step, self.groups.describe(),
        )  # fmt: skip
        if learner.most_bytes:
            log.info("training: a rank held %.2f GiB at the most", learner.most_bytes / 2**30)
        return True

    def _load(
        self, start: Start, checkpoints: Checkpoints, optimizer: torch.optim.Optimizer, schedule: Schedule
    ) -> int:
        """Puts the checkpoint into model, optimizer and schedule; returns how many steps it has."""
        check_order(self.config, start, self.loader.sequence_ids(start.steps))
        self.guard.place.at("loading the checkpoint")
        load_checkpoint(start.path, start.state, self.model, optimizer, schedule, checked=True)
        self.guard.place.at("preparing the first step")
        if start.own:
            checkpoints.loaded(start.steps)
        log.info("checkpoint: going on after step %d of %d, from %s", start.steps, self.config.train.steps, start.path)
        if start.own and start.origin:
            log.info("checkpoint: the run in %s began from %s", self.config.run.dir, start.origin)
        if dist.get_rank() == 0:
            say_versions(start)
            say_missing_rows(start)
        return start.steps

    def _evaluate(self, step: int, how: Evaluating) -> dict[str, float]:
        """After a step; what it adds to the step's metrics. `how`: a method of the evaluation.

        Raises:
            OutOfMemoryError: memory ran out, on the first rank of which it did.
            ValueError: what all ranks find wrong, of the step.
        """
        try:
            return how(step + 1, self.learner.profile, self._asked_to_stop)
        except ValueError as error:
            if not str(error).startswith("evaluation"):  # a rank's own
                raise
            raise ValueError(f"step {step}: {error}") from None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            profile = self.learner.profile
            policy = policy_for(profile, self.config.data.max_length)
            raised = math.ceil(profile.activation_bytes_per_token(policy) / HEADROOM)
            said = f"step {step}: out of memory on rank {dist.get_rank()} in the evaluation after it"
            raise self._out_of_memory(said, raised, policy) from None

    def _asked_to_stop(self) -> bool:
        """A collective."""
        return bool(self.guard.stop.asked(self.groups.control))

    def _learned(self, batch: PlannedBatch, result: StepResult) -> dict[str, Any]:
        """Corrects the profile by the step, plans with it from now on, and returns what metrics.jsonl says of that."""
        capacity_tokens = self.learner.profile.capacity_tokens(1)
        profile, learned = self.learner.learn(batch, result)
        if profile is not None:
            self.loader.update_profile(profile, replan=profile.capacity_tokens(1) < capacity_tokens)
        return learned

    def _guarded_step(
        self, batch: PlannedBatch, optimizer: torch.optim.Optimizer, not_finite: NotFinite
    ) -> tuple[dict[str, Any], StepResult]:
        """
        Raises:
            OutOfMemoryError: memory ran out, on the first rank of which it did.
            NotFiniteError: loss or gradients are not finite.
        """
        self.guard.place.at("forward and backward", batch.step, bounded=True)
        self.learner.watch()
        try:
            return self._step(batch, optimizer, not_finite)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            num_layers = self.model.config.get_text_config().num_hidden_layers
            found = describe(batch, clock_of(self.model), self.learner.profile, num_layers)
            raise self._out_of_memory(*found) from None

    def _step(
        self, batch: PlannedBatch, optimizer: torch.optim.Optimizer, not_finite: NotFinite
    ) -> tuple[dict[str, Any], StepResult]:
        """One optimizer step; returns its part of a line of metrics.jsonl, and what it computed."""
        began = time.perf_counter()
        result = forward_backward(self.model, batch, self.groups)
        self.learner.computed()
        self.guard.place.at("the optimizer's step", batch.step, bounded=True)
        max_norm = self.config.train.grad_clip or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)
        grad_norm = (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()
        lr = float(optimizer.param_groups[0]["lr"])
        if why := not_finite.why_left_out(batch.step, result.loss, grad_norm):
            log.log(logging.WARNING if dist.get_rank() == 0 else logging.INFO, why)  # the others' logs have it
        else:
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
            "communicators": self.groups.num_groups,
        }
        if batch.fallback:
            metrics["fallback"] = True
        if why:
            metrics["skipped"] = True
        return metrics, result

    def _out_of_memory(self, said: str, raised: int, policy: str | None) -> RuntimeError:
        """The error of a rank that ran out of memory, after the estimate for the next run has been raised and saved.

        Only the first rank that runs out does so: others end quietly, as those that wait for it.

        Args:
            said: where, with what.
            raised: bytes a token of the next run's estimate.
            policy: of which it is.
        """
        if not self.guard.has_word():
            return RuntimeError("another rank has failed already")
        try:
            path = self.learner.save_raised(raised, policy)
        except ValueError as error:  # a full disk, say
            return OutOfMemoryError(f"{said}; the estimate raised to {raised:,} bytes a token is lost ({error})")
        return OutOfMemoryError(
            f"{said}; the estimate is raised to {raised:,} bytes a token and saved in {path}: start the same command "
            f"again to plan within it"
        )
