"""What a kind of model does with its tokens, seen by running a small one of it in three ways.

Names of fields and classes tell much (`check`), but a new model may mix tokens in a way that nobody has named yet, and
silently wrong results are the worst fault there is. So a small model of the same class runs

1. whole sequences through its own eager attention, and through ours written out: they must agree, which finds masks,
   biases and state of attention layers that our attention is not told of, and positions that do not count from 0;
2. a row whole and in pieces, with an attention in which no token sees another: the pieces must give what the whole
   gives, which finds all that reaches across tokens outside of attention: convolutions, recurrent states, positions
   counted from the tokens at hand, routing that depends on the batch;
3. one token backward: every parameter that any row gives a gradient must get one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from flexsp.parallel.experts import is_expert
from flexsp.parallel.seen import APART, DENSE, Seen
from flexsp.parallel.small import DROPOUT, POSITIONS, VOCABULARY, make_small, quiet

TOLERANCE = 1e-4
"""Relative, of logits in fp64: eager attention and many norms compute in fp32 inside. A fault is larger by orders."""
RANDOM = "its result is random in training, or changes from one forward to the next"
UNCHECKED = "it cannot be checked, as no small model of its kind runs by itself on tokens alone"
LENGTH = 24
REPEATS = 3
"""Of a forward that may be random."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a model's layers ask of attention beside what its config says of them all."""

    sinks: bool = False
    dropout: bool = False
    """In training."""


NOTHING = Asked()

_FOUND: dict[tuple[type, str, bool], tuple[str | None, Asked]] = {}


def fault_of(kind: type[PreTrainedModel], config: PreTrainedConfig, training: bool = True) -> str | None:
    """Why models of this class and config cannot be trained exactly; None where nothing was found.

    Takes some tenths of a second; each config is tried once in a process.

    Args:
        kind: the class.
        config: of the whole model.
        training: run it in training mode, so that what is random there shows.
    """
    return _found(kind, config, training)[0]


def asked_of(kind: type[PreTrainedModel], config: PreTrainedConfig, training: bool = True) -> Asked:
    """What layers of this class and config ask for, as those of a small model do; arguments as of `fault_of`."""
    return _found(kind, config, training)[1]


def _found(kind: type[PreTrainedModel], config: PreTrainedConfig, training: bool) -> tuple[str | None, Asked]:
    key = (kind, json.dumps(config.to_dict(), sort_keys=True, default=str), training)
    if key not in _FOUND:
        with quiet():
            seen = Seen()
            fault = _probe(kind, config, training, seen)
            _FOUND[key] = fault, Asked(sinks=seen.sinks, dropout=_drops_out(kind, config))
    return _FOUND[key]


def _drops_out(kind: type[PreTrainedModel], config: PreTrainedConfig) -> bool:
    """Whether attention's weights are dropped out: configs call that in many ways, and some name it for no use.

    Where no small model can be made, whatever is called dropout counts.
    """
    fields = config.get_text_config().to_dict().items()
    if not any(type(value) is float and value > 0 and DROPOUT.search(name) for name, value in fields):
        return False
    seen = Seen()
    try:
        _logits(make_small(kind, config, torch.float64, few_heads=True, dropout=True), DENSE, SEQUENCE, seen)
    except Exception:  # of the model's own code
        return True
    return seen.dropout


def _probe(kind: type[PreTrainedModel], config: PreTrainedConfig, training: bool, seen: Seen) -> str | None:
    try:
        model = make_small(kind, config, torch.float64, few_heads=True).train(training)
        eager = _logits(model, "eager", SEQUENCE)
    except Exception as error:  # of the model's own code
        return f"{UNCHECKED} ({_line(error)})"
    try:
        return _unlike_eager(model, eager, seen) or _reaching_across(model) or _without_gradient(model)
    except Exception as error:  # likewise
        return f"its layers do not run on a share of a packed row ({_line(error)})"


