"""Reading JSON files field by field, so that a wrong one is an error that names the file, the field and the rule."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_object(path: str | Path) -> dict[str, Any]:
    """The JSON object in the file `path`.

    Raises:
        ValueError: the file cannot be read, is not JSON, or holds something else than an object.
    """
    try:
        document = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give the path of a JSON file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: is not JSON ({error}); give a file written by flexsp or by hand as JSON") from None
    return as_object(document, str(path))


def write_object(path: str | Path, document: Mapping[str, Any]) -> None:
    """Writes `document` to `path`, aside and then renamed, so that a reader never sees half a file."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.tmp")
        aside.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        aside.replace(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror}); give a path in a writable folder") from None


def as_object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}={_short(value)} must be a JSON object; write it as {{...}}")
    return value


def as_list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{where}={_short(value)} must be a JSON list; write it as [...]")
    return value


def as_integer(value: Any, where: str, least: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{where}={_short(value)} must be an integer; write it without quotes or a fraction")
    if least is not None and value < least:
        raise ValueError(f"{where}={value} must be at least {least}; correct it")
    return value


def as_number(value: Any, where: str, positive: bool = False) -> int | float:
    """A finite number, at least 0 (above 0 if `positive`); integers stay integers, so byte counts stay exact."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{where}={_short(value)} must be a finite number; write it without quotes")
    if value < 0 or (positive and value == 0):
        raise ValueError(f"{where}={value} must be {'above 0' if positive else 'at least 0'}; correct it")
    return value


def as_string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}={_short(value)} must be a string; put it in quotes")
    return value


def required(document: Mapping[str, Any], key: str, where: str) -> Any:
    if key not in document:
        raise ValueError(f"{where}: the field {key!r} is missing; add it")
    return document[key]


def remainder(document: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """What `document` has that `known` lacks, nested objects included: the fields that a version does not know."""
    rest: dict[str, Any] = {}
    for key, value in document.items():
        if key not in known:
            rest[key] = value
        elif isinstance(value, Mapping) and isinstance(known[key], Mapping):
            if inner := remainder(value, known[key]):
                rest[key] = inner
    return rest


def merged(document: dict[str, Any], rest: Mapping[str, Any]) -> dict[str, Any]:
    """`document` with the fields of `rest` added where they stood: the inverse of `remainder`."""
    for key, value in rest.items():
        inner = document.get(key)
        document[key] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, Mapping) else value
    return document


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
