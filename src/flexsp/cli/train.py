"""`flexsp train`: train as a TOML file says; any key is overridden by a dotted flag, `--train.steps 20`."""

from __future__ import annotations

import argparse
import sys
from typing import Any


def add_to(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "train", help="train a model (under torchrun)", description=__doc__
    )
    parser.add_argument("config", metavar="CONFIG.toml", help="sections [model] [data] [planner] [train] [run]")
    parser.set_defaults(run=run, takes_overrides=True)


def run(arguments: argparse.Namespace) -> int:
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error}: training needs torch and transformers; pip install 'flexsp[train]'") from None
    from flexsp.parallel import PlanMismatchError, RankError
    from flexsp.planner.service import PlannerError
    from flexsp.train.checkpoint import CheckpointError
    from flexsp.train.out_of_memory import OutOfMemoryError
    from flexsp.train.ranks import failure_explained, failure_of_another, first_to_say
    from flexsp.train.run import run_from_config

    try:
        return run_from_config(arguments.config, arguments.overrides)
    except ValueError as error:
        if first_to_say(str(error)):
            raise
        return 2
    except OutOfMemoryError as error:  # of this rank alone
        print(f"flexsp train: {error}", file=sys.stderr, flush=True)
        failure_explained()
        return 1
    except (CheckpointError, PlanMismatchError, PlannerError, RankError) as error:
        if first_to_say(str(error)):
            print(f"flexsp train: {error}", file=sys.stderr)
        return 1
    except RuntimeError:  # a collective that failed because another rank has ended: that one has said why
        if not failure_of_another():
            raise
        return 1
