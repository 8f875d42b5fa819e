"""Checkpoints: written aside while training goes on, renamed once whole, so that the last good one always stands.

    checkpoints/step-00000040/       after 40 steps
        state.json                   step, config, versions, what comes next, what was learned of the profile
        .metadata  *.distcp          weights, optimizer, random numbers (torch.distributed.checkpoint)
        *.sha256                     digests of all of them
    checkpoints/step-00000060.part/  one that is being written, or that a kill left: never read, removed at a start
    checkpoints/step-00000020.damaged/  one whose files are not what was written: never read, kept to be looked at

Weights and optimizer are saved by name and sliced anew when they are loaded, so any number of ranks can go on from
them. All ranks must see the folder.
"""

from __future__ import annotations

import datetime
import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict import set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save
from transformers import PreTrainedModel

import flexsp
from flexsp import jsonfields as jf
from flexsp.data.packing import IntArray
from flexsp.profile import Profile
from flexsp.profiler.memory import hand_back_freed
from flexsp.train.config import Config
from flexsp.train.digests import STATE, Damaged
from flexsp.train.records import NAMES as RECORDS
from flexsp.train.safe_load import DigestWriter, SafeLoadPlanner, SafeReader
from flexsp.train.tensors import HYPERPARAMETERS, OPTIONS, set_random, tensors_of

log = logging.getLogger(__name__)

FORMAT = "flexsp-checkpoint/1"
FOLDER, PART = "checkpoints", ".part"
Schedule = torch.optim.lr_scheduler.LRScheduler


class CheckpointError(RuntimeError):
    """A rank could not write or read a checkpoint; the message says which and why. Raised on all ranks alike."""


