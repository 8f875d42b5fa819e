"""All that looks on while a run trains: the ranks' logs, the records of each step, other sinks, the summary."""

from __future__ import annotations

import logging
import time
from contextlib import ExitStack
from pathlib import Path

import torch.distributed as dist
from rich import box
from rich.table import Table
from rich.text import Text

from flexsp import jsonfields
from flexsp.parallel import GroupPool
from flexsp.parallel.control import from_first_rank
from flexsp.train.checkpoint import saved_checkpoints
from flexsp.train.config import Config
from flexsp.train.display import Display
from flexsp.train.rank_logs import FOLDER, RankLog
from flexsp.train.records import Records
from flexsp.train.sinks import Sinks, open_sinks
from flexsp.watch.rows import METRICS, last_rows
from flexsp.watch.summary import KEYS, lines, summary

log = logging.getLogger(__name__)

SUMMARY = "summary.json"


class Watch:
    """Looks on, while inside; on all ranks, of which rank 0 alone writes but for the logs."""

    def __init__(self, config: Config, display: Display, groups: GroupPool, first_step: int, append: bool) -> None:
        """A collective.

        Args:
            config: of the run, whose folder exists.
            display: what a person sees.
            groups: the pool.
            first_step: with which the run begins or goes on.
            append: whether it goes on; else it begins, and what is in the folder is overwritten.

        Raises:
            ValueError: a sink cannot begin.
        """
        self.display = display
        self._config, self._groups, self._folder = config, groups, Path(config.run.dir)
        self._first_step, self._append = first_step, append
        self._began = time.monotonic()
        self._log = RankLog(self._folder, dist.get_rank())
        self._sinks = Sinks([])
        self._stack = ExitStack()

    def __enter__(self) -> Watch:
        with ExitStack() as stack:
            stack.enter_context(self._log)
            from_first_rank(self._open_sinks, self._groups)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._sinks.close(failed=kind is not None)
        self._stack.__exit__(kind, *rest)  # type: ignore[arg-type]

    def _open_sinks(self) -> None:
        self._sinks = open_sinks(self._config, self._folder, self._first_step, self._append)

    def records(self) -> Records:
        """What is written down at each step."""
        return Records(self._folder, self._append, self._sinks)

    def begin(self, step: int) -> None:
        """A step begins."""
        self._log.begin(step)

    def summarize(self) -> None:
        """Says what the run came to, and writes it down; once the run has ended, by itself or by a request to stop."""
        path = self._folder / METRICS
        if dist.get_rank() != 0 or not path.exists():
            return
        saved = saved_checkpoints(self._folder)
        found = {
            **summary(last_rows(path, KEYS), self._config.train.steps),
            "steps_before": self._first_step,
            "wall_s": time.monotonic() - self._began,
            "checkpoint": str(saved[-1]) if saved else None,
            "folder": str(self._folder),
            "files": [METRICS, SUMMARY, *self._sinks.names, FOLDER],
        }
        self._say(lines(found))
        jsonfields.write_object(self._folder / SUMMARY, jsonfields.finite(found))

    def _say(self, said: list[tuple[str, str]]) -> None:
        if not self.display.console.is_terminal:
            for what, text in said:
                log.info("summary: %s: %s", what, text)
            return
        table = Table(box=box.ROUNDED, show_header=False, title="summary", title_style="bold")
        for what, text in said:
            table.add_row(Text(what, style="dim"), Text(text))
        self.display.console.print(table)
