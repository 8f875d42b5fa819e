"""The step: forward and backward of one global batch as its plan says; or forward alone, to evaluate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from flexsp.data.batch import PlannedBatch, RankMicroBatch
from flexsp.parallel.agreement import agree
from flexsp.parallel.attention import SPContext
from flexsp.parallel.clock import MicroBatchTime, clock_of
from flexsp.parallel.groups import GroupPool
from flexsp.parallel.layouts import check_degrees
from flexsp.parallel.model import attention_of
from flexsp.parallel.policies import policies_of
from flexsp.parallel.row import Row


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What a step computed; the same on all ranks but for times and kernels."""

    loss: float
    """Mean over the labels of the global batch that count; 0 where `forward_only` finds none."""
    num_labels: int
    """How many they are."""
    times: tuple[MicroBatchTime, ...]
    """Of each micro-batch on this rank."""
    kernels: frozenset[str]
    """The attention kernels that this rank used."""


def forward_backward(model: PreTrainedModel, batch: PlannedBatch, groups: GroupPool) -> StepResult:
    """Runs one global batch; gradients are left in the model, equal to one device's on the same batch.

    1. Read this rank's tokens of every micro-batch.
    2. Agree with all ranks on the plan and count the labels of the global batch.
    3. Make the process groups that the plan needs and the pool lacks.
    4. Forward and backward of every micro-batch; ranks without a token run a filler, so that all stay in step.

    Args:
        model: from `prepare_model`.
        batch: the same on every rank.
        groups: the pool, the same on every rank.

    Returns:
        The loss; gradients are summed into `.grad`.

    Raises:
        PlanMismatchError: ranks hold different plans.
        RankError: a rank could not read its tokens, or the plan is for another world size or other heads.
        ValueError: no label counts.
    """
    return _run(model, batch, groups, train=True)


def forward_only(model: PreTrainedModel, batch: PlannedBatch, groups: GroupPool) -> StepResult:
    """The loss of one global batch, as `forward_backward` would return it, and nothing else.

    Weights, gradients and random numbers stay as they are, so that training goes on as if it had not been called. The
    model is in evaluation mode meanwhile, and what was gathered of it is freed afterwards.

    Args:
        model: from `prepare_model`.
        batch: the same on every rank. None of its labels need count.
        groups: the pool, the same on every rank.

    Returns:
        The loss; its times are those of the forward.

    Raises:
        PlanMismatchError: ranks hold different plans.
        RankError: a rank could not read its tokens, or the plan is for another world size or other heads.
    """
    with _evaluation_mode(model), torch.no_grad():
        result = _run(model, batch, groups, train=False)
    for module in model.modules():  # no backward does it; the root, and layers that are kept, are gathered still
        if isinstance(module, FSDPModule):
            module.reshard()
    return result


def _run(model: PreTrainedModel, batch: PlannedBatch, groups: GroupPool, train: bool) -> StepResult:
    """See `forward_backward`; without a backward where it is not to train."""
    error: Exception | None = None
    own: list[RankMicroBatch] = []
    try:
        own = _read(model, batch)
    except Exception as caught:  # any fault of one rank must end all of them, see agree
        error = caught
    num_labels = agree(batch, sum(micro_batch.num_labels for micro_batch in own), error, groups.control)
    if train and num_labels == 0:
        raise ValueError(
            f"step {batch.step}: num_labels=0: no label of the global batch counts; give sequences of two tokens or "
            f"more with labels that are not all masked"
        )
    groups.prepare([batch.plan], batch.layouts)
    total = torch.zeros((), dtype=torch.float64, device=_device(model))
    clock, policies = clock_of(model), policies_of(model)
    kernels: set[str] = set()
    clock.reset()
    groups.clock.reset()
    for micro_batch in own:
        clock.begin()
        groups.clock.begin()
        policies.begin(micro_batch.policy)
        context = _context(model, micro_batch, groups)
        loss_sum = _loss_sum(model, micro_batch, context)
        clock.turn(loss_sum)
        if train:
            # FSDP2 averages gradients over the ranks; we want their sum over the labels of the global batch
            (loss_sum * (dist.get_world_size() / num_labels)).backward()
        total += loss_sum.detach()
        kernels |= context.used.names
    clock.end()
    dist.all_reduce(total)
    loss = total.item() / max(1, num_labels)  # waits for the device, so that reading the clock does not
    times = tuple(
        replace(time, exchange_s=exchange_s) for time, exchange_s in zip(clock.read(), groups.clock.read(), strict=True)
    )
    return StepResult(loss=loss, num_labels=num_labels, times=times, kernels=frozenset(kernels))


@contextmanager
def _evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """`model.eval()` while inside; then each module is in the mode in which it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _read(model: PreTrainedModel, batch: PlannedBatch) -> list[RankMicroBatch]:
    """This rank's tokens, once it is known that the step can run.

    Raises:
        ValueError: the plan is for another world size, a degree's layout does not fit it or the model's heads, no
            kernel computes the model's attention in it, or the model does not run a policy.
    """
    world_size = dist.get_world_size()
    if batch.plan.num_devices != world_size:
        raise ValueError(
            f"plan num_devices={batch.plan.num_devices} is not world_size={world_size}; plan for {world_size} ranks"
        )
    degrees = {degree for micro_batch in batch.plan.micro_batches for degree in micro_batch.sp_degrees}
    check_degrees(degrees, model.config, world_size, batch.layouts)
    attention_of(model).check({batch.layout(degree) for degree in degrees})
    policies_of(model).check(micro_batch.policy for micro_batch in batch.plan.micro_batches)
    return batch.for_rank(dist.get_rank())


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


def _context(model: PreTrainedModel, micro_batch: RankMicroBatch, groups: GroupPool) -> SPContext:
    """How this rank's attention layers find the rest of their row."""
    layout = micro_batch.layout
    heads, ring = groups.channels(micro_batch.ranks, layout)
    ring_rank = micro_batch.ranks.index(dist.get_rank()) // layout.ulysses
    return SPContext(
        row=Row(micro_batch.lengths, layout.ring, ring_rank, _device(model)),
        heads=heads,
        ring=ring,
        shares=micro_batch.shares[ring_rank * layout.ulysses : (ring_rank + 1) * layout.ulysses],
        kernel=attention_of(model).kernel,
    )


def _loss_sum(model: PreTrainedModel, micro_batch: RankMicroBatch, context: SPContext) -> Tensor:
    """Summed loss of this rank's labels in one micro-batch; 0, but with a gradient, for a filler token."""
    device = _device(model)
    cu_seqlens = micro_batch.cu_seqlens.to(device, non_blocking=True)
    row: dict[str, Any] = {
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": micro_batch.max_seqlen,
        "max_length_k": micro_batch.max_seqlen,
    }
    loss_sum: Tensor = model(
        input_ids=micro_batch.input_ids.to(device, non_blocking=True),
        position_ids=micro_batch.position_ids.to(device, non_blocking=True),
        shift_labels=micro_batch.shift_labels.to(device, non_blocking=True),
        use_cache=False,
        sp_context=context,
        **row,
    )
    return loss_sum
