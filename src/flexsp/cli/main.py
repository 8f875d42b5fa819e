"""`flexsp COMMAND`: dispatch, and the exit statuses: 0 done, 1 checked and found wanting, 2 bad input."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

import flexsp
from flexsp.cli import check, estimate, lengths, plan, profile, show, simulate, train, verify

COMMANDS = (plan, check, lengths, estimate, profile, show, simulate, train, verify)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal's encoding lacks is no reason to fail
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    parser = argparse.ArgumentParser(prog="flexsp", description="Train LLMs with mixed sequence-parallel degrees.")
    parser.add_argument("--version", action="version", version=f"flexsp {flexsp.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_to(commands)
    arguments, rest = parser.parse_known_args(argv)
    if rest and not getattr(arguments, "takes_overrides", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    arguments.overrides = rest
    try:
        return int(arguments.run(arguments))
    except ValueError as error:
        print(f"flexsp {arguments.command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of a pipe has gone, `flexsp plan ... | head` say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"flexsp {arguments.command}: interrupted", file=sys.stderr)
        return 130
