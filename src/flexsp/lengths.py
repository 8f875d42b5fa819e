"""Reading the lengths of a global batch, in tokens."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

Lengths = Sequence[int] | npt.NDArray[np.integer]
LengthArray = npt.NDArray[np.int64]


def as_lengths(lengths: Lengths, where: str = "lengths") -> LengthArray:
    """`lengths` as a (K,) int64 array.

    Raises:
        ValueError: no lengths, not one-dimensional, not integers, or one below 1.
    """
    array = np.asarray(lengths)
    if array.ndim != 1:
        raise ValueError(f"{where}: shape={array.shape} must have one dimension; give one length per sequence")
    if array.size == 0:
        raise ValueError(f"{where}: there are no lengths; give at least one")
    if not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{where}: dtype={array.dtype} must be an integer type; lengths are counts of tokens")
    if array.min() < 1:
        index = int(np.argmax(array < 1))
        raise ValueError(f"{where}[{index}]={array[index]} must be at least 1 token; remove empty sequences")
    return array.astype(np.int64)


def read_lengths(path: str | Path) -> LengthArray:
    """Lengths from a text file of one integer a line, a `.npy` file, or standard input (`-`).

    Raises:
        ValueError: the file cannot be read or a length is malformed; the message names file and line.
    """
    name = str(path)
    if name == "-":
        return _parse_lines(sys.stdin, "standard input")
    try:
        if name.endswith(".npy"):
            return as_lengths(np.load(name, allow_pickle=False), name)
        with open(name, encoding="utf-8") as lines:
            return _parse_lines(lines, name)
    except OSError as error:
        raise ValueError(f"{name}: cannot be read ({error.strerror}); give a file of one length a line") from None
    except UnicodeDecodeError:
        raise ValueError(f"{name}: is not text; give one length a line, or a .npy file named so") from None
    except (ValueError, EOFError) as error:
        text = str(error)
        raise ValueError(
            text if text.startswith(name) else f"{name}: is no .npy array ({text}); save it again"
        ) from None


def _parse_lines(lines: Iterable[str], name: str) -> LengthArray:
    lengths = []
    for number, line in enumerate(lines, start=1):
        text = line.strip()
        if not text:
            continue
        if not (text.isascii() and text.isdigit()) or int(text) < 1 or int(text) > np.iinfo(np.int64).max:
            raise ValueError(f"{name}:{number}: length={text[:40]!r} must be a positive integer; give one a line")
        lengths.append(int(text))
    return as_lengths(np.array(lengths, dtype=np.int64), name)


def parse_tokens(text: str | int, where: str) -> int:
    """A number of tokens: an integer, or one with the suffix K (1024 tokens), e.g. 192K."""
    if isinstance(text, int) and not isinstance(text, bool) and text > 0:
        return text
    digits = str(text)
    factor = 1
    if digits[-1:] in ("K", "k"):
        digits, factor = digits[:-1], 1024
    if not (digits.isascii() and digits.isdigit()) or int(digits) == 0:
        raise ValueError(f"{where}={text!r} must be a positive number of tokens; write it like 4096 or 4K (1024 each)")
    return int(digits) * factor


def lengths_sha256(lengths: Lengths) -> str:
    """SHA-256 of the lengths as little-endian 64-bit integers: names the batch a plan was made for."""
    return hashlib.sha256(as_lengths(lengths).astype("<i8").tobytes()).hexdigest()
