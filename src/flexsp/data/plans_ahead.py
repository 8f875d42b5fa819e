"""The plans of a run, made ahead on rank 0: in the planner's process and, where that fails and may, in this one."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from flexsp.legality import violations
from flexsp.lengths import LengthArray
from flexsp.planner import plan as plan_here
from flexsp.planner.policies import policy_for, under_policy
from flexsp.planner.replay import predicted_anew
from flexsp.planner.service import PlannerError, PlannerGoneError, PlanService
from flexsp.plans import Plan
from flexsp.profile import Profile

log = logging.getLogger(__name__)

RESTARTS = 3
"""How often the planner's process is started again, where there is a fallback."""


class Made(NamedTuple):
    """A plan, as it is sent to all ranks."""

    plan: Plan
    wait_s: float
    fallback: bool


class PlansAhead:
    """The planner's process and the steps handed to it, in their order."""

    def __init__(
        self,
        profile: Profile,
        planner: str,
        options: Mapping[str, Any],
        timeout_s: float,
        fallback: str = "",
        what: str = "step",
    ) -> None:
        """
        Args:
            profile: what is planned with, until `update`.
            planner: a name in `flexsp.planner.PLANNERS`, or `module:function`.
            options: for the planner.
            timeout_s: after which a plan that does not come is a failure.
            fallback: the planner that plans in this process what the other fails at; empty: a failure is an error.
            what: what the numbers of steps count, for warnings.
        """
        self._service: PlanService | None = PlanService(profile, planner, options)
        self._profile, self._timeout_s, self._fallback, self._what = profile, timeout_s, fallback, what
        self._restarts = 0
        self._steps: dict[int, tuple[LengthArray, Profile]] = {}
        self._failed: dict[int, PlannerError] = {}  # by step, of those that have not asked

    def submit(self, step: int, lengths: LengthArray) -> None:
        """Hands over the (K,) lengths of a step."""
        self._steps[step] = lengths, self._profile
        if self._service is not None:
            self._service.submit(lengths)

    def update(self, profile: Profile) -> None:
        """Steps submitted from now on are planned with this profile."""
        self._profile = profile
        if self._service is not None:
            self._service.update(profile)

    def forget(self) -> None:
        """Nobody wants the plans of the steps submitted and not taken."""
        self._steps.clear()
        self._failed.clear()
        if self._service is not None:
            self._service.forget()

    def take(self, until: int) -> dict[int, Made]:
        """The plans up to step `until`, waited for, and those of later steps that are there.

        Raises:
            PlannerError: the planner failed at step `until`, and there is no fallback.
        """
        made: dict[int, Made] = {}
        if until in self._failed:
            raise self._failed.pop(until)
        for step in list(self._steps):
            if step > until and (self._service is None or not self._service.ready()):
                break
            try:
                made[step] = self._next(step)
            except PlannerError as error:
                if step <= until:
                    raise
                self._failed[step] = error
        return made

    def close(self) -> None:
        """Ends the planner's process."""
        if self._service is not None:
            self._service.close()
            self._service = None

    def _next(self, step: int) -> Made:
        lengths, profile = self._steps.pop(step)
        began = time.perf_counter()
        try:
            if self._service is None:
                raise PlannerError(f"the planner was given up after {RESTARTS} restarts")
            plan, wait_s = self._service.result(self._timeout_s)
            faults = violations(plan, lengths, profile) if self._fallback else []
            if faults:
                raise PlannerError(f"the planner's plan is illegal in {len(faults)} ways, the first is: {faults[0]}")
            return Made(plan, wait_s, False)
        except PlannerError as error:
            if not self._fallback:
                raise
            log.warning("%s %d: %s; planned by %s instead", self._what, step, error, self._fallback)
            if isinstance(error, PlannerGoneError):
                self._restart()
        return Made(self._planned_here(lengths, profile), time.perf_counter() - began, True)

    def _planned_here(self, lengths: LengthArray, profile: Profile) -> Plan:
        """By the fallback, which chooses no activation policy: where the longest needs one, all are under it."""
        policy = policy_for(profile, int(lengths.max()))
        if policy is None:
            return plan_here(lengths, profile, self._fallback)
        plan = plan_here(lengths, under_policy(profile, policy), self._fallback)
        under = tuple(replace(micro_batch, policy=policy) for micro_batch in plan.micro_batches)
        return predicted_anew(replace(plan, micro_batches=under), lengths, profile) if plan.has_plan else plan

    def _restart(self) -> None:
        assert self._service is not None
        if self._restarts < RESTARTS:
            self._restarts += 1
            self._service.restart()
        else:
            log.warning("planner: given up after %d restarts; %s plans from now on", RESTARTS, self._fallback)
            self.close()
