"""The planned loader: global batches in a fixed order, each with its plan, made ahead in another process."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist

from flexsp.batches import global_batch
from flexsp.data.batch import PlannedBatch
from flexsp.data.packing import IntArray
from flexsp.data.plans_ahead import Made, PlansAhead
from flexsp.data.read_ahead import ReadAhead, Reader
from flexsp.data.sequences import Sequences
from flexsp.legality import violations
from flexsp.planner.replay import predicted_anew
from flexsp.planner.service import PlannerError
from flexsp.plans import Plan
from flexsp.profile import Profile

log = logging.getLogger(__name__)


class PlannedLoader:
    """Iterates over `PlannedBatch`; the same ones on every rank.

    Rank 0 runs the planner in a process of its own, `plan_ahead` batches ahead, and broadcasts each plan; every rank
    checks it against the rules, and reads its own tokens ahead. Close it, or use it as a context manager.
    """

    fallbacks: int
    """Steps so far that `fallback` planned."""

    def __init__(
        self,
        sequences: Sequences,
        profile: Profile,
        control: dist.ProcessGroup,
        *,
        batch_size: int,
        steps: int,
        first_step: int = 0,
        seed: int = 0,
        planner: str = "flex",
        options: Mapping[str, Any] | None = None,
        plan_ahead: int = 4,
        plan_timeout_s: float = 300.0,
        replay: Mapping[int, Plan] | None = None,
        fallback: str = "",
        read_ahead: int = 2,
        read_timeout_s: float = 300.0,
    ) -> None:
        """
        Args:
            sequences: the corpus after the context limit.
            profile: the cost model, of as many devices as there are ranks.
            control: a CPU process group of all ranks (`GroupPool.control`).
            batch_size: sequences of a global batch.
            steps: how many batches, those before `first_step` included.
            first_step: where to begin; those before it have been trained.
            seed: of the order.
            planner: a name in `flexsp.planner.PLANNERS`, or `module:function`.
            options: for the planner.
            plan_ahead: how many batches are planned ahead, at least 1.
            plan_timeout_s: after which a plan that does not come is an error; less than the ranks' own timeout.
            replay: plans by step, instead of the planner's; see `flexsp.planner.replay`.
            fallback: the planner that plans, on rank 0, a step at which the other fails; empty: a failure is an error.
            read_ahead: of how many steps this rank's tokens are read, in a thread, before their turn comes, where their
                plans are there; -1: no thread, they are read in the step.
            read_timeout_s: after which tokens that are not read are an error; less than the ranks' own timeout.

        Raises:
            ValueError: profile and world size disagree, or an argument is out of range.
        """
        world_size = dist.get_world_size()
        if profile.num_devices != world_size:
            raise ValueError(
                f"profile num_devices={profile.num_devices} is not world_size={world_size}; measure a profile for this "
                f"many ranks or use Profile.for_devices({world_size})"
            )
        for name, value in (("batch_size", batch_size), ("plan_ahead", plan_ahead)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1; correct it")
        self._sequences, self._profile, self._control = sequences, profile, control
        self._batch_size, self._steps, self._seed, self._plan_ahead = batch_size, steps, seed, plan_ahead
        self._replay = dict(replay or {})
        self._first_step = self._submitted = self._next = first_step
        self._planned_with: dict[int, Profile] = {}  # by step, for those submitted whose turn has not come
        self._made: dict[int, Made] = {}  # by step, the same on all ranks, for those whose turn has not come
        self._reading: dict[int, ReadAhead] = {}
        self._read_ahead = read_ahead
        self._reader = Reader(dist.get_rank(), read_timeout_s) if read_ahead >= 0 else None
        self._planner = (
            PlansAhead(profile, planner, options or {}, plan_timeout_s, fallback) if dist.get_rank() == 0 else None
        )
        self.fallbacks = 0
        self._submit(first_step + plan_ahead)

    def __iter__(self) -> Iterator[PlannedBatch]:
        for step in range(self._first_step, self._steps):
            yield self._batch(step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the planner's process and the reader's thread."""
        if self._planner is not None:
            self._planner.close()
            self._planner = None
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def sequence_ids(self, step: int) -> IntArray:
        """(batch_size,) ids of the sequences of a step."""
        return global_batch(len(self._sequences.lengths), self._batch_size, self._seed, step)

    def unplanned(self, step: int) -> PlannedBatch:
        """The batch of a step, beyond those planned too, with a plan that holds nothing yet."""
        sequence_ids = self.sequence_ids(step)
        return PlannedBatch(
            step=step,
            sequence_ids=sequence_ids,
            lengths=self._sequences.lengths[sequence_ids],
            plan=Plan(num_devices=self._profile.num_devices, micro_batches=()),
            source=self._sequences,
            layouts=self._profile.layouts,
        )

    def update_profile(self, profile: Profile, replan: bool = False) -> None:
        """Steps not yet handed to the planner are planned with this profile. On all ranks, after the same step.

        Args:
            profile: of as many devices.
            replan: give up the plans made ahead, which may hold more than memory now allows.
        """
        self._profile = profile
        if replan:
            self._submitted = self._next
            self._made.clear()
            for reading in self._reading.values():
                reading.cancel()
            self._reading.clear()
            if self._planner is not None:
                self._planner.forget()
        if self._planner is not None:
            self._planner.update(profile)

    def _submit(self, until: int) -> None:
        while self._submitted < min(until, self._steps):
            if self._planner is not None and self._submitted not in self._replay:
                self._planner.submit(self._submitted, self._sequences.lengths[self.sequence_ids(self._submitted)])
            self._planned_with[self._submitted] = self._profile
            self._submitted += 1

    def _batch(self, step: int) -> PlannedBatch:
        self._submit(step + 1 + self._plan_ahead)
        self._next = step + 1
        self._receive(step)
        batch = self._planned(step)
        assert batch is not None
        plan = batch.plan
        if not plan.has_plan:
            raise ValueError(f"step {step}: no plan: {plan.reason}")
        profile = self._planned_with.pop(step)
        if step in self._replay and not violations(replace(plan, predicted_s=None), batch.lengths, profile):
            plan = predicted_anew(plan, batch.lengths, profile)
        if faults := violations(plan, batch.lengths, profile):
            raise ValueError(f"step {step}: the plan is illegal in {len(faults)} ways, the first is: {faults[0]}")
        if batch.plan_wait_s and dist.get_rank() == 0:
            why = (
                ": nothing was planned before, and an installation's first plan compiles the planner"
                if step == self._first_step
                else ""
            )
            log.info("step %d waited %.3f s for its plan%s", step, batch.plan_wait_s, why)
        self.fallbacks += batch.fallback
        self._read(step)
        self._made.pop(step, None)
        return replace(batch, plan=plan, ahead=self._reading.pop(step, None))

    def _receive(self, step: int) -> None:
        """This step's plan from rank 0, and those of later steps that are there already. A collective."""
        answer: list[Any] = [{}]
        if self._planner is not None:
            try:
                answer = [self._planner.take(step)]
            except PlannerError as error:  # sent on, so that it ends all ranks and not this one alone
                answer = [error]
        dist.broadcast_object_list(answer, src=0, group=self._control)
        if isinstance(answer[0], PlannerError):
            raise PlannerError(f"step {step}: {answer[0]}")
        self._made |= answer[0]

    def _planned(self, step: int) -> PlannedBatch | None:
        """A batch as it was planned; None where its plan is not there yet."""
        made = Made(self._replay[step], 0.0, False) if step in self._replay else self._made.get(step)
        if made is None:
            return None
        return replace(
            self.unplanned(step),
            plan=made.plan,
            plan_s=made.plan.solve_s or 0.0,
            plan_wait_s=made.wait_s,
            fallback=made.fallback,
        )

    def _read(self, step: int) -> None:
        """Begins to read this rank's part of the step, and of those after it whose plans are there."""
        if self._reader is None:
            return
        for each in range(step, min(step + self._read_ahead + 1, self._submitted)):
            if each not in self._reading and (batch := self._planned(each)) is not None:
                self._reading[each] = self._reader.begin(batch)
