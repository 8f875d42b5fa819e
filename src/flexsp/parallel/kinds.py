"""What a kind of model does with its tokens, seen by running a small one of it in three ways.

Names of fields and classes tell much (`check`), but a new model may mix tokens in a way that nobody has named yet, and
silently wrong results are the worst fault there is. So a small model of the same class runs

1. whole sequences through its own eager attention, and through ours written out: they must agree, which finds masks,
   biases and state of attention layers that our attention is not told of, and positions that do not count from 0;
2. a row whole and in pieces, with an attention in which no token sees another: the pieces must give what the whole
   gives, which finds all that reaches across tokens outside of attention: convolutions, recurrent states, positions
   counted from the tokens at hand, routing that depends on the batch;
3. one token backward: every parameter that any row gives a gradient must get one.

Letters: T = tokens, N = heads, K = KV heads.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from flexsp.parallel.experts import is_expert
from flexsp.parallel.small import DROPOUT, POSITIONS, VOCABULARY, make_small, quiet

DENSE, APART = "flexsp-probe-dense", "flexsp-probe-apart"
TOLERANCE = 1e-4
"""Relative, of logits in fp64: eager attention and many norms compute in fp32 inside. A fault is larger by orders."""
RANDOM = "its result is random in training, or changes from one forward to the next"
UNCHECKED = "it cannot be checked, as no small model of its kind runs by itself on tokens alone"
LENGTH = 24
REPEATS = 3
"""Of a forward that may be random."""
HARMLESS = {
    "is_causal", "position_ids", "cache_position", "output_attentions", "output_hidden_states", "use_cache",
    "output_router_logits", "logits_to_keep", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
}  # fmt: skip
"""Arguments of attention that do not change what plain attention computes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What a model's layers ask of attention beside what its config says of them all."""

    sinks: bool = False
    dropout: bool = False
    """In training."""


NOTHING = Asked()


@dataclass(slots=True)
class _Seen:
    """What attention layers were called with; handed through the model's forward as the real context is."""

    calls: int = 0
    strange: set[str] = field(default_factory=set)
    """Arguments that nobody here knows."""
    masked: bool = False
    not_causal: str = ""
    """Class of a layer that sees later tokens."""
    sinks: bool = False
    dropout: bool = False

    def note(
        self,
        module: torch.nn.Module,
        attention_mask: Tensor | None,
        s_aux: Tensor | None,
        dropout: float,
        arguments: dict[str, Any],
    ) -> None:
        self.calls += 1
        self.sinks |= s_aux is not None
        self.dropout |= bool(dropout)
        self.masked |= attention_mask is not None
        self.strange |= {name for name, value in arguments.items() if value is not None and name not in HARMLESS}
        causal = arguments.get("is_causal")
        if not (getattr(module, "is_causal", True) if causal is None else causal):
            self.not_causal = type(module).__name__

    def fault(self) -> str | None:
        """What our attention would not have computed."""
        if self.calls == 0:
            return "its layers do not hand keyword arguments to the attention interface of transformers"
        if self.not_causal:
            return f"is_causal=False of {self.not_causal}: its tokens see later ones"
        if self.strange:
            return f"its attention takes {', '.join(sorted(self.strange))}, which flexsp's does not compute"
        if self.masked:
            return "its attention is given a mask of its own"
        return None


def _dense(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sp_context: _Seen | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """What `flexsp_attention` computes for one sequence, written out."""
    if sp_context is not None:
        sp_context.note(module, attention_mask, s_aux, dropout, arguments)
    groups = query.shape[1] // key.shape[1]
    k_NTH, v_NTV = (x[0].repeat_interleave(groups, dim=0) for x in (key, value))
    scores_NTT = query[0] @ k_NTH.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap:
        scores_NTT = softcap * (scores_NTT / softcap).tanh()
    place = torch.arange(query.shape[2])
    distance_TT = place[:, None] - place
    hidden = (distance_TT < 0) | (distance_TT >= (sliding_window or len(place)))
    scores_NTT = scores_NTT.masked_fill(hidden, -torch.inf)
    if s_aux is not None:
        sinks = s_aux.to(scores_NTT.dtype)[:, None, None].expand(-1, len(place), 1)
        scores_NTT = torch.cat([scores_NTT, sinks], dim=-1)
    weights = scores_NTT.softmax(-1)[..., : len(place)]
    return (weights @ v_NTV).transpose(0, 1)[None].contiguous(), None


def _apart(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    sp_context: _Seen | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """An attention in which a token sees itself alone, yet whose output tells queries and keys apart."""
    groups = query.shape[1] // key.shape[1]
    out = value.repeat_interleave(groups, dim=1)
    for x in (query, key.repeat_interleave(groups, dim=1)):
        direction = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device).sin()
        out = out + (x @ direction)[..., None].tanh()
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(DENSE, _dense)
AttentionInterface.register(APART, _apart)

_Key = tuple[type, str, bool]
_FOUND: dict[_Key, tuple[str | None, Asked]] = {}


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
            seen = _Seen()
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
    seen = _Seen()
    try:
        _logits(make_small(kind, config, torch.float64, few_heads=True, dropout=True), DENSE, SEQUENCE, seen)
    except Exception:  # of the model's own code
        return True
    return seen.dropout


def _probe(kind: type[PreTrainedModel], config: PreTrainedConfig, training: bool, seen: _Seen) -> str | None:
    try:
        model = make_small(kind, config, torch.float64, few_heads=True).train(training)
        eager = _logits(model, "eager", SEQUENCE)
    except Exception as error:  # of the model's own code
        return f"{UNCHECKED} ({_line(error)})"
    try:
        return _unlike_eager(model, eager, seen) or _reaching_across(model) or _without_gradient(model)
    except Exception as error:  # likewise
        return f"its layers do not run on a share of a packed row ({_line(error)})"


def _unlike_eager(model: Any, eager: Tensor, seen: _Seen) -> str | None:
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
    seen: _Seen | None = None,
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
            sp_context=seen or _Seen(),
        )  # fmt: skip
    with torch.set_grad_enabled(grad):
        logits: Tensor = model(input_ids=ids, use_cache=False, **arguments).logits[0]
    return logits


def _close(ours: Tensor, expected: Tensor) -> bool:
    return bool((ours - expected).norm() <= TOLERANCE * expected.norm())


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
