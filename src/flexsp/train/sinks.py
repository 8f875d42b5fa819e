"""Where a run's metrics go beside metrics.jsonl: TensorBoard's event files, Weights & Biases.

Both get the numbers of each row under the tags of `flexsp.watch.tags`. A sink that fails while the run goes on is left
out from then on, with one warning: metrics.jsonl has it all.
"""

from __future__ import annotations

import importlib.util
import logging
import secrets
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from flexsp.train.config import Config
from flexsp.watch.tags import scalars

log = logging.getLogger(__name__)

EVENTS = "tensorboard"
"""The folder of event files in that of the run."""
WANDB_ID = "wandb_id.txt"
"""In the folder of the run: the id under which Weights & Biases knows it, the same when it goes on."""

STEP = "step"
"""What Weights & Biases draws over."""
FINISH_S = 3.0
"""How long the word on an error may wait for Weights & Biases to end its run."""


ThreadHook = Callable[[threading.ExceptHookArgs], object]


class Sink(Protocol):
    name: str

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Numbers of a step, by tag."""

    def close(self, failed: bool) -> None:
        """The run ends. `failed`: by an error."""


class TensorBoard:
    """Event files. Each step is flushed: what a checkpoint has is in them, whatever ends the run."""

    name = "tensorboard"

    def __init__(self, folder: Path, first_step: int) -> None:
        """
        Args:
            folder: of event files.
            first_step: steps from this one on that are there already do not show: they are trained again.
        """
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder), purge_step=first_step)
        threading.excepthook = _without_tensorboard(threading.excepthook)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


def _without_tensorboard(hook: ThreadHook) -> ThreadHook:
    """A hook that leaves out what ends TensorBoard's own thread: `write` raises it too, and a warning says it once."""

    def said(arguments: threading.ExceptHookArgs) -> None:
        its_own = type(arguments.thread).__module__.startswith("tensorboard.")
        if not (its_own and issubclass(arguments.exc_type, OSError)):
            hook(arguments)

    return said


class WeightsAndBiases:
    """One run of a project, the same when the run goes on.

    Its own count of rows only grows: a row for a step that it has is dropped. So it counts by itself, the step is a
    metric beside the others, and they are drawn over it. Steps that were trained again are there twice.
    """

    name = "wandb"

    def __init__(self, project: str, folder: Path, append: bool, config: Mapping[str, Any]) -> None:
        """
        Args:
            project: of Weights & Biases.
            folder: of the run.
            append: whether the run goes on; else it is a new one there too.
            config: what to show as the run's configuration.

        Raises:
            ValueError: it cannot begin: not logged in, say.
        """
        import wandb

        path = folder / WANDB_ID
        known = path.read_text(encoding="utf-8").strip() if append and path.exists() else ""
        if not known:
            known = secrets.token_hex(4)
            path.write_text(known + "\n", encoding="utf-8")
        try:
            self._run = wandb.init(project=project, dir=str(folder), id=known, resume="allow", config={**config})
            self._run.define_metric(STEP)
            self._run.define_metric("*", step_metric=STEP)
        except Exception as error:  # of its own kinds
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(
                f"watch.wandb={project!r}: wandb.init failed ({said}); log in with 'wandb login', or set "
                f"WANDB_MODE=offline"
            ) from None

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, STEP: step})

    def close(self, failed: bool) -> None:
        if not failed:
            self._run.finish(exit_code=0)
            return
        thread = threading.Thread(target=self._fail, name="flexsp-wandb", daemon=True)  # it may send for minutes
        thread.start()
        thread.join(FINISH_S)

    def _fail(self) -> None:
        with suppress(Exception):  # the run ends by another error, which is the one to say
            self._run.finish(exit_code=1)


class Sinks:
    """The sinks of this process; none on other ranks than 0."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks

    @property
    def names(self) -> list[str]:
        return [sink.name for sink in self._sinks]

    def write(self, row: Mapping[str, Any]) -> None:
        """A row of metrics.jsonl."""
        if self._sinks:
            values = scalars(row)
            for sink in list(self._sinks):
                self._try(sink, lambda sink=sink: sink.write(row["step"], values))

    def close(self, failed: bool) -> None:
        for sink in list(self._sinks):
            self._try(sink, lambda sink=sink: sink.close(failed))
        self._sinks = []

    def _try(self, sink: Sink, what: Any) -> None:
        try:
            what()
        except Exception as error:  # whatever it is, training goes on
            self._sinks.remove(sink)
            said = " ".join(f"{type(error).__name__}: {error}".split())
            log.warning("watch: %s failed (%s) and gets no more; metrics.jsonl goes on", sink.name, said)


def check_sinks(config: Config) -> None:
    """Refuses sinks whose packages are not installed.

    Raises:
        ValueError: names the key and the package.
    """
    if config.watch.tensorboard and not _installed("tensorboard"):
        raise ValueError("watch.tensorboard=true needs tensorboard; pip install 'flexsp[tensorboard]'")
    if config.watch.wandb and not _installed("wandb"):
        raise ValueError(f"watch.wandb={config.watch.wandb!r} needs wandb; pip install wandb")


def open_sinks(config: Config, folder: Path, first_step: int, append: bool) -> Sinks:
    """The sinks that the configuration names. On rank 0 alone.

    Raises:
        ValueError: Weights & Biases cannot begin.
    """
    sinks: list[Sink] = []
    if config.watch.tensorboard:
        sinks.append(TensorBoard(folder / EVENTS, first_step))
    if config.watch.wandb:
        sinks.append(WeightsAndBiases(config.watch.wandb, folder, append, asdict(config)))
    return Sinks(sinks)


def _installed(package: str) -> bool:
    """A folder of that name, such as the one that wandb writes to, is no package."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None
