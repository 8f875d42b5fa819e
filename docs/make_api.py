"""Writes docs/api.md from the docstrings of the public names: `make api`. A test keeps page and docstrings together."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType
from typing import Any

PAGE = Path(__file__).parent / "api.md"
MODULES = ("flexsp", "flexsp.parallel", "flexsp.data", "flexsp.profiler", "flexsp.estimate", "flexsp.distributions")
HEAD = """# The public names

Made by `make api` from the docstrings. What is not here may change without notice. `flexsp`, `flexsp.estimate` and
`flexsp.distributions` need no torch. Loops that use these names are in [examples/](../examples);
[own_loop.md](own_loop.md) says what one must do.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for name in MODULES:
        module = importlib.import_module(name)
        parts.append(f"## {name}\n\n{inspect.getdoc(module)}\n")
        parts += [entry(public, getattr(module, public)) for public in sorted(module.__all__, key=str.lower)]
    return "\n".join(parts)


def entry(name: str, item: Any) -> str:
    """One public name: signature, docstring, fields, methods."""
    if not callable(item):
        return f"### {name}\n\n`{item!r}`\n"
    lines = [f"### {name}", "", "```python", signature(name, item), "```", "", *described(inspect.getdoc(item) or "")]
    if inspect.isclass(item):
        lines += [*fields(item), *methods(item)]
    return "\n".join(lines).rstrip() + "\n"


def signature(name: str, item: Any, split: bool = True) -> str:
    """As it would be written; an argument a line where it is long and may be split."""
    if inspect.isclass(item) and (dataclasses.is_dataclass(item) or issubclass(item, (enum.Enum, Exception))):
        return f"class {name}"
    kind = "class " if inspect.isclass(item) else ""
    try:
        said = inspect.signature(item)
    except (ValueError, TypeError):
        return f"{kind}{name}"
    own = [each for each in said.parameters.values() if each.name not in ("self", "cls")]
    text = plain(f"{kind}{name}{said.replace(parameters=own)}")
    if len(text) <= 100 or not split:
        return text
    arguments = [str(each) for each in own]
    star = next((i for i, each in enumerate(own) if each.kind is each.KEYWORD_ONLY), None)
    if star is not None and not any(each.kind is each.VAR_POSITIONAL for each in own):
        arguments.insert(star, "*")
    back = "" if said.return_annotation is said.empty else f" -> {said.return_annotation}"
    return plain(f"{kind}{name}(\n" + "".join(f"    {each},\n" for each in arguments) + f"){back}")


def plain(text: str) -> str:
    """Without the quotes of annotations that are strings, and without addresses."""
    text = re.sub(r" at 0x[0-9a-f]+", "", text)
    return re.sub(r"(: |-> )'([^'\n]*)'", r"\1\2", text)


def described(doc: str) -> Iterator[str]:
    """A docstring as Markdown: what is indented stays as it is, in a block."""
    prose, _, rest = doc.partition("\n\n")
    yield prose
    if rest:
        yield from ("", "```text", rest, "```")
    yield ""


def fields(item: type) -> Iterator[str]:
    """What a class declares, with the string under each: fields, members of an enumeration, attributes.

    Of a Protocol these are the attributes that it requires.
    """
    said = strings_under(item)
    if dataclasses.is_dataclass(item):
        for each in dataclasses.fields(item):
            yield f"- `{each.name}: {each.type}`" + (f": {said[each.name]}" if each.name in said else "")
        yield ""
    elif issubclass(item, enum.Enum):
        for member in item:
            yield f"- `{member.name}` = `{member.value!r}`" + (f": {said[member.name]}" if member.name in said else "")
        yield ""
    elif declared := {name: kind for name, kind in inspect.get_annotations(item).items() if not name.startswith("_")}:
        for name, kind in declared.items():
            yield f"- `{name}: {kind}`" + (f": {said[name]}" if name in said else "")
        yield ""


def strings_under(item: type) -> dict[str, str]:
    """The docstring that stands under each field in the source."""
    found = re.findall(r'^    (\w+)(?::|\s=)[^\n]*\n    """(.*?)"""', inspect.getsource(item), re.M | re.S)
    return {name: " ".join(text.split()) for name, text in found}


def methods(item: type) -> Iterator[str]:
    """The public methods and properties that the class itself has."""
    for name, member in vars(item).items():
        called = member.__func__ if isinstance(member, classmethod) else member
        if name.startswith("_") and name != "__init__":
            continue
        if isinstance(called, property):
            said = " ".join((inspect.getdoc(called) or "").split())
            yield f"- `.{name}`" + (f": {said}" if said else "")
        elif isinstance(called, FunctionType) and inspect.getdoc(called) and not generated(item, name):
            yield f"- `{signature(item.__name__ if name == '__init__' else '.' + name, called, split=False)}`"
            yield from ("", "  ```text", *("  " + line for line in (inspect.getdoc(called) or "").split("\n")), "  ```")
    yield ""


def generated(item: type, name: str) -> bool:
    return name == "__init__" and dataclasses.is_dataclass(item)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE.name}: {len(page().splitlines())} lines")
