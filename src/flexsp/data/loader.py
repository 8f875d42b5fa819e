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
from flexsp.data.sequences import Sequences
from flexsp.legality import violations
from flexsp.planner.replay import predicted_anew
from flexsp.planner.service import PlannerError, PlanService
from flexsp.plans import Plan
from flexsp.profile import Profile

log = logging.getLogger(__name__)


class PlannedLoader:
    """Iterates over `PlannedBatch`; the same ones on every rank.

    Rank 0 runs the planner in a process of its own, `plan_ahead` batches ahead, and broadcasts each plan; every rank
    checks it against the rules. Close it, or use it as a context manager.
    """

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
        self._plan_timeout_s = plan_timeout_s
        self._replay = dict(replay or {})
        self._first_step = self._submitted = self._next = first_step
        self._stale = 0  # plans under way that nobody wants any more
        self._planned_with: dict[int, Profile] = {}  # by step, for those submitted and not yet fetched
        self._service = PlanService(profile, planner, options or {}) if dist.get_rank() == 0 else None
        self._submit(first_step + plan_ahead)

    def __iter__(self) -> Iterator[PlannedBatch]:
        for step in range(self._first_step, self._steps):
            yield self._batch(step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Ends the planner's process."""
        if self._service is not None:
            self._service.close()
            self._service = None

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
            self._stale += sum(step not in self._replay for step in range(self._next, self._submitted))
            self._submitted = self._next
        if self._service is not None:
            self._service.update(profile)

    def _submit(self, until: int) -> None:
        while self._submitted < min(until, self._steps):
            if self._service is not None and self._submitted not in self._replay:
                self._service.submit(self._sequences.lengths[self.sequence_ids(self._submitted)])
            self._planned_with[self._submitted] = self._profile
            self._submitted += 1

    def _batch(self, step: int) -> PlannedBatch:
        answer: list[Any] = [None]
        self._submit(step + 1 + self._plan_ahead)
        self._next = step + 1
        if step in self._replay:
            answer = [(self._replay[step], 0.0)]
        elif self._service is not None:
            try:
                for _ in range(self._stale):
                    self._service.result(self._plan_timeout_s)
                answer = [self._service.result(self._plan_timeout_s)]
            except PlannerError as error:  # sent on, so that it ends all ranks and not this one alone
                answer = [error]
            self._stale = 0
        dist.broadcast_object_list(answer, src=0, group=self._control)
        if isinstance(answer[0], PlannerError):
            raise PlannerError(f"step {step}: {answer[0]}")
        plan: Plan
        plan, plan_wait_s = answer[0]
        batch = self.unplanned(step)
        if not plan.has_plan:
            raise ValueError(f"step {step}: no plan: {plan.reason}")
        profile = self._planned_with.pop(step)
        if step in self._replay and not violations(replace(plan, predicted_s=None), batch.lengths, profile):
            plan = predicted_anew(plan, batch.lengths, profile)
        if faults := violations(plan, batch.lengths, profile):
            raise ValueError(f"step {step}: the plan is illegal in {len(faults)} ways, the first is: {faults[0]}")
        if plan_wait_s and dist.get_rank() == 0:
            why = (
                ": nothing was planned before, and an installation's first plan compiles the planner"
                if step == self._first_step
                else ""
            )
            log.info("step %d waited %.3f s for its plan%s", step, plan_wait_s, why)
        return replace(batch, plan=plan, plan_s=plan.solve_s or 0.0, plan_wait_s=plan_wait_s)
