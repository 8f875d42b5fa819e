"""`flexsp COMMAND`: dispatch, and the exit statuses: 0 done, 1 checked and found wanting, 2 bad input."""

from __future__ import annotations

import argparse
import io
import os
import shlex
import sys
from collections.abc import Sequence
from typing import NoReturn

import flexsp
from flexsp.cli import check, estimate, lengths, plan, profile, show, simulate, train, verify

COMMANDS = (plan, check, lengths, estimate, profile, show, simulate, train, verify)
MOST_ERROR = 2000
"""Characters of an error: what it quotes may be as long as a file."""


class Parser(argparse.ArgumentParser):
    """One whose errors are one line, as all of ours are."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {_one_line(message)}; see {self.prog} --help\n")


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(prog="flexsp", description="Train LLMs with mixed sequence-parallel degrees.")
    parser.add_argument("--version", action="version", version=f"flexsp {flexsp.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_to(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    for stream in (sys.stdout, sys.stderr):  # a name that the terminal's encoding lacks is no reason to fail
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    parser = make_parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and not getattr(arguments, "takes_overrides", False):
        parser.error(f"unrecognized arguments: {shlex.join(rest)}")
    arguments.overrides = rest
    try:
        return int(arguments.run(arguments))
    except ValueError as error:
        print(f"flexsp {arguments.command}: {_one_line(str(error))}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of a pipe has gone, `flexsp plan ... | head` say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(f"flexsp {arguments.command}: interrupted", file=sys.stderr)
        return 130


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= MOST_ERROR else f"{line[: MOST_ERROR // 2]} ... {line[-MOST_ERROR // 2 :]}"
