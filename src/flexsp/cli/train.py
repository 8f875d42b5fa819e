"""`flexsp train`: train as a TOML file says; any key is overridden by a dotted flag, `--train.steps 20`."""

from __future__ import annotations

import argparse
from typing import Any

from flexsp.cli.allocator import grow_segments
from flexsp.cli.last_line import say_as


def add_to(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "train", help="train a model (under torchrun)", description=__doc__
    )
    parser.add_argument("config", metavar="CONFIG.toml", help="its keys: src/flexsp/train/config.py")
    parser.set_defaults(run=run, takes_overrides=True)


def run(arguments: argparse.Namespace) -> int:
    grow_segments()
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error}: training needs torch and transformers; pip install 'flexsp[train]'") from None
    from flexsp.train.board import first_to_say
    from flexsp.train.run import run_from_config

    try:
        return run_from_config(arguments.config, arguments.overrides, say_as("train"))
    except ValueError as error:  # of the configuration; what goes wrong later, the run says itself
        if first_to_say(str(error)):
            raise
        return 2
