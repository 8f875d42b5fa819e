"""Checkpoints: written aside while training goes on, renamed once whole, so that the last good one always stands.

    checkpoints/step-00000040/       after 40 steps
        state.json                   step, config, versions, learning rates, what was learned of the profile
        .metadata  *.distcp          weights, optimizer, random numbers (torch.distributed.checkpoint)
        *.sha256                     digests of all of them
    checkpoints/step-00000060.part/  one that is being written, or that a kill left: never read, removed at a start

Weights and optimizer are saved by name and sliced anew when they are loaded, so any number of ranks can go on from
them. All ranks must see the folder.
"""

from __future__ import annotations

import datetime
import logging
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save
from transformers import PreTrainedModel

import flexsp
from flexsp import jsonfields as jf
from flexsp.profile import Profile
from flexsp.profiler.memory import hand_back_freed
from flexsp.train.config import Config
from flexsp.train.digests import STATE, write_digests
from flexsp.train.roll_call import failed_collective
from flexsp.train.safe_load import DigestWriter, SafeLoadPlanner, SafeReader

log = logging.getLogger(__name__)

FORMAT = "flexsp-checkpoint/1"
FOLDER, PART = "checkpoints", ".part"
OPTIONS = StateDictOptions(flatten_optimizer_state_dict=True)
"""By parameter, not by position: on another number of ranks the positions mean the same, but nobody could tell."""

Schedule = torch.optim.lr_scheduler.LRScheduler


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the message says which and why. Raised on all ranks alike."""


class Checkpoints:
    """Those of a run's folder: saves after every so many steps, and keeps the last few. All methods are collectives."""

    def __init__(self, config: Config, control: dist.ProcessGroup, data: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            config: of the run.
            control: a CPU group of all ranks.
            data: what names the tokens that are trained; see `TokenStore.identity`.
        """
        self._config, self._control, self._data = config, control, dict(data or {})
        self._folder = Path(config.run.dir) / FOLDER
        # what is written meanwhile must not get in the way of the step's own collectives
        timeout = datetime.timedelta(seconds=config.run.timeout_s)
        self._writers: dist.ProcessGroup = dist.new_group(backend="gloo", timeout=timeout)
        # one thread for all checkpoints: a new one each time, as torch's async_save has it, may get another heap of the
        # C library each time, and what a checkpoint needs is then kept by one heap after the other
        self._writer = ThreadPoolExecutor(1, "flexsp-checkpoint")
        self._stager = BlockingAsyncStager()
        self._writing: tuple[int, Future[Any]] | None = None
        self._handed_back = True
        self._saved = -1
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
        part = self._path(steps).with_name(self._path(steps).name + PART)
        error = ""
        if dist.get_rank() == 0:
            try:
                part.mkdir(parents=True)
                jf.write_object(part / STATE, _state(steps, self._config, schedule, profile, self._data))
            except (OSError, ValueError) as caught:
                error = str(caught)
        self._agree(steps, error)
        tensors = _tensors(model, optimizer)
        future: Future[Any] = Future()
        try:
            if self._config.checkpoint.asynchronous:
                copied = self._stager.stage(tensors)
                future = self._writer.submit(
                    save, copied, storage_writer=DigestWriter(part), process_group=self._writers
                )
            else:
                future.set_result(save(tensors, storage_writer=DigestWriter(part), process_group=self._writers))
        except (Exception, CheckpointException) as caught:  # of this rank, perhaps alone: `finish` tells the others
            future.set_exception(caught)
        self._writing = steps, future
        self._handed_back = False

    def finish(self) -> None:
        """Waits until what is being written is whole, renames it and removes old ones.

        Raises:
            CheckpointError: a rank could not write its part.
        """
        if self._writing is None:
            return
        (steps, future), self._writing = self._writing, None
        error = ""
        try:
            future.result()
        except (Exception, CheckpointException) as caught:  # of any kind: the disk, the writers' collectives
            error = _cause(caught)
        self._agree(steps, error)
        self._agree(steps, self._keep(steps))
        self._saved = steps
        self._hand_back()

    def _keep(self, steps: int) -> str:
        """On rank 0, once all ranks have written: gives the checkpoint its name and removes old ones; what failed.

        Rank 0 gathers from all ranks what they wrote before its own part is done.
        """
        final = self._path(steps)
        part = final.with_name(final.name + PART)
        if dist.get_rank() != 0 or not part.exists():
            return ""
        try:
            write_digests(part, (".metadata", STATE), "state")
            os.replace(part, final)
        except OSError as error:
            return str(error)
        log.info("checkpoint: step %d saved as %s", steps, final)
        try:
            self._forget(steps)
        except OSError as error:
            log.warning("checkpoint: an old one cannot be removed: %s", error)
        return ""

    def _hand_back(self) -> None:
        """The copy that was written has been freed: the system gets it, once, before the next one cuts it up more."""
        if not self._handed_back:
            hand_back_freed()
            self._handed_back = True

    def loaded(self, steps: int) -> None:
        """The run goes on after so many `steps` from a checkpoint in its folder, which need not be saved again."""
        self._saved = steps

    def _path(self, steps: int) -> Path:
        return self._folder / f"step-{steps:08d}"

    def _forget(self, steps: int) -> None:
        """Removes the oldest beyond `keep_last`; a name that is read nowhere first, so that no half is ever taken."""
        kept = [path for path in saved_checkpoints(self._folder.parent) if steps_of(path) <= steps]
        for path in kept[: -self._config.checkpoint.keep_last]:
            aside = path.with_name(path.name + PART)
            os.replace(path, aside)
            shutil.rmtree(aside)

    def _agree(self, steps: int, error: str) -> None:
        """Raises on all ranks where one has an error."""
        errors: list[str] = [""] * dist.get_world_size()
        dist.all_gather_object(errors, error, group=self._control)
        for rank, text in enumerate(errors):
            if text:
                raise CheckpointError(f"step {steps}: rank {rank} could not write the checkpoint: {text}")


def saved_checkpoints(folder: Path) -> list[Path]:
    """The whole checkpoints of a run's folder, the oldest first."""
    found = [path for path in (folder / FOLDER).glob("step-*") if steps_of(path) >= 0 and (path / STATE).is_file()]
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
) -> None:
    """Puts a checkpoint into model, optimizer and schedule; random numbers too, for ranks that it was saved by.

    A collective. Nothing in the files is executed.

    Args:
        path: the checkpoint's folder.
        state: its state.json.
        model: of the same config.
        optimizer: over the model's parameters.
        schedule: of the optimizer.

    Raises:
        ValueError: the files are damaged or of another model.
        RuntimeError: another rank has ended meanwhile.
    """
    tensors = _tensors(model, optimizer)
    own = f"rank {dist.get_rank()}"
    try:
        known = SafeReader(path).read_metadata().state_dict_metadata
        # fewer ranks, or a CPU, may have saved it
        tensors["random"][own] = {k: v for k, v in tensors["random"][own].items() if f"random.{own}.{k}" in known}
        load_tensors(tensors, storage_reader=SafeReader(path), planner=SafeLoadPlanner())
        set_state_dict(
            model, optimizer, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizer"], options=OPTIONS
        )
        schedule.load_state_dict({**schedule.state_dict(), **state["schedule"]})
        _set_random(tensors["random"][own])
    except (Exception, CheckpointException) as error:  # torch raises many kinds
        if failed_collective(error) is not None:  # nothing is wrong with the files
            raise
        raise ValueError(f"{path}: the checkpoint cannot be loaded ({_cause(error)}); give another one") from None


