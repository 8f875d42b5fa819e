"""The loss of a row, without ever holding the logits of a long one.

Everything happens in one call of the prepared model, inside of the root's FSDP2 hooks, so embedding, final norm and
head are gathered throughout:

    hidden states       the base model, once; the model's own forward would now make logits of all of them
    chunks              the model's own forward again for some tokens at a time, with the base model's call answered by
                        their hidden states: whatever the model does between hidden states and logits, scaling, softcap,
                        bias, is done as it does it
    loss of a chunk     in fp32, its logits computed again in the backward

A row that fits one chunk goes through the model as it is, and keeps its logits. So does every row of a model whose
forward is not a base model and then something that treats each token alike, which is found out when it is prepared.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from flexsp import loss_chunks
from flexsp.data.packing import IGNORE_INDEX
from flexsp.parallel.clock import BusyClock

log = logging.getLogger(__name__)

Forward = Callable[..., Any]

NOT_CALLED = "its forward does not call its base model once"
TRIED_TOKENS = 3
TOLERANCE = 1e-2
"""How far the logits of a token may differ, relatively, with the tokens beside it: half precision rounds."""


class _Hidden:
    """What a base model returns, with nothing but hidden states."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, key: Any) -> Any:
        return (self.last_hidden_state,)[key]


class BaseModel:
    """The part of a model that makes hidden states, as the model calls it: it can be made to answer otherwise."""

    def __init__(self, module: torch.nn.Module) -> None:
        """Wraps the module's forward."""
        self.module = module
        self._answer: Tensor | None = None
        self._taken_by: Callable[[Tensor], None] | None = None
        self.calls = 0
        """Since it was wrapped."""
        plain = module.forward
        self._unwrap = functools.partial(module.__dict__.pop, "forward")
        if "forward" in module.__dict__:
            self._unwrap = functools.partial(module.__dict__.__setitem__, "forward", plain)

        def forward(*args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self._answer is not None:
                return _Hidden(self._answer)
            output = plain(*args, **kwargs)
            if self._taken_by is None:
                return output
            self._taken_by(output[0])
            return _Hidden(output[0][:, :1])

        module.__dict__["forward"] = functools.wraps(plain)(forward)

    def unwrap(self) -> None:
        """The module is as it was."""
        self._unwrap()

    def logits(self, model_forward: Forward, hidden_1tD: Tensor, token: int = 0) -> Tensor:
        """(1, t, vocabulary) logits that the model makes of hidden states.

        The tokens' ids are stand-ins, all of them `token`: some forwards read their shape before the base model's call.
        """
        ids_1t = torch.full(hidden_1tD.shape[:2], token, device=hidden_1tD.device)
        self._answer = hidden_1tD
        try:
            logits = model_forward(input_ids=ids_1t, use_cache=False).logits
        finally:
            self._answer = None
        assert isinstance(logits, Tensor)
        return logits

    def hidden(
        self, model_forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], begin: Callable[[Tensor], None]
    ) -> Tensor:
        """(1, t, D) hidden states of a row; the model makes logits of its first token, which are dropped.

        `begin` is called with them before that.
        """
        found: list[Tensor] = []

        def take(hidden_1tD: Tensor) -> None:
            found.append(hidden_1tD)
            begin(hidden_1tD)

        self._taken_by = take
        try:
            model_forward(*args, **kwargs)
        finally:
            self._taken_by = None
        return found[0]


