"""How long work shows its progress, without knowing who looks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

Say = Callable[[str], None]
"""Says a line about the item at hand."""
Track = Callable[[Sequence[Any], str], Iterable[tuple[Any, Say]]]
"""Shows progress through items: hands out each with a way to say what became of it."""


def silent(items: Sequence[Any], what: str) -> Iterator[tuple[Any, Say]]:
    """A Track that shows nothing."""
    for item in items:
        yield item, lambda text: None
