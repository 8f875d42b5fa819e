"""One call of a command or of the library, and whether it ended as it may."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from flexsp.cli.main import main, make_parser

PARSER = cache(make_parser)
"""The same for all inputs: making it takes longer than most commands."""


class Broken(Exception):
    """A property does not hold; the message says which."""


@dataclass(frozen=True)
class Tried:
    """How one input ended."""

    accepted: bool
    what: str
    """What was changed."""


@dataclass(frozen=True)
class Said:
    status: int
    out: str
    err: str


class Refused:
    """What the library says instead of a value."""

    def __init__(self, text: str) -> None:
        self.text = text


def library(call: Callable[[], Any], names: Iterable[str]) -> Any:
    """The value of a call, or `Refused` after a ValueError of one line that names one of `names`."""
    try:
        return call()
    except ValueError as error:
        if type(error) is not ValueError:
            raise Broken(f"{type(error).__name__} instead of a ValueError of ours: {error}") from error
        one_line(str(error), names)
        return Refused(str(error))


def command(argv: list[str], names: Iterable[str], stdin: bytes = b"") -> Said:
    """Runs `flexsp ARGV` in this process. It ends with 0, 1 or 2, and then with one line that names one of `names`.

    Raises:
        Broken: it does not.
    """
    said = _run(argv, stdin)
    if said.status not in (0, 1, 2):
        raise Broken(f"status {said.status}: {said.err[-300:]}")
    if "Traceback" in said.err:
        raise Broken(f"a traceback: {said.err[-500:]}")
    if said.status == 2:
        notices = ("flexsp simulate: left out:", "flexsp simulate: policies ")  # beside an error
        one_line("\n".join(line for line in said.err.splitlines() if not line.startswith(notices)), names)
    return said


def _run(argv: list[str], stdin: bytes) -> Said:
    out, err = io.BytesIO(), io.BytesIO()
    given = io.TextIOWrapper(io.BytesIO(stdin), encoding="utf-8")
    said = [io.TextIOWrapper(each, encoding="utf-8", write_through=True) for each in (out, err)]
    with (
        patch.multiple(sys, stdin=given, stdout=said[0], stderr=said[1]),
        patch("flexsp.simulate.runs.ProcessPoolExecutor", _Here),
        patch("flexsp.cli.main.make_parser", PARSER),
    ):
        try:
            status = main(argv)
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 99
    return Said(status, out.getvalue().decode(errors="replace"), err.getvalue().decode(errors="replace"))


class _Here:
    """A pool of no processes: a call is done where it is submitted."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def submit(self, call: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        try:
            future.set_result(call(*arguments))
        except BaseException as error:
            future.set_exception(error)
        return future

    def shutdown(self, **_: Any) -> None:
        pass


def one_line(text: str, names: Iterable[str]) -> None:
    """
    Raises:
        Broken: it has not one line, is very long, or names nothing of the input.
    """
    if not text.strip() or "\n" in text.strip():
        raise Broken(f"{len(text.splitlines())} lines instead of one: {text[:500]}")
    if len(text) > 4000:
        raise Broken(f"a line of {len(text)} characters: {text[:200]}")
    names = [" ".join(name[:100].split()) for name in names if name.strip()]
    if not any(name in text for name in names):
        raise Broken(f"names nothing of the input ({', '.join(names)[:100]}): {text[:300]}")


def expect(refused: bool, fault: str | None, said: str = "") -> None:
    """
    Raises:
        Broken: what breaks the schema was accepted.
    """
    if fault is not None and not refused:
        raise Broken(f"accepted although {fault} {said}")


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
