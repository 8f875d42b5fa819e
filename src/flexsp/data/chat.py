"""Chats to tokens: the tokenizer's chat template renders a chat as text, and the assistant's turns have labels.

    <user> Hi <assistant> Hello <end> <user> ...      rendered
                          ^^^^^ ^^^^^                 spans of characters that the assistant wrote

Spans come from the template where it marks them ({% generation %}), and else from rendering the chat up to each of the
assistant's turns and through it: each text must begin with the one before it. The whole text is cut into tokens once,
and a token has a label where a character of it is in a span. So no token depends on where a turn ends.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from flexsp.data.options import ALL, ASSISTANT
from flexsp.data.packing import IGNORE_INDEX
from flexsp.data.rows import BadRow, Document, Reason, document_of, short
from flexsp.data.tokenizers import Pretrained, Tokenizer, refused

MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""As transformers looks for it."""
Span = tuple[int, int]


class Chats:
    """Chats of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, train_on: str) -> None:
        """
        Raises:
            ValueError: the tokenizer has no chat template, or cannot say which characters a token stands for.
        """
        template = tokenizer.template if isinstance(tokenizer, Pretrained) else None
        if not isinstance(tokenizer, Pretrained) or template is None or tokenizer.backend is None:
            what = "is 'bytes', which has no chat template" if not isinstance(tokenizer, Pretrained) else (
                f"{tokenizer.name!r} has no chat template" if template is None
                else f"{tokenizer.name!r} has no tokenizer.json"
            )  # fmt: skip
            raise ValueError(f"data.tokenizer {what}: chats need both; give the tokenizer of a model that chats")
        self._tokenizer, self._template, self._train_on = tokenizer, template, train_on
        self._marked = MARKED.search(template) is not None

    def document(self, messages: Any) -> Document:
        """The tokens of a chat, with the labels that `data.train_on` says.

        Raises:
            BadRow: it is no list of {role, content}, or the template does not take it.
        """
        turns = _turns(messages)
        rendered, spans = self._rendered(turns)
        try:
            tokens, places = self._tokenizer.encode_spans(rendered)
        except MemoryError:
            raise
        except Exception as error:  # the tokenizers package raises bare ones
            raise refused(error) from None
        if self._train_on == ALL:
            return document_of(tokens, None)
        return document_of(tokens, np.where(_within(places, spans), tokens, IGNORE_INDEX))

    def _rendered(self, turns: list[dict[str, Any]]) -> tuple[str, list[Span]]:
        """The chat as text, and the characters that the assistant wrote."""
        if self._train_on == ALL:
            return self._render(turns), []
        if self._marked:
            return self._render_marked(turns)
        whole, spans = self._render(turns), []
        for index, turn in enumerate(turns):
            if turn["role"] != ASSISTANT:
                continue
            before = self._render(turns[:index], prompt=True)
            through = self._render(turns[: index + 1])
            if not (through.startswith(before) and whole.startswith(through)):
                raise BadRow(
                    Reason.CHAT,
                    f"turn {index}: the chat template writes a chat up to this turn otherwise than the whole, so that "
                    f"its labels cannot be told; mark them in the template by {{% generation %}}, or set "
                    f"data.train_on='all'",
                )
            spans.append((len(before), len(through)))
        return whole, spans

    def _render(self, turns: list[dict[str, Any]], prompt: bool = False) -> str:
        try:
            return str(self._tokenizer.wrapped.apply_chat_template(turns, tokenize=False, add_generation_prompt=prompt))
        except Exception as error:  # a template is a program
            raise _refused(error) from None

    def _render_marked(self, turns: list[dict[str, Any]]) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            (rendered,), (spans,) = render_jinja_template(
                conversations=[turns],
                chat_template=self._template,
                return_assistant_tokens_mask=True,
                **self._tokenizer.wrapped.special_tokens_map,
            )
        except Exception as error:  # a template is a program
            raise _refused(error) from None
        return rendered, [(int(start), int(stop)) for start, stop in spans]


def _refused(error: Exception) -> BadRow:
    said = " ".join(str(error).split())[:200]
    return BadRow(Reason.CHAT, f"the chat template does not take it ({said}); correct the row")


def _turns(messages: Any) -> list[dict[str, Any]]:
    """Checked messages, without the keys that are null: Parquet gives all rows the same ones."""
    if isinstance(messages, np.ndarray) or not isinstance(messages, list) or not messages:
        raise BadRow(Reason.TYPE, f"messages={short(messages)} must be a list of {{role, content}}; correct the row")
    turns = []
    for index, message in enumerate(messages):
        for key in ("role", "content"):
            if not isinstance(message, dict) or not isinstance(message.get(key), str):
                raise BadRow(Reason.TYPE, f"turn {index}: {short(message)} must have {key} as text; correct the row")
        turns.append({key: value for key, value in message.items() if value is not None})
    return turns


def _within(places: np.ndarray[Any, Any], spans: list[Span]) -> np.ndarray[Any, Any]:
    """(tokens,) whether a character of the token is in a span; a token of no character is in none."""
    found = np.zeros(len(places), dtype=bool)
    for start, stop in spans:
        found |= (places[:, 0] < stop) & (places[:, 1] > start) & (places[:, 0] < places[:, 1])
    return found