class RowLoss:
    """The summed loss of a row: what the model's forward returns where it is given `shift_labels`."""

    def __init__(self, model: PreTrainedModel, base: BaseModel | None, chunk_tokens: int, clock: BusyClock) -> None:
        """
        Args:
            model: whose forward is replaced.
            base: its base model; None: rows are not cut.
            chunk_tokens: tokens of a chunk at the most.
            clock: is told of head and loss.
        """
        self._base, self._chunk_tokens, self._clock = base, chunk_tokens, clock
        plain = self._forward = model.forward

        def forward(*args: Any, shift_labels: Tensor | None = None, **kwargs: Any) -> Any:
            if shift_labels is None or kwargs.get("labels") is not None:
                given = {} if shift_labels is None else {"shift_labels": shift_labels}
                return plain(*args, **given, **kwargs)
            return self._loss_sum(shift_labels, args, kwargs)

        model.__dict__["forward"] = functools.wraps(plain)(forward)

    def _loss_sum(self, labels_1t: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        tokens = labels_1t.shape[1]
        if self._base is None or tokens <= self._chunk_tokens:
            logits = self._forward(*args, **kwargs).logits
            self._clock.begin_loss(logits)  # where no head did
            loss = cross_entropy_sum(logits, labels_1t)
        else:
            hidden = self._base.hidden(self._forward, args, kwargs, self._clock.begin_loss)
            size = math.ceil(tokens / math.ceil(tokens / self._chunk_tokens))
            # split, whose backward is one concatenation
            chunks = zip(hidden.split(size, dim=1), labels_1t.split(size, dim=1), strict=True)
            losses = [
                checkpoint(self._chunk_loss, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks
            ]
            loss = torch.stack(losses).sum()
        self._clock.end_loss()
        return loss

    def _chunk_loss(self, hidden_1tD: Tensor, labels_1t: Tensor) -> Tensor:
        assert self._base is not None
        return cross_entropy_sum(self._base.logits(self._forward, hidden_1tD), labels_1t)


def cross_entropy_sum(logits_1tV: Tensor, labels_1t: Tensor) -> Tensor:
    """Summed loss of the labels that count, in fp32 at least; 0, but with a gradient, where none does."""
    logits = logits_1tV[0]
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return F.cross_entropy(logits, labels_1t[0], ignore_index=IGNORE_INDEX, reduction="sum")


def find_base_model(model: PreTrainedModel) -> BaseModel | str:
    """The model's base model, wrapped, where logits of some tokens can be had from their hidden states alone.

    To be called on the whole model, before its parameters are sharded. Tries it with random hidden states: together and
    one by one, they must come to the same logits.

    Returns:
        Or why not, in words.
    """
    head = model.get_output_embeddings()
    width = getattr(getattr(head, "weight", None), "shape", (0, 0))[-1]
    if not width:
        return "it has no output embeddings"
    weight = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, TRIED_TOKENS, width, generator=generator).to(weight.device, weight.dtype)
    reason = NOT_CALLED
    for module in (model.base_model, model.get_decoder(), *model.children()):
        if not isinstance(module, torch.nn.Module) or module is model or module is head:
            continue
        base = BaseModel(module)
        fault = _fault(model, base, hidden)
        if fault is None:
            return base
        if base.calls:
            reason = fault
        base.unwrap()
    return reason


def base_model_of_first_rank(model: PreTrainedModel) -> BaseModel | str:
    """What `find_base_model` finds on rank 0, for all ranks, whose models may have no values to try. A collective."""
    found: BaseModel | str = find_base_model(model) if dist.get_rank() == 0 else ""
    names = {module: name for name, module in model.named_modules()}
    held: list[Any] = [(found, "") if isinstance(found, str) else ("", names[found.module])]
    dist.broadcast_object_list(held, src=0)
    reason, name = held[0]
    if dist.get_rank() != 0:
        found = reason or BaseModel(model.get_submodule(name))
    return found


def _fault(model: PreTrainedModel, base: BaseModel, hidden_1tD: Tensor) -> str | None:
    """What is wrong with the logits made of hidden states alone."""
    base.calls = 0
    try:
        with torch.no_grad():
            together, other = (base.logits(model.forward, hidden_1tD, token) for token in (0, 1))
            one_by_one = [base.logits(model.forward, each) for each in hidden_1tD.split(1, dim=1)]
    except Exception as error:  # what a model's forward needs beside hidden states is its own affair
        said = (str(error).splitlines() or [""])[0]
        return f"its forward needs more than hidden states ({type(error).__name__}: {said})"
    if base.calls != 2 + len(one_by_one):
        return NOT_CALLED
    if not torch.equal(other, together):
        return "its logits are made of the tokens' ids too"
    apart = torch.cat(one_by_one, dim=1)
    if apart.shape != together.shape or not (apart - together).norm() <= TOLERANCE * together.norm():
        return "the logits of a token depend on the tokens beside it"
    return None


def install(model: PreTrainedModel, base: BaseModel | str, clock: BusyClock, chunk_tokens: int | None) -> None:
    """Makes the model return the loss where it is given labels.

    Args:
        model: prepared, with a clock.
        base: from `find_base_model`.
        clock: the model's.
        chunk_tokens: tokens of a chunk at the most; None: as many as `loss_chunks.LOGITS_BYTES` holds.

    Raises:
        ValueError: less than one token.
    """
    if chunk_tokens is not None and chunk_tokens < 1:
        raise ValueError(f"loss_chunk_tokens={chunk_tokens} must be at least 1; or None, to let the vocabulary decide")
    if isinstance(base, str):
        log.info("loss: %s: %s, so the logits of a whole row are held", type(model).__name__, base)
    chunk_tokens = chunk_tokens or loss_chunks.chunk_tokens(model.config.get_text_config().vocab_size)
    RowLoss(model, None if isinstance(base, str) else base, chunk_tokens, clock)