def _unlike_eager(model: Any, eager: Tensor, seen: Seen) -> str | None:
    if not all(_close(_logits(model, "eager", SEQUENCE), eager) for _ in range(REPEATS)):
        return RANDOM
    ours = _logits(model, DENSE, SEQUENCE, seen)
    if (fault := seen.fault()) is not None:
        return fault
    if not _close(ours, eager):
        where = _first_difference(model, ("eager", SEQUENCE), (DENSE, SEQUENCE), list(range(LENGTH)))
        return f"its attention, first seen in {where}, is not causal attention by scores, window, softcap and sinks"
    if not _close(_logits(model, "eager", SEQUENCE, numbered=False), eager):
        return "it does not number the tokens of a sequence from 0, as flexsp does"
    return None


def _reaching_across(model: Any) -> str | None:
    whole = _logits(model, APART, ROW)
    for places in PIECES:
        piece = [ROW[place] for place in places]
        if not _close(_logits(model, APART, piece), whole[places]):
            where = _first_difference(model, (APART, ROW), (APART, piece), places)
            return f"tokens reach one another in {where}, outside of attention, or it reads positions of its own"
    return None


def _without_gradient(model: Any) -> str | None:
    """Parameters that only some tokens give a gradient; those of experts are given one, see `experts`."""
    some = {name for name in _graded(model, ROW) - _graded(model, ROW[:1]) if not is_expert(name)}
    if some:
        return f"some tokens leave {min(some)} and {len(some) - 1} other parameters without a gradient, others do not"
    return None


def _graded(model: Any, tokens: list[tuple[int, int]]) -> set[str]:
    model.zero_grad()
    _logits(model, DENSE, tokens, grad=True).sum().backward()
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


Run = tuple[str, list[tuple[int, int]]]
"""An attention, and tokens with their positions."""


def _first_difference(model: Any, whole: Run, part: Run, places: list[int]) -> str:
    """The first module, inner ones first, whose output in `part` is not that of `whole` at these places."""
    expected, found = _outputs(model, whole), _outputs(model, part)
    for name, ours in found.items():
        theirs = expected.get(name)
        if theirs is None or ours.shape[:1] != theirs.shape[:1] or ours.shape[1] != len(places):
            continue
        if not _close(ours, theirs[:, places]):
            return f"{name} ({type(model.get_submodule(name)).__name__})"
    return f"a layer of {type(model).__name__}"


def _outputs(model: Any, run: Run) -> dict[str, Tensor]:
    """What each module gave at its first call, (1, T, anything), in the order in which they finished."""
    given: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if name and isinstance(first, Tensor) and first.ndim >= 3:
                # a convolution has tokens last
                given.setdefault(name, first.mT if isinstance(module, torch.nn.Conv1d) else first)

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules()]
    try:
        _logits(model, *run)
    finally:
        for handle in handles:
            handle.remove()
    return given


SEQUENCE = [(place * 37 % VOCABULARY, place) for place in range(LENGTH)]
"""Tokens and their positions: one sequence, longer than the window of a small model."""
ROW = [
    (place * 37 % VOCABULARY, position)
    for place, position in enumerate([*range(5), *range(4), POSITIONS // 2, POSITIONS // 2 + 1, POSITIONS - 1])
]
PIECES = ([0, 5, 11], [1, 2, 3, 4, 6, 7, 8, 9, 10], [7])


def _logits(
    model: Any,
    attention: str,
    tokens: list[tuple[int, int]],
    seen: Seen | None = None,
    grad: bool = False,
    numbered: bool = True,
) -> Tensor:
    """(T, vocabulary); `numbered`: the model is given the positions."""
    model.set_attn_implementation(attention)
    ids, positions = (torch.tensor([column]) for column in zip(*tokens, strict=True))
    arguments: dict[str, Any] = {"position_ids": positions} if numbered else {}
    if attention != "eager":  # as the step calls it
        cu_seqlens = torch.tensor([0, LENGTH], dtype=torch.int32)
        arguments |= dict(
            cu_seq_lens_q=cu_seqlens, cu_seq_lens_k=cu_seqlens, max_length_q=LENGTH, max_length_k=LENGTH,
            sp_context=seen or Seen(),
        )  # fmt: skip
    with torch.set_grad_enabled(grad):
        logits: Tensor = model(input_ids=ids, use_cache=False, **arguments).logits[0]
    return logits


def _close(ours: Tensor, expected: Tensor) -> bool:
    return bool((ours - expected).norm() <= TOLERANCE * expected.norm())


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
