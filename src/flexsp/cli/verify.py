"""`flexsp verify`: train a small model of the same kind on the ranks at hand, and compare with one device."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

from flexsp.cli.allocator import grow_segments
from flexsp.cli.last_line import say_as


def add_to(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "verify",
        help="check that a model trains exactly (under torchrun)",
        description=f"{__doc__} Exits with 0 within the tolerance, 1 beyond it, 2 where the model is refused.",
    )
    parser.add_argument("config", metavar="CONFIG", help="a Hugging Face config: a directory or a JSON file")
    parser.add_argument("--layers", type=int, metavar="N", help="of the small model (default: one of each kind)")
    parser.add_argument("--dtype", choices=("float64", "float32", "bfloat16"), default="float64", help="(float64)")
    parser.add_argument(
        "--tolerance", type=float, metavar="T", help="relative, of loss and gradients (default: by the type)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    grow_segments()
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error}: verifying needs torch and transformers; pip install 'flexsp[train]'") from None
    from flexsp.train.board import first_to_say
    from flexsp.train.verify import VerifyRequest, verify_model

    try:
        return verify_model(
            VerifyRequest(
                config=arguments.config,
                layers=arguments.layers,
                dtype=arguments.dtype,
                tolerance=arguments.tolerance,
            ),
            partial(print, flush=True),
            say_as("verify"),
        )
    except ValueError as error:
        if first_to_say(str(error)):
            raise
        return 2
