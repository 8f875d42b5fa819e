"""Joining the other ranks: torchrun's environment, or a run of one rank without it."""

from __future__ import annotations

import datetime
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


@contextmanager
def joined_ranks(timeout_s: float) -> Iterator[torch.device]:
    """The process group of all ranks (NCCL where there is CUDA, else gloo) and this rank's device, while inside.

    Without torchrun's environment the run has one rank.
    """
    timeout = datetime.timedelta(seconds=timeout_s)
    device = torch.device("cpu")
    backend = "gloo"
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
        backend = "nccl"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        alone = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=alone, rank=0, world_size=1, timeout=timeout)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def first_to_say(text: str) -> bool:
    """Whether no other rank has said this yet, so that what all ranks find wrong is printed once.

    Asks the store of torchrun's agent, which is there before any process group and outlives a failing rank.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    key = "flexsp/said/" + hashlib.sha256(text.encode()).hexdigest()
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            is_master=False,
            timeout=datetime.timedelta(seconds=10),
        )
        return bool(store.add(key, 1) == 1)
    except (KeyError, RuntimeError):  # better twice than not at all
        return True
