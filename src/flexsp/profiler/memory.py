"""What a rank holds: model states, and activations per token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

OPTIMIZER_COPIES = 2
"""States per parameter of Adam and AdamW; plain SGD has none, and then this much room is left unused."""


def model_state_bytes(model: torch.nn.Module) -> int:
    """Bytes on this rank of its shards of parameters, gradients and optimizer state."""
    own = [p.to_local() if isinstance(p, DTensor) else p for p in model.parameters()]
    return sum(p.numel() * p.element_size() for p in own) * (2 + OPTIMIZER_COPIES)


def activation_bytes(run: Callable[[int], object], tokens: int, device: torch.device) -> tuple[float, int]:
    """Bytes per token that a rank holds between forward and backward, from two sizes of micro-batch.

    On CUDA the allocator's peak, with everything that is held on the way; on the CPU, which has no such count, the
    tensors that autograd saves.

    Args:
        run: forward and backward of a micro-batch of so many tokens on every rank.
        tokens: the larger size.
        device: of the model.

    Returns:
        Bytes per token, and the bytes held whatever the tokens.
    """
    sizes = tokens, max(1, tokens // 2)
    measure = _peak_bytes if device.type == "cuda" else _saved_bytes
    large, small = (measure(run, size, device) for size in sizes)
    if sizes[0] == sizes[1]:
        return float(max(1, large)), 0
    per_token = max(1.0, (large - small) / (sizes[0] - sizes[1]))
    return per_token, max(0, int(large - per_token * sizes[0]))


def _peak_bytes(run: Callable[[int], object], tokens: int, device: torch.device) -> int:
    run(tokens)  # kernels allocate workspaces at their first call
    torch.cuda.reset_peak_memory_stats(device)
    run(tokens)
    return torch.cuda.max_memory_allocated(device)


def _saved_bytes(run: Callable[[int], object], tokens: int, device: torch.device) -> int:
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(tokens)
    return sum(storages.values())