def _tensors(model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """What torch.distributed.checkpoint saves and fills: the same keys before saving and before loading."""
    model_state, optimizer_state = get_state_dict(model, optimizer, options=OPTIONS)
    return {"model": model_state, "optimizer": optimizer_state, "random": {f"rank {dist.get_rank()}": _random()}}


def _random() -> dict[str, Tensor]:
    """The state of this rank's random numbers: torch's, since nothing else draws any while training."""
    found = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def _set_random(state: dict[str, Tensor]) -> None:
    if "cpu" in state:
        torch.set_rng_state(state["cpu"])
    if "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"])


def _state(steps: int, config: Config, schedule: Schedule, profile: Profile, data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "step": steps,
        "world_size": dist.get_world_size(),
        "config": asdict(config),
        "versions": {
            "flexsp": flexsp.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "schedule": {key: value for key, value in schedule.state_dict().items() if _is_json(value)},
        "profile": profile.to_json(),
        "data": dict(data),
    }


def _is_json(value: Any) -> bool:
    """Whether it is made of numbers and lists of them: schedules hold functions beside, which the config makes anew."""
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    return isinstance(value, int | float) or value is None


def _cause(error: BaseException) -> str:
    """The first line of what is behind an error of torch's checkpoint package."""
    for inner in getattr(error, "failures", {}).values():
        found = inner[0] if isinstance(inner, tuple) else inner
        return _cause(found)
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
