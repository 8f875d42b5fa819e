"""The bytes of a profile: model states under ZeRO, a chunk of the loss, and ways to hold fewer activations."""

from __future__ import annotations

from flexsp.estimate.cluster import DTYPES, Cluster
from flexsp.estimate.seconds import linear_s, matrices_s, quadratic_s
from flexsp.estimate.shape import FP32_BYTES, POLICIES, ModelShape
from flexsp.loss_chunks import LOGIT_BYTES, chunk_tokens
from flexsp.profile import Policy

STATES = 4
"""Numbers of one parameter, all in the type that weights are kept in: weight, gradient and Adam's two moments."""
GATHERED_LAYERS = 2
"""Layers whose parameters are on every device at once: the one in work and the one fetched ahead."""
POLICY_TOKENS = 32 * 1024
"""The length of sequences at which the policies' compute_factor holds: they are for long ones."""


def model_state_bytes(
    shape: ModelShape, num_devices: int, dtype: str, zero_stage: int = 3, weight_bytes: int = FP32_BYTES
) -> tuple[float, float]:
    """Bytes on a device: its share of the model states, and what it holds whole.

    ZeRO-3 as FSDP2 does it, on one device too: shards in the type that weights are kept in; whole are two layers, the
    gradient of one (as computed, and in fp32 on its way to the others), embedding and head, which stay gathered through
    forward and backward, and the head's gradient, which waits for the end of the backward. ZeRO-1 and ZeRO-2 after
    arXiv 1910.02054, section 5: a whole copy of the weights and, in ZeRO-1, of the gradients, in the compute dtype.

    Args:
        shape: the model.
        num_devices: over which it is sharded.
        dtype: what it computes in.
        zero_stage: what is sharded.
        weight_bytes: of a parameter as it is kept.
    """
    itemsize, parameters = DTYPES[dtype], shape.num_parameters
    if zero_stage == 3:
        root = shape.embedding_parameters + shape.head_parameters + shape.final_parameters
        layer = shape.layer_parameters
        head = shape.vocab_size * shape.hidden_size
        whole = itemsize * (root + head + GATHERED_LAYERS * layer) + (itemsize + FP32_BYTES) * layer
        return STATES * weight_bytes * parameters / num_devices, whole
    master = (3 if itemsize < weight_bytes else 2) * weight_bytes  # moments, and weights where the copy is of less
    if zero_stage == 2:
        return (master + itemsize) * parameters / num_devices, itemsize * parameters
    return master * parameters / num_devices, 2 * itemsize * parameters


def loss_bytes(shape: ModelShape, dtype: str, room_bytes: float) -> float:
    """Bytes of the loss on a device, whatever its tokens: those of a chunk, however long the row.

    Never more than those of the most tokens that a device holds, under the policy that holds the most.

    Args:
        shape: the model.
        dtype: what it computes in.
        room_bytes: of a device beside its model states.
    """
    per_token = LOGIT_BYTES * shape.vocab_size
    tokens = room_bytes / (_least_per_token(shape, dtype) + per_token)
    return per_token * max(0.0, min(chunk_tokens(shape.vocab_size), tokens))


def least_room_bytes(shape: ModelShape, dtype: str) -> float:
    """Bytes that a device must have beside its model states, for one token without a policy and the loss.

    The least room for which room - loss_bytes(room) is a token's activations.
    """
    token = shape.activation_bytes_per_token("none", DTYPES[dtype])
    per_token = LOGIT_BYTES * shape.vocab_size
    least = _least_per_token(shape, dtype)
    return min(token + per_token * chunk_tokens(shape.vocab_size), token * (least + per_token) / least)


def _least_per_token(shape: ModelShape, dtype: str) -> int:
    return min(shape.activation_bytes_per_token(policy, DTYPES[dtype]) for policy in POLICIES)


def policies(shape: ModelShape, cluster: Cluster, dtype: str) -> dict[str, Policy]:
    """The policies of a profile: what each holds of a token, and what it costs at POLICY_TOKENS."""
    itemsize = DTYPES[dtype]
    factors = {
        "selective": _recompute_factor(shape, cluster, dtype, attention=False),
        "full": _recompute_factor(shape, cluster, dtype, attention=True),
        "offload": _offload_factor(shape, cluster, dtype),
    }
    return {
        name: Policy(activation_bytes_per_token=shape.activation_bytes_per_token(name, itemsize), compute_factor=factor)
        for name, factor in factors.items()
    }


def _recompute_factor(shape: ModelShape, cluster: Cluster, dtype: str, attention: bool) -> float:
    """Compute with a second forward of the MLP, or of the whole layer, over compute without."""
    linear = linear_s(shape, cluster, dtype)
    quadratic = quadratic_s(shape, cluster, dtype) * POLICY_TOKENS
    kinds = shape.flops_by_kind()
    again = kinds["mlp"] + kinds["router"] + (kinds["attention_projections"] if attention else 0)
    again_s = matrices_s(again, cluster, dtype) / 3  # a forward is a third of forward and backward
    if attention:
        again_s += quadratic * 2 / 7
    return 1 + again_s / (linear + quadratic)


def _offload_factor(shape: ModelShape, cluster: Cluster, dtype: str) -> float:
    """Compute while activations go to the host in the forward and come back in the backward, over compute alone."""
    linear = linear_s(shape, cluster, dtype)
    quadratic = quadratic_s(shape, cluster, dtype) * POLICY_TOKENS
    forward_s = linear_s(shape, cluster, dtype, loss_in_chunks=False) / 3 + quadratic * 2 / 7
    backward_s = linear + quadratic - forward_s
    layer_bytes = sum(shape.kept_bytes_per_layer(DTYPES[dtype]).values())
    move_s = shape.num_layers * layer_bytes / (cluster.host_bytes_per_s * cluster.host_efficiency)
    return (max(forward_s, move_s) + max(backward_s, move_s)) / (forward_s + backward_s)