class Checkpoints:
    """Those of a run's folder: saves after every so many steps, and keeps the last few. Methods are collectives."""

    def __init__(
        self,
        config: Config,
        control: dist.ProcessGroup,
        data: Mapping[str, Any] | None = None,
        order: Callable[[int], IntArray] | None = None,
        origin: str = "",
    ) -> None:
        """
        Args:
            config: of the run.
            control: a CPU group of all ranks.
            data: what names the tokens that are trained; see `TokenStore.identity`.
            order: the ids of a step's sequences; see `PlannedLoader.sequence_ids`.
            origin: the checkpoint of another run that this one began from; see `Start.origin`.
        """
        self._config, self._control = config, control
        self._data, self._order, self._origin = dict(data or {}), order, origin
        self._folder = Path(config.run.dir) / FOLDER
        # what is written meanwhile must not get in the way of the step's own collectives
        timeout = datetime.timedelta(seconds=config.run.timeout_s)
        self._writers: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timeout)
        # one thread for all checkpoints: a new one each time, as torch's async_save has it, may get another heap of the
        # C library each time, and what a checkpoint needs is then kept by one heap after the other
        self._writer = ThreadPoolExecutor(1, "flexsp-checkpoint", _use_device, (_own_device(),))
        self._writing: tuple[int, Future[Any]] | None = None
        self._handed_back = True
        self._saved = self._kept = -1
        if dist.get_rank() == 0:
            for left in self._folder.glob(f"step-*{PART}"):
                shutil.rmtree(left)
        dist.barrier(group=control)

    def after_step(
        self,
        steps: int,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        schedule: Schedule,
        profile: Profile,
        last: bool = False,
    ) -> None:
        """Saves where `[checkpoint] every` says so, and after the last step. `steps`: how many have been done."""
        if self._writing is not None and self._writing[1].done() and self._writing[1].exception() is None:
            self._keep(self._writing[0])  # at once: a kill before the next one must not cost it; `finish` tries again
            self._hand_back()
        every = self._config.checkpoint.every
        if every and (last or steps == self._config.train.steps or steps % every == 0):
            self.save(steps, model, optimizer, schedule, profile)

    def save(
        self, steps: int, model: PreTrainedModel, optimizer: torch.optim.Optimizer, schedule: Schedule, profile: Profile
    ) -> None:
        """Begins to save what there is after so many `steps`, unless that is saved; waits for the one before it.

        Raises:
            CheckpointError: the one before it could not be written, or this one could not be begun.
        """
        self.finish()
        if steps == self._saved:
            return
        final = self._path(steps)
        part = final.with_name(final.name + PART)
        failed: dict[int, str] = {}
        if dist.get_rank() == 0:
            try:
                part.mkdir(parents=True)
                jf.write_object(part / STATE, self._state(steps, schedule, profile))
            except (OSError, ValueError) as caught:
                failed = {0: str(caught)}
        self._agree(steps, failed)
        # what was trained, up to here: a checkpoint without it proves nothing
        writer = DigestWriter(part, final, [self._folder.parent / name for name in RECORDS])
        tensors = tensors_of(model, optimizer)
        future: Future[Any] = Future()
        try:
            if self._config.checkpoint.asynchronous:
                copied = DefaultStager(StagingOptions(*[False] * 4)).stage(tensors)  # complete once it returns
                future = self._writer.submit(save, copied, storage_writer=writer, process_group=self._writers)
            else:
                future.set_result(save(tensors, storage_writer=writer, process_group=self._writers))
        except (Exception, CheckpointException) as caught:  # of this rank, perhaps alone: `finish` tells the others
            future.set_exception(caught)
        self._writing = steps, future
        self._handed_back = False
        if not self._config.checkpoint.asynchronous:
            self.finish()

    def finish(self) -> None:
        """Waits until what is being written is whole and has its name, and removes old ones.

        Raises:
            CheckpointError: a rank could not write its part.
        """
        if self._writing is None:
            return
        (steps, future), self._writing = self._writing, None
        failed: dict[int, str] = {}
        try:
            future.result()
        except (Exception, CheckpointException) as caught:  # of any kind: the disk, the writers' collectives
            failed = _failures(caught)
        self._agree(steps, failed)
        self._keep(steps)
        self._saved = steps
        self._hand_back()

    def _keep(self, steps: int) -> None:
        """On rank 0, once the checkpoint has its name, which the writer gave it: says so and removes old ones."""
        if dist.get_rank() != 0 or steps == self._kept:
            return
        self._kept = steps
        log.info("checkpoint: step %d saved as %s", steps, self._path(steps))
        try:
            self._forget(steps)
        except OSError as error:
            log.warning("checkpoint: an old one cannot be removed: %s", error)

    def _hand_back(self) -> None:
        """The copy that was written has been freed: the system gets it, once, before the next one cuts it up more."""
        if not self._handed_back:
            hand_back_freed()
            self._handed_back = True

    def loaded(self, steps: int) -> None:
        """The run goes on after so many `steps` from a checkpoint in its folder, which need not be saved again."""
        self._saved = steps

    def has_saved(self) -> bool:
        """Whether the run's folder holds one by now, of this run or that it went on from. No collective."""
        written = self._writing is not None and self._writing[1].done() and self._writing[1].exception() is None
        return written or self._saved >= 0

    def _path(self, steps: int) -> Path:
        return self._folder / f"step-{steps:08d}"

    def _forget(self, steps: int) -> None:
        """Removes the oldest beyond `keep_last`; a name that is read nowhere first, so that no half is ever taken."""
        kept = [path for path in saved_checkpoints(self._folder.parent) if steps_of(path) <= steps]
        for path in kept[: -self._config.checkpoint.keep_last]:
            aside = path.with_name(path.name + PART)
            os.replace(path, aside)
            shutil.rmtree(aside)

    def _agree(self, steps: int, failed: Mapping[int, str]) -> None:
        """Raises on all ranks where one knows of an error. `failed`: what this rank knows, by the rank at fault."""
        known: list[Mapping[int, str]] = [{}] * dist.get_world_size()
        dist.all_gather_object(known, failed, group=self._control)
        of_themselves = {rank: said[rank] for rank, said in enumerate(known) if rank in said}
        of_any = {rank: text for said in known for rank, text in said.items()}
        for rank, text in (of_themselves or of_any).items():
            raise CheckpointError(f"step {steps}: rank {rank} could not write the checkpoint: {text}")

    def _state(self, steps: int, schedule: Schedule, profile: Profile) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "step": steps,
            "world_size": dist.get_world_size(),
            "origin": self._origin,
            "config": asdict(self._config),
            "versions": versions(),
            "schedule": {"last_epoch": schedule.last_epoch},
            "profile": profile.to_json(),
            "data": self._data,
            "next_ids_sha256": ids_sha256(self._order(steps)) if self._order else "",
        }


