"""Elements of HTML. Text is escaped where it becomes part of an element, so nobody has to think of it."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence

VOID = ("img", "meta")
"""Elements without an end."""


class Markup(str):
    """HTML, as it is."""

    __slots__ = ()


def tag(element: str, /, *children: str, **attributes: str) -> Markup:
    """An element. Children that are no `Markup` are text; `class_` is the attribute class."""
    told = "".join(f' {key.rstrip("_")}="{escaped(value)}"' for key, value in attributes.items())
    if element in VOID:
        return Markup(f"<{element}{told}>")
    return Markup(f"<{element}{told}>{joined(children)}</{element}>")


def joined(children: Iterable[str]) -> Markup:
    return Markup("".join(child if isinstance(child, Markup) else escaped(child) for child in children))


def escaped(text: str) -> Markup:
    """`text` with entities for what means something in HTML; control characters and halves of characters go."""
    whole = text.encode("utf-8", "replace").decode()
    return Markup(html.escape("".join(c for c in whole if c.isprintable() or c.isspace()), quote=True))


def table(head: Sequence[str], rows: Iterable[Sequence[str]], caption: str, words: Sequence[int] = (0,)) -> Markup:
    """A table whose first column names its rows, in a box that scrolls where it is too wide.

    Args:
        head: names of columns.
        rows: cells, two or more; the last one of a row spans the columns that the row lacks.
        caption: what the table shows.
        words: columns of words; all others are of figures.
    """

    def cell(kind: str, column: int, text: str, **attributes: str) -> Markup:
        return tag(kind, text, **attributes, **({"class_": "words"} if column in words else {}))

    def row(cells: Sequence[str]) -> Markup:
        first, *middle, last = cells
        span = {"colspan": str(len(head) - len(cells) + 1), "class_": "words"} if len(cells) < len(head) else {}
        return tag(
            "tr",
            cell("th", 0, first, scope="row"),
            *(cell("td", column, text) for column, text in enumerate(middle, 1)),
            tag("td", last, **span) if span else cell("td", len(head) - 1, last),
        )

    heads = tag("tr", *(cell("th", column, text, scope="col") for column, text in enumerate(head)))
    body = Markup("\n".join(row(cells) for cells in rows))
    inner = tag("table", tag("caption", caption), tag("thead", heads), tag("tbody", body))
    return tag("div", inner, class_="wide")
