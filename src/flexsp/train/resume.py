"""Where a run begins: at step 0, or after the steps of a checkpoint that the configuration allows to go on from."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from flexsp import jsonfields as jf
from flexsp.parallel import GroupPool
from flexsp.parallel.control import from_first_rank
from flexsp.profile import Profile
from flexsp.train.checkpoint import FORMAT, CheckpointError, saved_checkpoints, steps_of
from flexsp.train.config import Config
from flexsp.train.digests import STATE, Damaged
from flexsp.train.run_dir import BEGAN, read_began
from flexsp.train.safe_load import SafeReader

log = logging.getLogger(__name__)

DAMAGED = ".damaged"

DECIDES_WEIGHTS = ("model", "data", "train")
"""Sections that must be the same when a run goes on; plans, folders and times may differ."""
MAY_CHANGE = (
    "data.cache_dir",
    "data.workers",
    "model.activation_checkpointing",
    "model.attention",
    "model.loss_chunk_tokens",
    "model.replicate",
    "model.reshard_after_forward",
    "model.shard_layers",
    "train.on_not_finite",
)
"""Keys of those sections that may change: where model and tokens lie, not what they are; what ends a run."""
OF_ANY_RUN = ("model", "train.optimizer")
"""What must be the same where a run goes on from another run's checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A checkpoint to go on from."""

    path: Path
    steps: int
    """Done so far."""
    state: dict[str, Any]
    """Its state.json."""
    own: bool
    """Whether it lies in the folder of the run."""
    origin: str = ""
    """The checkpoint that `checkpoint.resume` named when the run began there, its whole path; empty: at step 0."""

    @property
    def profile(self) -> Profile:
        """What the run had learned."""
        return Profile.from_json(jf.required(self.state, "profile", str(self.path)), f"{self.path / STATE}: profile")


def resume_point(config: Config, groups: GroupPool) -> Start | None:
    """`find_start`, of checkpoints whose files are what was written. A collective.

    With `auto`, and where a run goes on in its own folder, the last whole checkpoint: damaged ones after it are set
    aside under another name, with a warning.

    Raises:
        ValueError: see `find_start`; or no checkpoint is whole.
        CheckpointError: a rank cannot read one.
    """
    damaged: dict[Path, str] = {}
    for path in from_first_rank(lambda: _candidates(config), groups):
        if said := _damage(path, groups):
            damaged[path] = said
            continue
        start = from_first_rank(partial(_read, path, config), groups)
        from_first_rank(lambda: _set_aside(damaged), groups)
        return start
    if damaged:
        path, said = next(iter(damaged.items()))
        others = f", nor are the {len(damaged) - 1} before it" if len(damaged) > 1 else ""
        raise ValueError(f"{path}: the checkpoint is damaged ({said}){others}; restore it, or give another one")
    return None


def find_start(config: Config) -> Start | None:
    """What `checkpoint.resume` says, of the files' names and state.json alone; None begins at step 0.

    Raises:
        ValueError: `never` in a folder with checkpoints; no checkpoint at the path; one of another configuration; or
            a folder without checkpoints whose logs are of another configuration.
    """
    candidates = _candidates(config)
    return _read(candidates[0], config) if candidates else None


def _candidates(config: Config) -> list[Path]:
    """Checkpoints that the run may go on from, the best first; none: it begins at step 0."""
    resume, folder = config.checkpoint.resume, Path(config.run.dir)
    saved = saved_checkpoints(folder)[::-1]
    if resume == "never" and saved:
        raise ValueError(
            f"checkpoint.resume='never', but run.dir={config.run.dir!r} holds checkpoints, the last of step "
            f"{steps_of(saved[0])}; give another run.dir, or remove {saved[0].parent}"
        )
    if not saved:
        _check_began(config)
    if resume in ("never", "auto"):
        return saved
    path, origin = Path(resume), _origin(saved)
    is_last = bool(saved) and _same(path, saved[0])
    if origin and not is_last and _same(path, Path(origin)):  # the same command once more
        return saved
    if not os.path.isfile(path / STATE) or steps_of(path) < 0:
        raise ValueError(
            f"checkpoint.resume={resume!r} must be 'auto', 'never' or the path of a checkpoint, a folder "
            f"step-... that holds {STATE}; there is none at that path"
        )
    if saved and not is_last:
        began = f"from {origin}" if origin else "at step 0"
        why = f"of a run that began {began}; set it to 'auto' to go on with that, or give another run.dir"
        if any(_same(path, one) for one in saved):
            why = "which the next start would take; remove it or give another run.dir"
        raise ValueError(f"checkpoint.resume={resume!r}, but run.dir={config.run.dir!r} holds {saved[0]}, {why}")
    return [path]


def _check_began(config: Config) -> None:
    """Whether logs in the folder of a run without checkpoints are of this configuration, and may begin anew.

    Raises:
        ValueError: they are of another one.
    """
    began = read_began(Path(config.run.dir))
    if began is None:
        return
    before, origin = began
    resume = config.checkpoint.resume
    now = "" if resume in ("never", "auto") else os.path.realpath(resume)
    remedy = f"restore it, remove {config.run.dir}, or give another run.dir"
    where = f"with which the run in {config.run.dir} began, of which no checkpoint was saved"
    for key, was, is_now in changed_keys(before, config, DECIDES_WEIGHTS, f"{Path(config.run.dir) / BEGAN}: config"):
        raise ValueError(f"{key}={is_now!r} is not {was!r}, {where}; {remedy}")
    if now != origin:
        raise ValueError(f"checkpoint.resume={resume!r} is not {origin or 'auto'!r}, {where}; {remedy}")


