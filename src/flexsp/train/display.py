"""What a person sees of a run: log lines, and a progress bar where there is a terminal. Rank 0 alone speaks."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch.distributed as dist
from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flexsp.train.rank_logs import Aloud

Item = TypeVar("Item")


class Display:
    """The log and the bar of this process; silent on every rank but 0."""

    def __init__(self) -> None:
        self.console = Console(quiet=dist.get_rank() != 0)
        self.log = logging.getLogger("flexsp")
        self._handler: logging.Handler = logging.NullHandler()
        if self.console.is_terminal:  # above the bar
            self._handler = RichHandler(
                console=self.console, show_time=False, show_level=False, show_path=False, highlighter=NullHighlighter()
            )
        elif not self.console.quiet:
            self._handler = Aloud(sys.stdout)
        self._handler.setFormatter(logging.Formatter("%(message)s"))

    def __enter__(self) -> Display:
        self.log.addHandler(self._handler)
        self.log.setLevel(logging.INFO)
        self.log.propagate = False
        return self

    def __exit__(self, *_: object) -> None:
        self.log.removeHandler(self._handler)

    def track(self, items: Iterable[Item], total: int, what: str, done: int = 0) -> Iterator[tuple[Item, StepLine]]:
        """Each item with a StepLine, on which to say what became of it; `done` of the total are behind already."""
        with Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=16), MofNCompleteColumn(), TimeElapsedColumn(),
            TimeRemainingColumn(), TextColumn("{task.fields[said]}"),
            console=self.console, disable=not self.console.is_terminal or self.console.quiet,
        ) as bar:  # fmt: skip
            task = bar.add_task(what, total=total, completed=done, said="")
            for count, item in enumerate(items, start=done + 1):
                line = StepLine()
                yield item, line
                bar.update(task, completed=count, said=line.text)
                if bar.disable and line.text:
                    self.log.info("%s %d/%d: %s", what, count, total, line.text)

    def tell(self, items: Sequence[Any], what: str) -> Iterator[tuple[Any, Callable[[str], None]]]:
        """Each item with a function that says what became of it: `track` as the profiler wants it."""
        for item, line in self.track(items, len(items), what):
            yield item, line.say


class StepLine:
    """What is said about one step."""

    text = ""

    def say(self, text: str) -> None:
        self.text = text


def step_text(metrics: Mapping[str, Any], plan: str) -> str:
    """One step in a line."""
    return f"loss {metrics['loss']:.3f}, {metrics['tokens_per_s']:,.0f} tokens/s, {plan}"
