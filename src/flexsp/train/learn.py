"""What a run learns about its profile: ratios of measured to predicted times, and memory that was underrated.

The learned profile is saved as profile.json in the run's folder. It names the profile that it started from, and has the
ratios to that one; a run that starts from the same one in the same folder goes on from what was learned. Ratios are of
the whole run, however often it was started: so are their bounds.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from flexsp import jsonfields as jf
from flexsp.data import PlannedBatch
from flexsp.parallel import GroupPool, RankError, StepResult
from flexsp.plans import Plan
from flexsp.profile import Profile
from flexsp.profiler.correct import Correction, times_of
from flexsp.profiler.memory import PeakMeter
from flexsp.watch.shares import predicted_exchange_share, time_shares

log = logging.getLogger(__name__)

WARM_UP = 1
"""First steps that teach nothing: allocators and libraries warm up."""
FULL = 0.25
"""Of the room for activations that a rank must have been predicted to fill for its peak to count."""
FILE = "profile.json"
WORTH_SAYING = 0.25
STARTED_FROM, RATIOS = "started_from_sha256", "correction"
"""In the provenance of a learned profile: its name for the profile that it started from, and the ratios to it."""


def profile_sha256(profile: Profile) -> str:
    """Names a profile by all that it says."""
    return hashlib.sha256(json.dumps(profile.to_json(), sort_keys=True).encode()).hexdigest()


def go_on(started_from: Profile, folder: Path, correct: bool, saved: Profile | None = None) -> Profile:
    """What an earlier run in `folder` learned, where it started from the same profile; else that profile itself.

    Its seconds are made anew from the ratios, so that they are within bounds of what it started from, whoever wrote it.
    The file is written after each step that corrects it and never synced, which would cost a step more than it is
    worth: a loss of power may leave it empty.

    Args:
        started_from: the measured or given profile.
        folder: of the run.
        correct: whether times are corrected; else only the memory estimate is taken over.
        saved: what a checkpoint holds, where the folder holds nothing that can be read.

    Raises:
        ValueError: the learned profile cannot be read, and there is no checkpoint; the message names file and field.
    """
    path = folder / FILE
    if os.path.exists(path):
        try:
            return _learned(started_from, Profile.load(path), str(path), correct)
        except ValueError as error:
            if saved is None:
                raise ValueError(f"{error}; or delete it: no more is lost than what the run learned") from None
            log.warning("profile: %s; the checkpoint's is taken instead", error)
    if saved is None or STARTED_FROM not in saved.provenance:
        return started_from
    return _learned(started_from, saved, "the checkpoint", correct)


def _learned(started_from: Profile, learned: Profile, where: str, correct: bool) -> Profile:
    """What was learned, by `where`; `started_from` itself where that is another profile's.

    Raises:
        ValueError: a ratio is no positive number.
    """
    if learned.provenance.get(STARTED_FROM) != profile_sha256(started_from):
        log.info("profile: %s was learned from another profile and is not used", where)
        return started_from
    log.info("profile: going on from what the last run in this folder learned, %s", where)
    if not correct:
        return replace(started_from, memory=learned.memory)
    times = Correction(started_from, _ratios(learned, where)).profile()
    return replace(times, memory=learned.memory, provenance=learned.provenance)


def _ratios(learned: Profile, where: str) -> dict[str, float]:
    """By term, those of a learned profile; none where it learned of memory alone.

    Raises:
        ValueError: one is no positive number.
    """
    where = f"{where}: provenance: {RATIOS}"
    ratios = jf.as_object(learned.provenance.get(RATIOS, {}), where)
    return {name: jf.as_number(ratio, f"{where}: {name}", positive=True) for name, ratio in ratios.items()}


class Learner:
    """Watches the steps of one run. `watch` and `learn` are called on all ranks, once a step each."""

    def __init__(
        self,
        started_from: Profile,
        profile: Profile,
        groups: GroupPool,
        device: torch.device,
        folder: Path,
        correct: bool,
        first_step: int = 0,
    ) -> None:
        """
        Args:
            started_from: the measured or given profile, whose name the learned one carries.
            profile: what the run plans with at first; see `go_on`.
            groups: the pool.
            device: of this rank.
            folder: of the run.
            correct: whether times are corrected, and on CUDA memory that was underrated.
            first_step: of this process, which warms up anew.
        """
        self._first_step = first_step
        self.profile = profile
        self._started_from = profile_sha256(started_from)
        self._groups, self._folder = groups, folder
        self._meter = PeakMeter(device)
        self._peak = 0
        self._said: dict[str, float] = {}
        self._said_underrated = False
        self.most_bytes = 0
        """On rank 0: the largest peak of any rank in any step."""
        learned = profile.provenance.get(STARTED_FROM) == self._started_from
        ratios = _ratios(profile, "profile") if learned else {}  # any others are another run's
        self._correction = Correction(started_from, ratios) if correct else None

    def watch(self) -> None:
        """A step begins."""
        self._meter.reset()

    def computed(self) -> None:
        """Forward and backward have ended, the optimizer has not begun: this is the peak that a plan decides."""
        self._peak = self._meter.peak_bytes()

    def learn(self, batch: PlannedBatch, result: StepResult) -> tuple[Profile | None, dict[str, Any]]:
        """A step has ended. A collective.

        Returns:
            The profile to plan with from now on, where it is another one, the same on all ranks; and on rank 0 what
            metrics.jsonl says of times and memory.

        Raises:
            ValueError: on all ranks alike: what was measured cannot correct the profile.
            RankError: on all ranks alike: rank 0 cannot save it, on a full disk say.
        """
        peak = float(self._peak)
        own = torch.tensor([(t.elapsed_s, t.busy_s, t.exchange_s, peak) for t in result.times], dtype=torch.float64)
        first = dist.get_rank() == 0
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())] if first else None
        dist.gather(own, gathered, dst=0, group=self._groups.control)
        answer: list[Any] = [None]
        metrics: dict[str, Any] = {}
        if gathered is not None:
            try:  # what fails is sent on, so that all ranks end alike
                answer[0], metrics = self._learn(batch, [rank.tolist() for rank in gathered])
            except (ValueError, np.linalg.LinAlgError) as error:
                answer[0] = ValueError(f"step {batch.step}: the profile could not be corrected: {error}")
            else:
                answer[0] = self._save(answer[0], batch.step)
        dist.broadcast_object_list(answer, src=0, group=self._groups.control)
        if isinstance(answer[0], Exception):
            raise answer[0]
        if answer[0] is not None:
            self.profile = answer[0]
        return answer[0], metrics

    def _learn(self, batch: PlannedBatch, measured: list[list[list[float]]]) -> tuple[Profile | None, dict[str, Any]]:
        """On rank 0. `measured`: by rank and micro-batch, seconds elapsed, busy, in exchanges, and the step's peak."""
        plan = batch.plan
        elapsed_s, busy_s, exchange_s = ([[row[k] for row in rank] for rank in measured] for k in (0, 1, 2))
        times = times_of(plan, elapsed_s, busy_s)
        peaks = [rank[0][3] for rank in measured]
        predicted_peaks = self._predicted_peaks(plan, batch)
        self.most_bytes = max(self.most_bytes, int(max(peaks)))
        metrics: dict[str, Any] = {
            "micro_batch_s": times.elapsed_s,
            "predicted_micro_batch_s": [micro_batch.predicted_s for micro_batch in plan.micro_batches],
            "group_s": times.group_s,
            "predicted_group_s": [[g.predicted_s for g in micro_batch.groups] for micro_batch in plan.micro_batches],
            "peak_bytes": int(max(peaks)),
            "predicted_peak_bytes": math.ceil(max(predicted_peaks)),
            **time_shares(plan, elapsed_s, busy_s, exchange_s),
            "predicted_exchange_share": predicted_exchange_share(plan, batch.lengths, self.profile),
        }
        new: Profile | None = None
        if self._correction is not None and batch.step >= self._first_step + WARM_UP:
            new = self._correction.observe(plan, batch.lengths, times)
            metrics["ratios"] = self._correction.ratios
        if new is not None:
            new = replace(new, memory=self.profile.memory)
            self._say(batch.step, metrics["ratios"])
        if raised := self._underrated(batch, predicted_peaks, peaks):
            if self._correction is not None and self._meter.exact:
                new = self.with_activation_bytes(new or self.profile, raised)
                then = f"{raised:,} bytes a token from now on"
                log.info("profile: step %d held more than predicted: %s", batch.step, then)
            else:
                self._say_underrated(batch.step, raised)
        if new is not None:
            new = self._named(new, self._correction.applied if self._correction is not None else {})
        return new, metrics

    def _save(self, new: Profile | None, step: int) -> Profile | RankError | None:
        """Saves what was learned, if anything, and returns it; or what keeps rank 0 from that."""
        try:
            if new is not None:
                new.save(self._folder / FILE)
        except ValueError as error:
            return RankError(f"step {step}, rank 0, saving the profile: {error}")
        return new

    def _say(self, step: int, ratios: Mapping[str, float]) -> None:
        """The ratios, where one has moved by `WORTH_SAYING` since they were last said; all are in metrics.jsonl."""
        if all(abs(ratio / self._said.get(name, 1.0) - 1.0) <= WORTH_SAYING for name, ratio in ratios.items()):
            return
        self._said = dict(ratios)
        text = ", ".join(f"{name} x{ratio:.2f}" for name, ratio in ratios.items())
        log.info("profile: corrected after step %d: %s", step, text)

    def _say_underrated(self, step: int, needed: int) -> None:
        """Once: with corrections off plans follow from profile and lengths alone, and a resident set proves little."""
        if self._said_underrated:
            return
        self._said_underrated = True
        why = "planner.correct=false" if self._meter.exact else "resident memory has what is freed in it too"
        log.warning(
            "profile: step %d held more than predicted, as if %s bytes a token; the estimate stays %s (%s)",
            step, f"{needed:,}", f"{self.profile.memory.activation_bytes_per_token:,.0f}", why,
        )  # fmt: skip

    def _predicted_peaks(self, plan: Plan, batch: PlannedBatch) -> list[float]:
        """By rank, the bytes that the profile says of its fullest micro-batch."""
        peaks = [float(self.profile.memory.model_state_bytes)] * plan.num_devices
        for micro_batch in plan.micro_batches:
            for group in micro_batch.groups:
                held = int(batch.lengths[list(group.sequences)].sum())
                for rank in group.ranks:
                    predicted = self.profile.group_bytes(group.sp_degree, held, micro_batch.policy)
                    peaks[rank] = max(peaks[rank], predicted)
        return peaks

    def _underrated(self, batch: PlannedBatch, predicted: list[float], peaks: list[float]) -> int | None:
        """Activation bytes per token that explain peaks above what was predicted; None where none was by much.

        Ranks less than a `FULL` part filled say little of a token's bytes: what a process holds beside them drifts.
        Only where all micro-batches run under no policy; with an artificial limit there is nothing to run out of.
        """
        memory, provenance = self.profile.memory, self.profile.provenance
        artificial = "max_tokens_per_rank" in provenance
        if artificial or any(m.policy for m in batch.plan.micro_batches):
            return None
        margin = float(provenance.get("margin_bytes", 0))
        room = memory.memory_bytes - memory.model_state_bytes
        needed = 0.0
        for said, peak in zip(predicted, peaks, strict=True):
            activations = said - memory.model_state_bytes
            if activations >= FULL * room and peak > said + margin:
                tokens = activations / memory.activation_bytes_per_token
                needed = max(needed, (peak - memory.model_state_bytes) / tokens)
        return math.ceil(needed) if needed > memory.activation_bytes_per_token else None

    def with_activation_bytes(
        self, profile: Profile, activation_bytes_per_token: int, policy: str | None = None
    ) -> Profile:
        """`profile` with a raised memory estimate of a policy, or of none."""
        if policy is None:
            memory = replace(profile.memory, activation_bytes_per_token=activation_bytes_per_token)
        else:
            raised = replace(profile.memory.policies[policy], activation_bytes_per_token=activation_bytes_per_token)
            memory = replace(profile.memory, policies={**profile.memory.policies, policy: raised})
        return replace(profile, memory=memory)

    def save_raised(self, activation_bytes_per_token: int, policy: str | None = None) -> Path:
        """Saves a raised estimate for the next run, on whichever rank ran out of memory; returns where."""
        path, provenance = self._folder / FILE, self.profile.provenance
        own = provenance.get(STARTED_FROM) == self._started_from  # else its ratios, if any, are another run's
        ratios = provenance.get(RATIOS, {}) if own else {}  # rank 0 alone has them from the correction
        raised = self.with_activation_bytes(self.profile, activation_bytes_per_token, policy)
        self._named(raised, ratios).save(path)
        return path

    def _named(self, profile: Profile, ratios: Mapping[str, float]) -> Profile:
        return replace(
            profile, provenance={**profile.provenance, STARTED_FROM: self._started_from, RATIOS: dict(ratios)}
        )
