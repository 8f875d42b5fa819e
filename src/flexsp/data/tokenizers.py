"""Tokenizers: text to token ids, and what names their content."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from flexsp.data.packing import IntArray
from flexsp.data.rows import BadRow, Reason

BYTES = "bytes"
FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
"""A folder with one of these holds a tokenizer."""
CONTENT = (".json", ".txt", ".model", ".jinja", ".tiktoken")
"""Files of a folder that can decide how a tokenizer without a tokenizer.json cuts."""


class Bytes:
    """Every byte of UTF-8 is a token."""

    key = BYTES
    eos: int | None = None

    def encode(self, texts: Sequence[str]) -> list[IntArray]:
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64) for text in texts]


class Pretrained:
    """A tokenizer of transformers, or of `tokenizers` alone."""

    def __init__(self, path: str) -> None:
        """`path`: a folder, or a tokenizer.json.

        Raises:
            ValueError: there is none, or transformers cannot load it.
        """
        self.name = path
        self.wrapped = load_wrapped(path)
        self.eos: int | None = self.wrapped.eos_token_id
        self.backend: Any = getattr(self.wrapped, "backend_tokenizer", None)
        """The `tokenizers.Tokenizer` inside; None where it is written in Python."""
        if self.backend is not None:
            self.backend.no_truncation()
            self.backend.no_padding()
        self.template: str | None = self.wrapped.chat_template if isinstance(self.wrapped.chat_template, str) else None
        self.key = self._content()

    def encode(self, texts: Sequence[str]) -> list[IntArray]:
        """Ids of each text, with what the tokenizer itself adds (a first token, say)."""
        if self.backend is not None:
            return [np.array(found.ids, dtype=np.int64) for found in self.backend.encode_batch_fast(list(texts))]
        if not texts:
            return []
        found = self.wrapped(list(texts), verbose=False)["input_ids"]
        return [np.array(ids, dtype=np.int64) for ids in found]

    def encode_spans(self, text: str) -> tuple[IntArray, IntArray]:
        """(tokens,) ids of a rendered chat, nothing added, and (tokens, 2) the characters that each stands for."""
        found = self.backend.encode(text, add_special_tokens=False)
        return np.array(found.ids, dtype=np.int64), np.array(found.offsets, dtype=np.int64).reshape(-1, 2)

    def _content(self) -> str:
        """A digest of all that decides about ids and chats; the same wherever the files lie."""
        if self.backend is not None:
            content = [self.backend.to_str()]
        else:
            paths = sorted(path for path in Path(self.name).iterdir() if path.suffix in CONTENT)
            content = [f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()}" for path in paths]
        special = {name: str(token) for name, token in self.wrapped.special_tokens_map.items()}
        whole = [type(self.wrapped).__name__, self.eos, self.wrapped.chat_template, special, *content]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


Tokenizer = Bytes | Pretrained


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that `data.tokenizer` names.

    Raises:
        ValueError: there is none, or transformers cannot load it.
    """
    return Bytes() if name == BYTES else Pretrained(name)


def refused(error: Exception) -> BadRow:
    """What a tokenizer said about a text."""
    said = " ".join(str(error).split())[:200]
    return BadRow(Reason.TOKENIZER, f"the tokenizer does not take it ({said}); correct the row, or the tokenizer")


def has_tokenizer(folder: str) -> bool:
    """Whether a model's folder holds a tokenizer too."""
    return bool(folder) and any(os.path.isfile(Path(folder) / name) for name in FILES)


def load_wrapped(path: str) -> Any:
    """The tokenizer of transformers in a folder or a tokenizer.json, as it lies there.

    Raises:
        ValueError: there is none, or transformers cannot load it.
    """
    place = Path(os.path.expanduser(path))
    if not os.path.exists(place):
        raise ValueError(
            f"data.tokenizer={path!r} must be 'bytes', a folder with a tokenizer or a tokenizer.json; there is no such "
            f"path"
        )
    try:
        from transformers import AutoTokenizer, PreTrainedTokenizerFast
    except ImportError:
        raise ValueError(
            f"data.tokenizer={path!r}: tokenizers need transformers; pip install 'flexsp[train]'"
        ) from None
    try:
        if os.path.isdir(place):
            return AutoTokenizer.from_pretrained(str(place), local_files_only=True, trust_remote_code=False)
        return PreTrainedTokenizerFast(tokenizer_file=str(place))
    except Exception as error:  # of many kinds: the tokenizers package raises bare ones
        said = " ".join(str(error).split())[:300]
        raise ValueError(
            f"data.tokenizer={path!r}: transformers cannot load it ({said}); give a folder that save_pretrained of a "
            f"tokenizer wrote, or a tokenizer.json"
        ) from None