def _damage(path: Path, groups: GroupPool) -> str:
    """What is wrong with a checkpoint's files, of which each rank reads a share; empty: nothing. A collective.

    Raises:
        CheckpointError: a rank cannot read its share, for another reason.
    """
    damage = failure = ""
    try:
        reader = SafeReader(path)
        reader.check(reader.read_metadata())
    except Damaged as error:
        damage = " ".join(str(error).split())
    except Exception as error:  # of this rank, perhaps alone: all are to hear of it
        failure = f"{type(error).__name__}: {error}"
    found: list[tuple[str, str]] = [("", "")] * dist.get_world_size()
    dist.all_gather_object(found, (damage, failure), group=groups.control)
    for rank, (_, text) in enumerate(found):
        if text:
            raise CheckpointError(f"rank {rank} could not read {path}: {text}")
    return next((text for text, _ in found if text), "")


def _set_aside(damaged: Mapping[Path, str]) -> None:
    """Renames damaged checkpoints, so that nobody takes them, and says so."""
    for path, said in damaged.items():
        number, aside = 1, path.with_name(path.name + DAMAGED)
        while aside.exists():
            number += 1
            aside = path.with_name(f"{path.name}{DAMAGED}-{number}")
        try:
            os.replace(path, aside)
        except OSError as error:
            raise ValueError(
                f"{path}: the checkpoint is damaged ({said}) and cannot be set aside ({error.strerror}); remove it"
            ) from None
        log.warning("checkpoint: %s is damaged (%s): set aside as %s, the one before is taken", path, said, aside.name)


def _same(path: Path, other: Path) -> bool:
    return os.path.realpath(path) == os.path.realpath(other)


def _origin(saved: Sequence[Path]) -> str:
    """What the run of these checkpoints began from, as the first of them tells that can be read."""
    for path in saved:
        try:
            return jf.as_string(jf.read_object(path / STATE).get("origin", ""), f"{path / STATE}: origin")
        except ValueError:  # a damaged one, which is found out later
            continue
    return ""


def _read(path: Path, config: Config) -> Start:
    """The checkpoint at `path`, once its configuration agrees."""
    where = str(path / STATE)
    state = jf.read_object(path / STATE)
    found = jf.required(state, "format", where)
    if found != FORMAT:
        raise ValueError(f"{where}: format={jf.short(found)} must be {FORMAT!r}; give a checkpoint of this version")
    steps = jf.as_integer(jf.required(state, "step", where), f"{where}: step", 0)
    if steps != steps_of(path):
        raise ValueError(f"{where}: step={steps} is not the {steps_of(path)} of its folder's name; restore it")
    jf.as_integer(jf.required(state, "world_size", where), f"{where}: world_size", 1)
    jf.as_object(jf.required(state, "schedule", where), f"{where}: schedule")
    origin = jf.as_string(state.get("origin", ""), f"{where}: origin")
    saved = jf.as_object(jf.required(state, "config", where), f"{where}: config")
    own = _same(path.parent.parent, Path(config.run.dir))
    for key, was, is_now in changed_keys(saved, config, DECIDES_WEIGHTS if own else OF_ANY_RUN, f"{where}: config"):
        remedy = "another run.dir" if own else "another checkpoint"
        raise ValueError(f"{key}={is_now!r} is not {was!r}, with which {path} was made; restore it, or give {remedy}")
    if steps > config.train.steps:
        raise ValueError(f"train.steps={config.train.steps} is below the {steps} steps of {path}; raise it")
    if not own and config.checkpoint.resume not in ("never", "auto") and _same(path, Path(config.checkpoint.resume)):
        origin = os.path.realpath(path)
    return Start(path=path, steps=steps, state=state, own=own, origin=origin)


def changed_keys(
    saved: Mapping[str, Any], config: Config, which: Sequence[str], where: str
) -> Iterator[tuple[str, Any, Any]]:
    """Keys of a configuration that was saved which are others now, of these sections or keys; those of places aside.

    A key that is newer than what was saved counts as what it is by default.
    """
    now, usual = asdict(config), asdict(Config())
    for name in which:
        section, _, only = name.partition(".")
        before = {**usual[section], **jf.as_object(saved.get(section, {}), f"{where}.{section}")}
        for key, was, is_now in _differences(before, now[section], section):
            if key not in MAY_CHANGE and (not only or key == name):
                yield key, was, is_now


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any, Any]]:
    """Dotted keys whose values differ, nested ones too."""
    for key in sorted({*before, *now}):
        was, is_now = before.get(key), now.get(key)
        if isinstance(was, Mapping) and isinstance(is_now, Mapping):
            yield from _differences(was, is_now, f"{where}.{key}")
        elif was != is_now:
            yield f"{where}.{key}", was, is_now
