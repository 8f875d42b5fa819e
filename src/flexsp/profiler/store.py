"""Saved profiles: measured at the first run, under a key of machine, model and rank count, then reused."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from transformers import PreTrainedModel

import flexsp
from flexsp import jsonfields as jf
from flexsp.profile import Profile
from flexsp.profiler.make import device_name

log = logging.getLogger(__name__)


def profile_path(folder: str | Path, model: PreTrainedModel, settings: Mapping[str, Any]) -> Path:
    """Where the profile of this model on these ranks is saved.

    The key is everything that a measured time depends on: machine and device, model config, number of ranks, versions,
    and `settings` (degrees, memory limit, types).
    """
    device = next(model.parameters()).device
    world_size = dist.get_world_size()
    key = {
        "machine": [platform.node(), platform.machine(), device_name(device)],
        "model": {k: v for k, v in model.config.to_diff_dict().items() if k != "transformers_version"},
        "world_size": world_size,
        "versions": [flexsp.__version__, torch.__version__, transformers.__version__],
        "settings": dict(settings),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:12]
    return Path(os.path.expanduser(folder)) / f"{model.config.model_type}-{world_size}x{device.type}-{digest}.json"


def load_or_measure(path: Path, measure: Callable[[], Profile], control: dist.ProcessGroup) -> Profile:
    """The profile saved at `path`, or a new one that is saved there. A collective; rank 0 reads and writes.

    Args:
        path: from `profile_path`.
        measure: makes the profile, on all ranks.
        control: a CPU group of all ranks.
    """
    found: list[Any] = [None]
    rank = dist.get_rank()
    if rank == 0 and path.exists():
        try:
            found[0] = Profile.load(path)
        except ValueError as error:  # sent on, so that all ranks end alike
            found[0] = f"{error}; or delete the file to measure again"
    dist.broadcast_object_list(found, src=0, group=control)
    if isinstance(found[0], str):
        raise ValueError(found[0])
    if found[0] is not None:
        log.info("profile: %s (measured %s)", path, found[0].provenance.get("date"))
        return found[0]  # type: ignore[no-any-return]
    log.info("profile: none saved for this machine, model and number of ranks yet; measuring")
    profile = measure()
    if rank == 0:
        jf.write_object(path, profile.to_json(), synced=True)
    log.info("profile: saved as %s", path)
    return profile
