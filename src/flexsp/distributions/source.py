"""What a command takes as LENGTHS: the name of a distribution, or a file."""

from __future__ import annotations

import os
from pathlib import Path

from flexsp.distributions.table import find, names
from flexsp.lengths import LengthArray, read_lengths


def lengths_of(text: str, *, column: str | None, count: int, seed: int) -> LengthArray:
    """Lengths drawn from the distribution that `text` names, or read from the file that it names.

    Args:
        text: a name in `names()`, or a path that `read_lengths` reads (`-` is standard input).
        column: of a file of rows; None takes `input_ids` or `length`.
        count: how many to draw; a file is read whole, whatever it says.
        seed: of the draw.

    Raises:
        ValueError: a file of a distribution's name, a column of a distribution, neither file nor name, or the file is
            wrong.
    """
    if is_distribution(text):
        if column is not None:
            raise ValueError(f"column={column!r} must be left out: {text} is a distribution and has none")
        return find(text).draw(count, seed)
    if not Path(text).suffix and Path(text).name == text and text != "-" and not os.path.exists(text):
        raise ValueError(
            f"lengths={text!r} must be a file or a distribution, and there is no such file here; "
            f"give a path, or one of {', '.join(names())}"
        )
    return read_lengths(text, column)


def is_distribution(text: str) -> bool:
    """Is `text` the name of a distribution rather than a path?

    Raises:
        ValueError: it could be either, because a file of that name lies here.
    """
    if text not in names():
        return False
    if os.path.isfile(text):
        raise ValueError(
            f"lengths={text!r} is a file here and a distribution too; write ./{text} for the file, "
            f"or run elsewhere for the distribution"
        )
    return True
