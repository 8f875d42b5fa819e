"""Where a run begins: at step 0, or after the steps of a checkpoint that the configuration allows to go on from."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from flexsp import jsonfields as jf
from flexsp.data import TokenStore
from flexsp.profile import Profile
from flexsp.train.checkpoint import FORMAT, saved_checkpoints, steps_of
from flexsp.train.config import Config
from flexsp.train.digests import STATE

DECIDES_WEIGHTS = ("model", "data", "train")
"""Sections that must be the same when a run goes on; plans, folders and times may differ."""
PLACES = (
    "data.cache_dir",
    "data.workers",
    "model.activation_checkpointing",
    "model.attention",
    "model.loss_chunk_tokens",
    "model.replicate",
    "model.reshard_after_forward",
    "model.shard_layers",
)
"""Keys of those sections that say where model and tokens lie, not what they are: other ranks may need others."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """A checkpoint to go on from."""

    path: Path
    steps: int
    """Done so far."""
    state: dict[str, Any]
    """Its state.json."""

    @property
    def profile(self) -> Profile:
        """What the run had learned."""
        return Profile.from_json(jf.required(self.state, "profile", str(self.path)), f"{self.path / STATE}: profile")


def find_start(config: Config) -> Start | None:
    """What `checkpoint.resume` says; None begins at step 0.

    Raises:
        ValueError: `never` in a folder with checkpoints; no checkpoint at the path; or one of another configuration.
    """
    resume, folder = config.checkpoint.resume, Path(config.run.dir)
    saved = saved_checkpoints(folder)
    if resume == "never":
        if saved:
            raise ValueError(
                f"checkpoint.resume='never', but run.dir={config.run.dir!r} holds checkpoints, the last of step "
                f"{steps_of(saved[-1])}; give another run.dir, or remove {saved[-1].parent}"
            )
        return None
    if resume == "auto":
        return _read(saved[-1], config, DECIDES_WEIGHTS) if saved else None
    path = Path(resume)
    if not os.path.isfile(path / STATE) or steps_of(path) < 0:
        raise ValueError(
            f"checkpoint.resume={resume!r} must be 'auto', 'never' or the path of a checkpoint, a folder "
            f"step-... that holds {STATE}; there is none at that path"
        )
    own = any(path.resolve() == one.resolve() for one in saved)
    if saved and steps_of(saved[-1]) > (steps_of(path) if own else -1):
        raise ValueError(
            f"checkpoint.resume={resume!r}, but run.dir={config.run.dir!r} holds {saved[-1]}, which the next start "
            f"would take; remove it or give another run.dir"
        )
    return _read(path, config, DECIDES_WEIGHTS if own else ("model",))


def check_data(config: Config, start: Start | None, corpus: TokenStore) -> None:
    """Whether a run that goes on in its own folder sees the tokens that it began with.

    Raises:
        ValueError: others; the message names the files that changed, as far as is known.
    """
    now = corpus.identity()
    if start is None or start.path.parent.parent.resolve() != Path(config.run.dir).resolve():
        return
    where = f"{start.path / STATE}: data"
    before = jf.as_object(start.state.get("data", {}), where)  # an older checkpoint has none
    if not before or before.get("fingerprint") == now["fingerprint"]:
        return
    was = jf.as_object(before.get("files", {}), f"{where}.files")
    changed = [name for name in {**was, **now["files"]} if was.get(name) != now["files"].get(name)]
    which = f"{', '.join(changed[:3])}{' and others' if len(changed) > 3 else ''} changed"
    if not (was and now["files"]):
        which = "files changed"
    elif not changed:
        which = "the files are the same, and the tokenizer or its chat template changed"
    raise ValueError(
        f"data.source={config.data.source!r} holds other tokens than those with which {start.path} was made: {which}; "
        f"restore them, or give another run.dir"
    )


def _read(path: Path, config: Config, sections: tuple[str, ...]) -> Start:
    """The checkpoint at `path`, once its configuration agrees in these sections."""
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
    saved = jf.as_object(jf.required(state, "config", where), f"{where}: config")
    now, usual = asdict(config), asdict(Config())
    for section in sections:
        before = {**usual[section], **jf.as_object(saved.get(section, {}), f"{where}: config.{section}")}
        for key, was, is_now in _differences(before, now[section], section):
            if key in PLACES:
                continue
            raise ValueError(
                f"{key}={is_now!r} is not {was!r}, with which {path} was made; restore it, or give another run.dir"
            )
    if steps > config.train.steps:
        raise ValueError(f"train.steps={config.train.steps} is below the {steps} steps of {path}; raise it")
    return Start(path=path, steps=steps, state=state)


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> Iterator[tuple[str, Any, Any]]:
    """Dotted keys whose values differ, nested ones too."""
    for key in sorted({*before, *now}):
        was, is_now = before.get(key), now.get(key)
        if isinstance(was, Mapping) and isinstance(is_now, Mapping):
            yield from _differences(was, is_now, f"{where}.{key}")
        elif was != is_now:
            yield f"{where}.{key}", was, is_now
