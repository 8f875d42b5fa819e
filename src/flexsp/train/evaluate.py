"""Evaluation on held-out text while a run trains: every sequence once, with mixed plans, weights untouched.

Which sequences make up which batch follows from seed and configuration alone; batches are planned at the first
evaluation and kept. Rows are in eval.jsonl, and as in the run's other logs the last row of a step is the one that
counts.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from transformers import PreTrainedModel

from flexsp import jsonfields as jf
from flexsp.data import Corpus, PlannedBatch, Sequences
from flexsp.data.packing import IntArray
from flexsp.data.plans_ahead import Made, PlansAhead
from flexsp.legality import violations
from flexsp.parallel import GroupPool, RankError, forward_only
from flexsp.parallel.control import from_first_rank
from flexsp.planner.service import PlannerError
from flexsp.plans import Plan
from flexsp.profile import Profile
from flexsp.track import Track, silent
from flexsp.train import run_data, run_profile
from flexsp.train.config import Config
from flexsp.watch.rows import last_rows

log = logging.getLogger(__name__)

FILE = "eval.jsonl"
MOST_NATS = 709.0
"""Of a loss whose perplexity is a number of fp64; JSON has no infinity."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What an evaluation found; the same on all ranks but for the seconds."""

    loss: float
    """Sum over the labels of all sequences, over their number."""
    num_labels: int
    sequences: int
    eval_s: float
    """Of the forwards; planning is not in it."""

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, MOST_NATS))


def held_out_sequences(
    config: Config, model: PreTrainedModel, corpus: Corpus, track: Track = silent
) -> Sequences | None:
    """What `[eval]` evaluates on, under the run's context limit; None where it evaluates never. A collective.

    Args:
        config: of the run.
        model: whose vocabulary and positions must hold it.
        corpus: of the run.
        track: shows how far a corpus of its own is.

    Raises:
        ValueError: the corpus cannot be read, or does not fit the model or the limit.
    """
    if not config.eval.every:
        return None
    if config.eval.source:
        config = replace(config, data=replace(config.data, source=config.eval.source, held_out=0))
        sequences = run_data.build_sequences(config, run_data.open_on_all_ranks(config, track))
    else:
        sequences = run_data.build_sequences(config, corpus, held_out=True)
    return run_data.check_fit(model, sequences, config.data)


