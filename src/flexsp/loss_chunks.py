"""How much of the loss over a vocabulary is computed at a time: by it go the executor and, without torch, estimates."""

from __future__ import annotations

LOGITS_BYTES = 512 * 2**20
"""Of a chunk's logits in fp32, by default. In its backward a chunk holds thrice that, see `LOGIT_BYTES`; smaller ones
make the head's matrices less efficient, and each adds to the gradient of the whole head."""
LOGIT_BYTES = 12
"""Of one logit in the backward, whatever type it is computed in: in fp32 its log-probability, the gradient of that, and
its own gradient."""


def chunk_tokens(vocab_size: int) -> int:
    """Tokens of a chunk by default: as many as `LOGITS_BYTES` holds, one at least."""
    return max(1, LOGITS_BYTES // (4 * vocab_size))
