"""Memory that runs out in a step: the run ends with one error, after the estimate has been raised for the next one."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from flexsp.data import PlannedBatch
from flexsp.parallel import RankError
from flexsp.parallel.clock import BusyClock
from flexsp.plans import Group, MicroBatch
from flexsp.profile import Profile

HEADROOM = 0.6
"""What the raised estimate leaves free of the room that was too little."""
LEAST_PROGRESS = 0.1
"""Of a forward pass: a failure earlier than this is not taken to mean a need of more than ten times the room."""


class OutOfMemoryError(RuntimeError):
    """A rank ran out of memory in a step; the message names it, its group and the lengths."""


SAID = ("can't allocate memory", "out of memory", "Failed to CUDA calloc", "ALLOC_FAILED", "bad_alloc")
"""Of the CPU's allocator, of CUDA outside of torch's allocator, of NCCL, of cuBLAS, of C++."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation of this rank failed. Not where a RankError tells of another rank's."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    if not isinstance(error, RuntimeError) or isinstance(error, RankError):
        return False
    return any(words in str(error) for words in SAID)


def raised_activation_bytes(
    profile: Profile, tokens_per_rank: float, progress: float, policy: str | None = None
) -> int:
    """Bytes per token for the next run, after a rank that held so many tokens ran out.

    The room was `memory_bytes - model_state_bytes`; it was full after `progress` of the forward pass, so the whole pass
    needs as much more. Never below what makes this many tokens a rank illegal. It is the estimate of the policy under
    which it ran out.
    """
    memory = profile.memory
    room_bytes = memory.memory_bytes - memory.model_state_bytes
    needed = room_bytes / (tokens_per_rank * max(progress, LEAST_PROGRESS) * HEADROOM)
    return math.ceil(max(needed, profile.activation_bytes_per_token(policy) / HEADROOM))


def describe(batch: PlannedBatch, clock: BusyClock, profile: Profile, num_layers: int) -> tuple[str, int, str | None]:
    """What ran out where, in words; the bytes per token of the next run's estimate, and of which policy they are."""
    rank, at = dist.get_rank(), clock.micro_batch
    where, progress = f"in micro-batch {at}", min(1.0, (clock.layers_done + 1) / num_layers)
    if at < 0:  # after the last: the fullest micro-batch says most of what memory was there
        held = [_tokens_per_rank(batch, micro_batch, rank) for micro_batch in batch.plan.micro_batches]
        at = held.index(max(held))
        where, progress = f"in the optimizer's step, after all micro-batches, {at} being its fullest", 1.0
    micro_batch = batch.plan.micro_batches[at]
    group = next((g for g in micro_batch.groups if rank in g.ranks), None)
    where = f"step {batch.step}: out of memory on rank {rank} {where}"
    if group is None:
        raised = math.ceil(profile.activation_bytes_per_token(micro_batch.policy) / HEADROOM)
        return f"{where}, idle there", raised, micro_batch.policy
    lengths = sorted((int(batch.lengths[i]) for i in group.sequences), reverse=True)
    tokens = sum(lengths)
    raised = raised_activation_bytes(profile, tokens / group.sp_degree, progress, micro_batch.policy)
    predicted = profile.group_bytes(group.sp_degree, tokens, micro_batch.policy)
    under = f" under policy {micro_batch.policy!r}" if micro_batch.policy else ""
    text = (
        f"{where}{under}: its group of {_ranks(group)} held {len(lengths)} sequences of {_few(lengths)} tokens, "
        f"{math.ceil(tokens / group.sp_degree):,} a rank, predicted to need {predicted / 2**20:,.0f} of "
        f"{profile.memory.memory_bytes / 2**20:,.0f} MiB"
    )
    return text, raised, micro_batch.policy


def _tokens_per_rank(batch: PlannedBatch, micro_batch: MicroBatch, rank: int) -> float:
    """What a rank holds in a micro-batch; 0 where it is idle."""
    group = next((g for g in micro_batch.groups if rank in g.ranks), None)
    return 0.0 if group is None else float(batch.lengths[list(group.sequences)].sum()) / group.sp_degree


def _ranks(group: Group) -> str:
    return f"rank {group.ranks[0]}" if group.sp_degree == 1 else f"ranks {group.ranks[0]}-{group.ranks[-1]}"


def _few(lengths: list[int]) -> str:
    shown = ", ".join(f"{length:,}" for length in lengths[:8])
    return f"{shown} and {len(lengths) - 8} shorter" if len(lengths) > 8 else shown
