"""The first collective of a step: every rank proves that it is about to run the same plan.

Ranks that run different plans wait for one another for ever. So before anything else each rank gathers from all, on a
CPU group, a digest of what it will run, the labels that it counts, and the error that keeps it from running, if any.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter

import numpy as np
import torch
import torch.distributed as dist

from flexsp.data.batch import PlannedBatch

DIGEST_BYTES = 32
ERROR_BYTES = 512


class PlanMismatchError(RuntimeError):
    """Ranks hold different plans for a step."""


class RankError(RuntimeError):
    """A rank could not make its part of a step ready; raised on all ranks alike."""


def batch_digest(batch: PlannedBatch) -> bytes:
    """SHA-256 of step, sequence ids, lengths, and every micro-batch's policy, ranks, layout and sequences."""
    digest = hashlib.sha256()
    for numbers in (np.array([batch.step, batch.plan.num_devices]), batch.sequence_ids, batch.lengths):
        digest.update(np.ascontiguousarray(numbers, dtype="<i8").tobytes())
    layout = [
        [
            micro_batch.policy,
            [[group.ranks, batch.layout(group.sp_degree).ring, group.sequences] for group in micro_batch.groups],
        ]
        for micro_batch in batch.plan.micro_batches
    ]
    digest.update(json.dumps(layout).encode())
    return digest.digest()


def agree(batch: PlannedBatch, num_labels: int, error: Exception | None, control: dist.ProcessGroup) -> int:
    """The labels of the global batch that count, once all ranks hold the same plan and none has an error.

    Args:
        batch: what this rank will run.
        num_labels: labels of this rank that count.
        error: what keeps this rank from running, or None.
        control: a CPU group of all ranks.

    Raises:
        RankError: a rank has an error.
        PlanMismatchError: the digests differ.
    """
    said = f"{type(error).__name__}: {error}".encode()[:ERROR_BYTES] if error is not None else b""
    message = batch_digest(batch) + num_labels.to_bytes(8, "little") + said.ljust(ERROR_BYTES, b"\0")
    own = torch.frombuffer(bytearray(message), dtype=torch.uint8)
    gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, own, group=control)
    messages = [bytes(row.tolist()) for row in gathered]

    for rank, received in enumerate(messages):
        if text := received[DIGEST_BYTES + 8 :].rstrip(b"\0"):
            raise RankError(f"step {batch.step}, rank {rank}: {text.decode(errors='replace')}") from error
    digests = [received[:DIGEST_BYTES] for received in messages]
    usual, count = Counter(digests).most_common(1)[0]
    if count != len(digests):
        others = [rank for rank, digest in enumerate(digests) if digest != usual]
        raise PlanMismatchError(
            f"step {batch.step}: ranks {others} hold another plan than the other {count} of {len(digests)} ranks; "
            f"every rank must be given the same batch and plan"
        )
    return sum(int.from_bytes(received[DIGEST_BYTES : DIGEST_BYTES + 8], "little") for received in messages)
