"""One well-formed input -> many wrong ones: documents (objects, lists, values) by their structure, files by bytes."""

from __future__ import annotations

import copy
import json
import math
from random import Random
from typing import Any

NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 0.5, -0.0, 1e-320, 1e-300, 1e300, 1.7e308, math.nan, math.inf, -math.inf, 2**31, 2**53, 2**63 - 1,
    2**63, 2**64, -(2**63), 10**18, 10**40, 10**400, 65536, 4096.0,
)  # fmt: skip
TEXTS = (
    "", " ", "0", "1", "-1", "4", "\uff11", "\u0663", "1e3", "nan", "null", "true", "\x00",
    "a\nb", "a\r\nb", "é", "日本語",
    "\u202e", "\ud800", "../../etc/passwd", "/dev/zero", "$(touch x)", "__import__('os').system('true')", "%s%n",
    "{0}", "[bold]",
    "[/]", "x" * 5000, "None", "1_000", "01", "flex", "4K",
)  # fmt: skip
OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [[]], [None], {"": None}, [1, 2], {"value": 1}, [{}], {"1": 1})


def value(random: Random) -> Any:
    """Something hostile of any type."""
    return copy.deepcopy(random.choice(random.choice((NUMBERS, TEXTS, OTHERS))))


def paths(document: Any, here: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where every value of a document is, itself left out."""
    if isinstance(document, dict):
        items: list[tuple[Any, Any]] = list(document.items())
    elif isinstance(document, list):
        items = list(enumerate(document))
    else:
        return []
    return [path for key, inner in items for path in ((*here, key), *paths(inner, (*here, key)))]


def at(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        document = document[key]
    return document


def document(base: Any, random: Random) -> tuple[Any, str]:
    """A changed copy of `base`, and what was changed."""
    made = copy.deepcopy(base)
    said = []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        known = paths(made)
        if not known:
            break
        # a key of the upper levels as often as one of a long list below them
        depth = random.choice(sorted({len(path) for path in known}))
        path = random.choice([path for path in known if len(path) == depth])
        said.append(f"{_change(made, path, random)} {'.'.join(map(str, path))}"[:120])
    return made, "; ".join(said)


def _change(made: Any, path: tuple[Any, ...], random: Random) -> str:
    parent, key = at(made, path[:-1]), path[-1]
    old = parent[key]
    if isinstance(old, int | float) and not isinstance(old, bool) and random.random() < 0.6:
        parent[key] = random.choice(
            (-old, 0, old + 1, old - 1, old * 2, old // 2, math.nan, math.inf, str(old), bool(old), *NUMBERS)
        )
        return f"set {parent[key]!r:.30} at"
    what = random.choice(("delete", "delete", "set", "set", "null", "wrap", "rename", "add", "twice", "swap"))
    if what == "delete":
        del parent[key]
    elif what == "set":
        parent[key] = value(random)
    elif what == "null":
        parent[key] = None
    elif what == "wrap":
        parent[key] = random.choice(([old], {"value": old}, [old, old], {str(key): old}))
    elif isinstance(parent, list):
        if what == "twice":
            parent.insert(random.randrange(len(parent) + 1), copy.deepcopy(old))
        elif what == "swap":
            other = random.randrange(len(parent))
            parent[key], parent[other] = parent[other], parent[key]
        else:
            parent.insert(key, value(random))
    elif what == "rename":
        parent[random.choice((str(key).upper(), f"{key} ", f"{key}s", "", f"0{key}"))] = parent.pop(key)
    elif what == "swap":
        other = random.choice(list(parent))
        parent[key], parent[other] = parent[other], parent[key]
    else:
        what = "add beside"
        parent[random.choice(("unknown", "", "a.b", "__class__", f"{key}_", "1", "65536"))] = value(random)
    return what


def raw(data: bytes, random: Random) -> tuple[bytes, str]:
    """Changed bytes, and how."""
    made, said = bytearray(data), []
    for _ in range(random.choice((1, 1, 2, 4))):
        begin = random.randrange(len(made) + 1)
        end = min(len(made), begin + random.choice((1, 1, 4, 16, 200)))
        what = random.choice(("flip", "flip", "cut", "remove", "repeat", "insert", "random", "zeros"))
        if what == "flip" and made:
            made[min(begin, len(made) - 1)] ^= 1 << random.randrange(8)
        elif what == "cut":
            del made[begin:]
        elif what == "remove":
            del made[begin:end]
        elif what == "repeat":
            made[begin:begin] = made[begin:end] * random.choice((1, 2, 50))
        elif what == "insert":
            made[begin:begin] = random.choice(SPLINTERS)
        elif what == "random":
            made[begin:end] = random.randbytes(end - begin)
        else:
            made[begin:end] = bytes(end - begin)
        said.append(f"{what} at {begin}")
    return bytes(made), "; ".join(said)


SPLINTERS = (
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\n", b"\r\n", b"\r", b'"', b"{", b"}", b"[", b"]", b",",
    b":", b"null", b"NaN", b"-Infinity", b"1e999", b"-1", b"0", b"9" * 30, b"9" * 5000, b"[" * 3000, b'{"a":' * 3000,
    b"=", b"[[x]]", b"# x\n", b"'''", b"\\u0000", b"\\ud800", b"1_0", b"0x10", b"\xe2\x80\xa8", b"inf",
)  # fmt: skip


def json_text(document: Any, random: Random) -> tuple[bytes, str]:
    """A document as JSON, sometimes in an unusual way that other programs write, or with a key that is there twice."""
    text = json.dumps(document, ensure_ascii=random.random() < 0.5)
    how = random.choice(("plain",) * 12 + ("twice", "twice", "utf-16", "bom", "deep", "comma", "lines", "digits"))
    if how == "twice" and isinstance(document, dict) and document:
        key = random.choice(list(document))
        text = text[:-1] + f", {json.dumps(key)}: {json.dumps(random.choice((document[key], value(random))))}}}"
    elif how == "utf-16":
        return text.encode("utf-16", "surrogatepass"), how
    elif how == "bom":
        text = "\ufeff" + text
    elif how == "deep":
        depth = random.choice((50, 900, 5000, 200000))
        text = text[:-1] + ', "deep": ' + "[" * depth + "]" * depth + "}"
    elif how == "comma":
        text = text[:-1] + ",}"
    elif how == "lines":
        text += "\n" + text
    elif how == "digits":
        text = text[:-1] + f', "long": {"9" * random.choice((400, 6000))}}}'
    return text.encode("utf-8", "surrogatepass"), how


def strict_json(data: bytes) -> Any:
    """What a careful reader makes of it.

    Raises:
        ValueError: not UTF-8, no JSON by RFC 8259, or an object with a key twice.
    """

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key is there twice")
        return dict(pairs)

    def constant(text: str) -> Any:
        raise ValueError(f"{text} is no JSON")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=once, parse_constant=constant)
    except RecursionError:
        raise ValueError("nested too deeply") from None
