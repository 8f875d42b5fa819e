"""One device's loss and gradients by transformers' own attention, and how far the executor's are from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from flexsp.data import PlannedBatch
from flexsp.data.packing import IGNORE_INDEX
from flexsp.parallel import GroupPool, forward_backward
from flexsp.parallel.control import from_first_rank

NIL = 1e-3
"""A gradient whose norm is below so much of the largest parameter's is compared with that: it may be nil but for
rounding, as that of a bias of keys is without rotary embeddings."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The executor against one device."""

    loss: float
    """The executor's."""
    loss_difference: float
    """Relative."""
    gradient_difference: float
    """Of the worst parameter: the norm of the difference over the norm."""
    parameter: str
    """That parameter's name."""
    kernels: frozenset[str]
    """The attention kernels that rank 0 used."""


def one_device(model: Any, batch: PlannedBatch) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients of a global batch, its sequences one by one through eager attention; on the CPU."""
    model.set_attn_implementation("eager")
    with _OwnSoftmax():
        return _sequence_by_sequence(model, batch)


def _sequence_by_sequence(model: Any, batch: PlannedBatch) -> tuple[float, dict[str, Tensor]]:
    device = next(model.parameters()).device
    rows = [batch.source.read(index, 0, int(length)) for index, length in enumerate(batch.lengths)]
    count = sum(int((labels != IGNORE_INDEX).sum()) for _, labels in rows)
    total = 0.0
    for tokens, labels in rows:
        ids, wanted = (torch.from_numpy(column).to(device) for column in (tokens, labels))
        logits = model(input_ids=ids[None], use_cache=False).logits[0]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        loss = F.cross_entropy(logits, wanted, ignore_index=IGNORE_INDEX, reduction="sum") / count
        loss.backward()
        total += loss.item()
    return total, {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


class _OwnSoftmax(TorchFunctionMode):
    """Keeps fp64 scores in fp64, which eager attention would round to fp32: too coarse to compare with."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in (F.softmax, torch.softmax, Tensor.softmax) and args[0].dtype == torch.float64:
            kwargs = {**kwargs, "dtype": None}
        return func(*args, **kwargs)


def difference(
    model: PreTrainedModel, batch: PlannedBatch, groups: GroupPool, loss: float, gradients: Mapping[str, Tensor]
) -> Difference:
    """Runs a batch through the executor. A collective; every rank gets the same.

    Args:
        model: from `prepare_model`; its gradients are cleared.
        batch: to run.
        groups: the pool.
        loss, gradients: of one device, on rank 0; a parameter that is not there should have no gradient, or nil.
    """
    model.zero_grad()
    result = forward_backward(model, batch, groups)
    ours = {name: _whole(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    def compared() -> Difference:
        worst, where = 0.0, ""
        largest = max(float(each.norm()) for each in gradients.values())
        for name in ours.keys() | gradients.keys():
            found, wanted = (held.get(name, torch.zeros(())) for held in (ours, gradients))
            off = float((found - wanted).norm()) / max(float(wanted.norm()), NIL * largest)
            if not off <= worst:  # nan too
                worst, where = off, name
        return Difference(
            loss=result.loss,
            loss_difference=abs(result.loss - loss) / abs(loss),
            gradient_difference=worst,
            parameter=where,
            kernels=result.kernels,
        )

    return from_first_rank(compared, groups)


def _whole(gradient: Tensor) -> Tensor:
    return (gradient.full_tensor() if isinstance(gradient, DTensor) else gradient).cpu()
