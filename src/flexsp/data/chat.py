"""Chats to tokens: the tokenizer's chat template renders a chat as text, and the assistant's turns have labels.

    <user> Hi <assistant> Hello <end> <user> ...      rendered
                          ^^^^^ ^^^^^                 spans of characters that the assistant wrote

Spans come from the template where it marks them ({% generation %}), and else from rendering the chat up to each of the
assistant's turns and through it: each text must begin with the one before it. The whole text is cut into tokens once,
and a token has a label where a character of it is in a span. So no token depends on where a turn ends.

Calls are the assistant's and have labels; what tools answer (role `tool`) has none. The definitions of tools, a chat's
second part, go to the template in every rendering, or else no text would begin with the one before it.
"""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np

from flexsp import jsonfields as jf
from flexsp.data.options import ALL, ASSISTANT
from flexsp.data.packing import IGNORE_INDEX
from flexsp.data.rows import BadRow, Document, Reason, document_of, short, text_of
from flexsp.data.tokenizers import Pretrained, Tokenizer, refused

MARKED = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""As transformers looks for it."""
TOOLS, CALLS = "tools", "tool_calls"
"""Of a chat beside its messages, and of a message."""
Span = tuple[int, int]
Turns = list[dict[str, Any]]
Tools = list[dict[str, Any]] | None


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
        self._named = {name for name in (TOOLS, CALLS) if re.search(rf"\b{name}\b", template)}

    def document(self, messages: Any, tools: Any = None) -> Document:
        """The tokens of a chat, with the labels that `data.train_on` says.

        Args:
            messages: a list of {role, content}; with `tool_calls` content may be null or absent.
            tools: JSON schemas of the functions that may be called, a list or its JSON; None: there are none.

        Raises:
            BadRow: they are something else, or the template does not take them.
        """
        turns, schemas = _turns(messages), _schemas(tools)
        self._check_named(turns, schemas)
        rendered, spans = self._rendered(turns, schemas)
        try:
            tokens, places = self._tokenizer.encode_spans(rendered)
        except MemoryError:
            raise
        except Exception as error:  # the tokenizers package raises bare ones
            raise refused(error) from None
        if self._train_on == ALL:
            return document_of(tokens, None)
        return document_of(tokens, np.where(_within(places, spans), tokens, IGNORE_INDEX))

    def _check_named(self, turns: Turns, tools: Tools) -> None:
        """Refuses what the template would leave out without a word: a model would learn calls of what it never saw."""
        used = {TOOLS: tools, CALLS: any(turn.get(CALLS) for turn in turns)}
        lost = [name for name, is_used in used.items() if is_used and name not in self._named]
        if lost:
            raise BadRow(
                Reason.CHAT,
                f"the row has {lost[0]}, which the chat template does not write; give a tokenizer whose template does, "
                f"or take them out of the row",
            )

    def _rendered(self, turns: Turns, tools: Tools) -> tuple[str, list[Span]]:
        """The chat as text, and the characters that the assistant wrote."""
        if self._train_on == ALL:
            return self._render(turns, tools), []
        if self._marked:
            return self._render_marked(turns, tools)
        whole, spans = self._render(turns, tools), []
        for index, turn in enumerate(turns):
            if turn["role"] != ASSISTANT:
                continue
            before = self._render(turns[:index], tools, prompt=True)
            through = self._render(turns[: index + 1], tools)
            if not (through.startswith(before) and whole.startswith(through)):
                raise BadRow(
                    Reason.CHAT,
                    f"turn {index}: the chat template writes a chat up to this turn otherwise than the whole, so that "
                    f"its labels cannot be told; mark them in the template by {{% generation %}}, or set "
                    f"data.train_on='all'",
                )
            spans.append((len(before), len(through)))
        return whole, spans

    def _render(self, turns: Turns, tools: Tools, prompt: bool = False) -> str:
        render = self._tokenizer.wrapped.apply_chat_template
        try:
            return str(render(turns, tools=tools, tokenize=False, add_generation_prompt=prompt))
        except Exception as error:  # a template is a program
            raise _refused(error) from None

    def _render_marked(self, turns: Turns, tools: Tools) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            (rendered,), (spans,) = render_jinja_template(
                conversations=[turns],
                tools=tools,
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


def _turns(messages: Any) -> Turns:
    """Checked messages."""
    if isinstance(messages, np.ndarray) or not isinstance(messages, list) or not messages:
        raise BadRow(Reason.TYPE, f"messages={short(messages)} must be a list of {{role, content}}; correct the row")
    return [_turn(message, index) for index, message in enumerate(messages)]


def _turn(message: Any, index: int) -> dict[str, Any]:
    turn: dict[str, Any] = _without_nulls(message) if isinstance(message, dict) else {}
    calls = turn.get(CALLS, [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise BadRow(Reason.TYPE, f"turn {index}: {CALLS}={short(calls)} must be a list of objects; correct the row")
    for key in ("role", "content"):
        only_calls = key == "content" and key not in turn and calls
        if not isinstance(turn.get(key), str) and not only_calls:
            raise BadRow(Reason.TYPE, f"turn {index}: {short(message)} must have {key} as text; correct the row")
    return turn


def _schemas(tools: Any) -> Tools:
    """Checked definitions of tools; None where there are none. What is JSON in text has no nulls but its own."""
    if tools is None:
        return None
    found = _parsed(text_of(tools, TOOLS)) if isinstance(tools, str | bytes) else _without_nulls(tools)
    if found is None:
        return None
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise BadRow(
            Reason.TYPE, f"{TOOLS}={short(tools)} must be a list of JSON schemas, or its JSON; correct the row"
        )
    return found or None


def _parsed(text: str) -> Any:
    try:
        return json.loads(text, object_pairs_hook=jf.each_once)
    except (ValueError, RecursionError) as error:
        said = " ".join(str(error).split())[:200]
        raise BadRow(Reason.JSON, f"{TOOLS}={short(text)} is malformed JSON ({said}); correct the row") from None


def _without_nulls(value: Any) -> Any:
    """Without the keys that are null, at any depth: Parquet gives the objects of all rows the same ones."""
    try:
        if isinstance(value, dict):
            return {key: _without_nulls(each) for key, each in value.items() if each is not None}
        return [_without_nulls(each) for each in value] if isinstance(value, list) else value
    except RecursionError:
        raise BadRow(Reason.TYPE, "it is nested too deeply; write it flatter") from None


def _within(places: np.ndarray[Any, Any], spans: list[Span]) -> np.ndarray[Any, Any]:
    """(tokens,) whether a character of the token is in a span; a token of no character is in none."""
    found = np.zeros(len(places), dtype=bool)
    for start, stop in spans:
        found |= (places[:, 0] < stop) & (places[:, 1] > start) & (places[:, 0] < places[:, 1])
    return found
