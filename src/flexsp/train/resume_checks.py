"""What a run that goes on looks at beside its checkpoint: its data, their order, its log, the versions of packages."""

from __future__ import annotations

import logging
from pathlib import Path

from flexsp import jsonfields as jf
from flexsp.data import TokenStore
from flexsp.data.packing import IntArray
from flexsp.train.checkpoint import ids_sha256, steps_of, versions
from flexsp.train.config import Config
from flexsp.train.digests import STATE
from flexsp.train.records import SEQUENCES
from flexsp.train.resume import Start, changed_keys
from flexsp.watch.rows import last_rows

log = logging.getLogger(__name__)

ORDER = ("train.seed", "train.batch_size", "data.held_out", "data.max_length", "data.overlong")
"""What decides, with the tokens, which sequences a step trains."""


def check_data(config: Config, start: Start | None, corpus: TokenStore) -> None:
    """Whether a run that goes on in its own folder sees the tokens that it began with.

    Raises:
        ValueError: others; the message names the files that changed, as far as is known.
    """
    now = corpus.identity()
    if start is None or not start.own:
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
        which = "the files are the same, and the tokenizer, its chat template or what flexsp leaves out changed"
    raise ValueError(
        f"data.source={config.data.source!r} holds other tokens than those with which {start.path} was made: {which}; "
        f"restore them, or give another run.dir"
    )


def check_order(config: Config, start: Start, next_ids: IntArray) -> None:
    """Whether the next step of a run that goes on in its own folder is the one that its checkpoint foresaw.

    Raises:
        ValueError: its sequences are others, so that some would be trained twice and others never.
    """
    foreseen = start.state.get("next_ids_sha256", "")  # an older checkpoint has none
    if not start.own or not foreseen or foreseen == ids_sha256(next_ids):
        return
    was, now = jf.as_object(start.state.get("versions", {}), "versions"), versions()["numpy"]
    why = f"with numpy {now} instead of {was.get('numpy')}; install that one"
    if was.get("numpy") == now:
        why = f"as flexsp {was.get('flexsp')}, which saved it, left out other documents; go on with that very one"
    raise ValueError(
        f"train.seed={config.train.seed} gives step {start.steps} other sequences than {start.path} foresaw, {why}, or "
        f"give another run.dir"
    )


def say_passed_over(config: Config, start: Start | None, fingerprint: str, num_sequences: int) -> None:
    """Warns where a run takes up another run's step, but not the data of which that was the position.

    Args:
        config: of the run.
        start: the checkpoint, if any.
        fingerprint: of the tokens; see `TokenStore.fingerprint`.
        num_sequences: of one pass over the data.
    """
    if start is None or start.own or not start.steps:
        return
    where = str(start.path / STATE)
    saved = jf.as_object(jf.required(start.state, "config", where), f"{where}: config")
    changed = [
        f"{key}={is_now!r} instead of {jf.short(was)}"
        for key, was, is_now in changed_keys(saved, config, ORDER, f"{where}: config")
    ]
    before = jf.as_object(start.state.get("data", {}), f"{where}: data")  # an older checkpoint has none
    if before and before.get("fingerprint") != fingerprint:
        changed.insert(0, "other data")
    if not changed:
        return
    log.warning(
        "checkpoint: %s was trained on data in another order (now %s); its step %d is taken over, so that the first %s "
        "sequences of the new order, of %s in a pass, are passed over; to begin the data at 0, give the model that the "
        "run saved as model.path instead of checkpoint.resume",
        start.path, ", ".join(changed), start.steps, f"{start.steps * config.train.batch_size:,}", f"{num_sequences:,}",
    )  # fmt: skip


def say_missing_rows(start: Start) -> None:
    """Warns where a run goes on in its own folder whose log does not tell what each step so far has trained."""
    if not start.own:
        return
    path = start.path.parent.parent / SEQUENCES
    steps = range(max(0, steps_of(Path(start.origin))), start.steps)  # those before are in another run's log
    try:
        rows = last_rows(path, keys=())
    except ValueError as error:
        log.warning("checkpoint: %s; what was trained before step %d is not proven", error, start.steps)
        return
    if missing := [step for step in steps if step not in rows]:
        log.warning(
            "checkpoint: %s has no row of %d of the %d steps before %d, the first is step %d; what they trained is not "
            "proven: a loss of power may have taken them, or the file was changed",
            path, len(missing), len(steps), start.steps, missing[0],
        )  # fmt: skip


def say_versions(start: Start) -> None:
    """Warns where other versions than those of its checkpoint go on with a run."""
    where = f"{start.path / STATE}: versions"
    before = jf.as_object(start.state.get("versions", {}), where)
    changed = [
        f"{name} {jf.short(before[name])} -> {now}" for name, now in versions().items() if before.get(name, now) != now
    ]
    if changed:
        log.warning(
            "checkpoint: other versions than those that saved it: %s; sums may be rounded otherwise", ", ".join(changed)
        )