class Evaluation:
    """Evaluates the model of a run after every so many steps. All methods are collectives."""

    def __init__(
        self,
        config: Config,
        model: PreTrainedModel,
        sequences: Sequences | None,
        profile: Profile,
        groups: GroupPool,
        append: bool,
    ) -> None:
        """
        Args:
            config: of the run.
            model: from `prepare_model`.
            sequences: from `held_out_sequences`; None: there is nothing to do, ever.
            profile: what the run started from. Plans are made with its times, not with corrected ones, so that what
                was measured does not change in which order a loss is summed.
            groups: the pool.
            append: whether the run goes on; else what another left in eval.jsonl is removed.
        """
        self._config, self._model, self._sequences, self._groups = config, model, sequences, groups
        self._profile, self._plans = profile, list[Plan]()
        self._path = Path(config.run.dir) / FILE
        self._ids = [] if sequences is None else _batches(config, len(sequences.lengths))
        if dist.get_rank() == 0 and not append:
            self._path.unlink(missing_ok=True)

    def after_step(self, steps: int, profile: Profile, stopping: Callable[[], bool]) -> dict[str, float]:
        """Evaluates where `[eval] every` says so, and after the last step.

        Args:
            steps: how many have been done.
            profile: the run's, whose memory plans keep to.
            stopping: a collective that says whether the run is to end; then the evaluation is given up, and done when
                the run goes on, see `catch_up`.

        Returns:
            What it adds to the step's row of metrics.jsonl.

        Raises:
            PlannerError, ValueError: no legal plan was made for a batch; on all ranks alike.
            RankError: a rank could not read its tokens, or rank 0 could not write the row.
        """
        score = self._score(steps, profile, stopping) if self._due(steps) else None
        if score is None:
            return {}
        log.info(
            "evaluation after step %d: loss %.3f, perplexity %.1f, %d sequences in %.1f s",
            steps, score.loss, score.perplexity, score.sequences, score.eval_s,
        )  # fmt: skip
        self._write(steps, score)
        return {"eval_loss": score.loss}

    def catch_up(self, steps: int, profile: Profile, stopping: Callable[[], bool]) -> dict[str, float]:
        """Before a run goes on after so many steps: evaluates if that was due and has not been done.

        Returns:
            What it adds to the last step's row of metrics.jsonl, which is there already.
        """
        if not self._due(steps):
            return {}
        done = from_first_rank(
            lambda: last_rows(self._path).get(steps - 1) if self._path.exists() else None, self._groups
        )
        return {"eval_loss": done["loss"]} if done else self.after_step(steps, profile, stopping)

    def _due(self, steps: int) -> bool:
        every = self._config.eval.every if self._ids else 0
        return every > 0 and steps > 0 and (steps % every == 0 or steps == self._config.train.steps)

    def _score(self, steps: int, profile: Profile, stopping: Callable[[], bool]) -> Score | None:
        """None where it was given up."""
        sums, num_labels, eval_s = [], 0, 0.0
        with contextlib.closing(self._planned(steps, profile)) as batches:
            for batch in batches:
                if stopping():
                    log.info("evaluation after step %d given up, as the run is to end", steps)
                    return None
                began = time.perf_counter()
                result = forward_only(self._model, batch, self._groups)
                eval_s += time.perf_counter() - began
                sums.append(result.loss * result.num_labels)
                num_labels += result.num_labels
        sequences = sum(map(len, self._ids))
        if num_labels == 0:
            raise ValueError(
                f"evaluation: num_labels=0: no label of the {sequences} sequences counts; give documents of two tokens "
                f"or more with labels that are not all masked"
            )
        loss = math.fsum(sums) / num_labels
        return Score(loss=loss, num_labels=num_labels, sequences=sequences, eval_s=eval_s)

    def _planned(self, steps: int, profile: Profile) -> Generator[PlannedBatch]:
        """The batches. Those without a plan are planned in a process of its own, while the first ones are run."""
        assert self._sequences is not None
        if profile.capacity_tokens(1) < self._profile.capacity_tokens(1):
            self._plans = []  # they may hold more than memory now allows
        if not self._plans:
            self._profile = replace(self._profile, memory=profile.memory)
        first, planner = len(self._plans), self._config.planner
        where = f"evaluation after step {steps}, batch"
        with contextlib.ExitStack() as stack:
            ahead: PlansAhead | None = None
            if first < len(self._ids) and dist.get_rank() == 0:
                options = run_profile.planner_options(self._config)
                ahead = PlansAhead(self._profile, planner.name, options, planner.timeout_s, planner.fallback, where)
                stack.callback(ahead.close)
                for number in range(first, len(self._ids)):
                    ahead.submit(number, self._sequences.lengths[self._ids[number]])
            made: dict[int, Made] = {}
            for number, ids in enumerate(self._ids):
                lengths = self._sequences.lengths[ids]
                if number == len(self._plans):
                    self._plans.append(self._fetch(where, number, ahead, made))
                yield PlannedBatch(
                    step=steps,
                    sequence_ids=ids,
                    lengths=lengths,
                    plan=self._plans[number],
                    source=self._sequences,
                    layouts=self._profile.layouts,
                )

    def _fetch(self, where: str, number: int, ahead: PlansAhead | None, made: dict[int, Made]) -> Plan:
        """The plan of a batch, made on rank 0, or the planner's error, on all ranks. `made`: those made already."""
        answer: list[Plan | PlannerError | None] = [None]
        if ahead is not None:
            try:
                if number not in made:
                    made |= ahead.take(number)
                answer[0] = made.pop(number).plan
            except PlannerError as error:
                answer[0] = error
        dist.broadcast_object_list(answer, src=0, group=self._groups.control)
        plan = answer[0]
        where = f"{where} {number}"
        if isinstance(plan, PlannerError):
            raise PlannerError(f"{where}: {plan}")
        assert plan is not None and self._sequences is not None
        if not plan.has_plan:
            raise ValueError(f"{where}: no plan: {plan.reason}")
        if faults := violations(plan, self._sequences.lengths[self._ids[number]], self._profile):
            raise ValueError(f"{where}: the plan is illegal in {len(faults)} ways, the first is: {faults[0]}")
        return plan

    def _write(self, steps: int, score: Score) -> None:
        """Appends the row; its step is that of the row of metrics.jsonl, which counts from 0."""
        row: dict[str, Any] = {
            "step": steps - 1,
            "loss": score.loss,
            "perplexity": score.perplexity,
            "num_labels": score.num_labels,
            "sequences": score.sequences,
            "eval_s": score.eval_s,
        }
        row = jf.finite(row)

        def write() -> str:
            try:
                torn = self._path.exists() and self._path.read_bytes()[-1:] not in (b"", b"\n")
                with open(self._path, "a", encoding="utf-8") as file:
                    file.write("\n" * torn + json.dumps(row) + "\n")
            except OSError as error:
                return str(error)
            return ""

        if error := from_first_rank(write, self._groups):
            raise RankError(f"step {steps}, rank 0 could not write the evaluation: {error}")


def _batches(config: Config, num_sequences: int) -> list[IntArray]:
    """Ids of the sequences of each batch: all of them once, in an order that the seed decides, or the first of them."""
    size = config.eval.batch_size or config.train.batch_size
    order = np.random.default_rng(config.train.seed).permutation(num_sequences)
    batches = [order[start : start + size] for start in range(0, num_sequences, size)]
    return batches[: config.eval.batches or None]
