"""Reading JSON files field by field, so that a wrong one is an error that names the file, the field and the rule.

A file is read as what it says and no more: a key that is there twice, NaN, endless files and numbers that no quantity
has are refused, not interpreted.
"""

from __future__ import annotations

import json
import os
import secrets
import tomllib
from collections.abc import Mapping
from math import isfinite, isnan
from pathlib import Path
from typing import Any

from flexsp.disk import sync

MOST_BYTES = 1 << 28
"""Of a file that is read whole: a plan of ten million sequences has fewer, /dev/zero never ends."""
MOST_DEPTH = 64
"""Of lists and objects inside one another: what walks a document may then call itself."""
MOST_INTEGER = 2**63 - 1
MOST, LEAST = 1e30, 1e-30
"""Of a number, and of one that must be above 0: no quantity is beyond, and products of them stay finite."""


def read_text(path: str | Path, kind: str) -> str:
    """The text of the file `path`, which is to be `kind`, "a TOML file" say.

    Raises:
        ValueError: the file cannot be read, is not UTF-8, or is larger than `MOST_BYTES`.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ValueError(f"{path}: must be at most {MOST_BYTES >> 20} MiB; give {kind}")
        return data.decode("utf-8")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror}); give {kind}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not text ({error}); give {kind}") from None
    except ValueError as error:  # a path with a null character
        raise ValueError(str(error) if str(path) in str(error) else f"{path!r}: {error}; give {kind}") from None


def read_object(path: str | Path) -> dict[str, Any]:
    """The JSON object in the file `path`.

    Raises:
        ValueError: the file cannot be read, is not JSON, or holds something else than an object.
    """
    return as_object(parse(read_text(path, "a JSON file"), str(path)), str(path))


def parse(text: str, where: str) -> Any:
    """What `text` says in JSON; `where` names it in errors.

    Raises:
        ValueError: it is not JSON by RFC 8259, has a key twice, or is nested too deeply.
    """
    try:
        document = json.loads(text, object_pairs_hook=each_once, parse_constant=_no_constant)
    except ValueError as error:
        said = " ".join(str(error).split())
        raise ValueError(f"{where}: is not JSON ({said}); give a file written by flexsp or by hand as JSON") from None
    except RecursionError:
        raise ValueError(f"{where}: is nested more than {MOST_DEPTH} deep; give a file written by flexsp") from None
    level: list[Any] = [[document]]
    depth = 0
    while level:
        if depth > MOST_DEPTH:
            raise ValueError(f"{where}: is nested more than {MOST_DEPTH} deep; give a file written by flexsp")
        inner = [each for item in level for each in (item.values() if isinstance(item, dict) else item)]
        level, depth = [each for each in inner if isinstance(each, dict | list)], depth + 1
    return document


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """What `text` says in TOML; `where` names it in errors.

    Raises:
        ValueError: it is not TOML.
    """
    try:
        return tomllib.loads(text)
    except ValueError as error:  # or a number of thousands of digits
        said = " ".join(str(error).split())
        raise ValueError(f"{where}: is not TOML ({said}); correct the line") from None
    except RecursionError:
        raise ValueError(f"{where}: is nested too deeply; write it flatter") from None


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook`.

    Raises:
        ValueError: a key is there twice.
    """
    document = dict(pairs)
    if len(document) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the field {short(twice)} is there twice")
    return document


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def write_object(path: str | Path, document: Mapping[str, Any], synced: bool = False) -> None:
    """Writes `document` to `path`, aside and then renamed, so that a reader never sees half a file.

    Without `synced` a loss of power may leave an empty file.
    """
    path = Path(path)
    try:
        text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    except ValueError:
        raise ValueError(f"{path}: a number is infinite or none; what is to be written there has none such") from None
    try:
        if (
            os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path)
        ):  # /dev/null must stay what it is
            path.write_text(text, encoding="utf-8")
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")  # others may write it too
        try:
            aside.write_text(text, encoding="utf-8")
            if synced:
                sync(aside)
            aside.replace(path)
            if synced:
                sync(path.parent)
        except OSError:
            aside.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror}); give a path in a writable folder") from None
    except ValueError as error:  # a path with a null character
        raise ValueError(f"{str(path)!r}: cannot be written ({error}); give a path in a writable folder") from None


def as_object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where}={short(value)} must be a JSON object; write it as {{...}}")
    return value


def as_list(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"{where}={short(value)} must be a JSON list; write it as [...]")
    return value


def as_integer(value: Any, where: str, least: int | None = None, most: int = MOST_INTEGER) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{where}={short(value)} must be an integer; write it without quotes or a fraction")
    if least is not None and value < least:
        raise ValueError(f"{where}={short(value)} must be at least {least}; correct it")
    if not -MOST_INTEGER <= value <= most:
        raise ValueError(f"{where}={short(value)} must be at most {most:,}; correct it")
    return value


def as_number(value: Any, where: str, positive: bool = False) -> int | float:
    """A number from 0 (above 0 if `positive`) to `MOST`; integers stay integers, so byte counts stay exact."""
    if isinstance(value, bool) or not isinstance(value, int | float) or (isinstance(value, float) and isnan(value)):
        raise ValueError(f"{where}={short(value)} must be a finite number; write it without quotes")
    if value < 0 or (positive and value == 0):
        raise ValueError(f"{where}={short(value)} must be {'above 0' if positive else 'at least 0'}; correct it")
    if value > MOST or (positive and value < LEAST):
        rule = f"at most {MOST:g}" if value > MOST else f"at least {LEAST:g}"
        raise ValueError(f"{where}={short(value)} must be {rule}, as any quantity is; correct it")
    return value


def as_string(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where}={short(value)} must be a string; put it in quotes")
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


def short(value: Any) -> str:
    """A value for an error, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def finite(value: Any) -> Any:
    """The same with None for numbers that JSON does not have: the loss of a run that diverged is NaN."""
    if isinstance(value, Mapping):
        return {key: finite(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not isfinite(value) else value
