"""How torch's allocator on CUDA is set up, before torch is imported."""

from __future__ import annotations

import os

NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


def grow_segments() -> None:
    """Segments that grow, unless the user has said otherwise.

    Rows differ in length from one micro-batch to the next, and what others leave does not fit: memory that is reserved
    and of no use is in no prediction.
    """
    if not any(name in os.environ for name in NAMES):
        os.environ[NAMES[0]] = "expandable_segments:True"
