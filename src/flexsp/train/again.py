"""What the same command does once a run has been stopped, in the words that its last line ends with."""

from __future__ import annotations

from flexsp.train.config import Config
from flexsp.train.resume import Start

UNKNOWN = "start the same command again"
"""Before the run has looked for a checkpoint."""


def same_command(config: Config, start: Start | None, saved: bool) -> str:
    """
    Args:
        config: of the run.
        start: the checkpoint that it went on from, if any.
        saved: whether its folder holds a checkpoint by now.
    """
    if saved and config.checkpoint.resume == "never":  # which refuses a folder that holds a checkpoint
        return "with checkpoint.resume='auto' it goes on"
    if saved:
        return "the same command goes on"
    return (
        "the same command begins at step 0" if start is None else f"the same command goes on after step {start.steps}"
    )