def _own_device() -> int | None:
    return torch.cuda.current_device() if torch.cuda.is_available() else None


def _use_device(device: int | None) -> None:
    """In the writer's thread, which would begin on GPU 0, where every rank would then make a context."""
    if device is not None:
        torch.cuda.set_device(device)


def versions() -> dict[str, str]:
    """Of what decides the numbers and the order of a run."""
    return {
        "flexsp": flexsp.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
    }


def ids_sha256(ids: IntArray) -> str:
    """Names the sequences of a step and their order."""
    return hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()


def saved_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of a run's folder that were once whole, the oldest first."""
    found = [path for path in (folder / FOLDER).glob("step-*") if steps_of(path) >= 0 and path.is_dir()]
    return sorted(found, key=steps_of)


def steps_of(path: Path) -> int:
    """The steps in a checkpoint's name; -1 where it is none."""
    number = path.name.removeprefix("step-") if path.name.startswith("step-") else ""
    return int(number) if number.isascii() and number.isdigit() else -1


def load_checkpoint(
    path: Path,
    state: dict[str, Any],
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    checked: bool = False,
) -> None:
    """Puts a checkpoint into model, optimizer and schedule; random numbers too, for ranks that it was saved by.

    A collective. Nothing in the files is executed. Of optimizer and schedule it takes tensors and position: learning
    rates, betas, ... are those that they have, of the configuration.

    Args:
        path: the checkpoint's folder.
        state: its state.json.
        model: of the same config.
        optimizer: over the model's parameters.
        schedule: of the optimizer; it has made no step.
        checked: whether the digests of its files have been compared already.

    Raises:
        ValueError: the files are damaged or of another model or optimizer.
        CheckpointError: a rank could not read them, for want of memory say.
        RuntimeError: another rank has ended meanwhile.
    """
    tensors = tensors_of(model, optimizer)
    values = tensors["optimizer"]
    own_values = {key: values.pop(key) for key in list(values) if key.startswith(HYPERPARAMETERS)}
    own = f"rank {dist.get_rank()}"
    reader = SafeReader(path, checked)
    try:
        known = reader.read_metadata().state_dict_metadata
        for key in values:
            if f"optimizer.{key}" not in known:
                raise Damaged(f"it has no optimizer.{key}: train.optimizer_options may be others")
        # fewer ranks, or a CPU, may have saved it
        tensors["random"][own] = {k: v for k, v in tensors["random"][own].items() if f"random.{own}.{k}" in known}
        load_tensors(tensors, storage_reader=reader, planner=SafeLoadPlanner())
    except Damaged as error:
        raise _cannot_be_loaded(path, error) from None
    except CheckpointException as error:
        raise _load_error(path, error) from None
    set_state_dict(
        model, optimizer, model_state_dict=tensors["model"], optim_state_dict={**values, **own_values}, options=OPTIONS
    )
    where = f"{path / STATE}: schedule"
    done = jf.as_integer(jf.required(state["schedule"], "last_epoch", where), f"{where}.last_epoch", 0)
    schedule.load_state_dict({**schedule.state_dict(), "last_epoch": done - 1, "_step_count": done})
    schedule.step()  # which sets the learning rate of the position
    set_random(tensors["random"][own])


def _load_error(path: Path, error: CheckpointException) -> Exception:
    """What to raise on all ranks where torch has told all of them which could not load."""
    for rank, (cause, _) in error.failures.items():
        if not isinstance(cause, Damaged):  # nothing is wrong with the files
            return CheckpointError(f"rank {rank} could not load {path}: {_cause(cause)}")
    return _cannot_be_loaded(path, next(cause for cause, _ in error.failures.values()))


def _cannot_be_loaded(path: Path, why: object) -> ValueError:
    said = " ".join(str(why).split())
    return ValueError(f"{path}: the checkpoint cannot be loaded ({said}); give another one")


def _failures(error: BaseException) -> dict[int, str]:
    """By rank, what kept it from writing, as far as an error of torch's tells; else it is this rank's own."""
    failures = getattr(error, "failures", {})
    return {rank: _cause(found) for rank, (found, _) in failures.items()} or {dist.get_rank(): _cause(error)}


def _cause(error: BaseException) -> str:
    """An error's kind and first line."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
