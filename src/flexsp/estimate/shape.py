"""A model's sizes, and what follows from them: parameters, FLOPs and bytes, with no hardware in it.

Parameters count every matrix, bias, norm and position embedding. FLOPs count a multiply-add as two and a backward as
twice its forward, so a parameter that a token multiplies with costs 6 per token (Kaplan et al., arXiv 2001.08361);
norms, activation functions and the softmax are left out, which the efficiency of a cluster makes up for.
"""

from __future__ import annotations

from dataclasses import dataclass

POLICIES = ("none", "selective", "full", "offload")
"""Ways to hold activations: `none` keeps all; see `ModelShape.kept_bytes_per_layer`."""
FP32_BYTES = 4
OFFLOAD_LAYERS = 2
"""Layers whose activations are on the device under `offload`: one in work, one on its way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The sizes of a causal language model."""

    name: str
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    """Width of one MLP, or of one expert."""
    vocab_size: int
    gated: bool
    """Whether an MLP has three matrices (gate, up, down) and not two."""
    tied: bool
    """Whether the output head is the embedding."""
    num_experts: int = 1
    experts_per_token: int = 1
    shared_intermediate_size: int = 0
    """Width of the experts that every token goes through, all together."""
    num_dense_layers: int = 0
    """Layers of a mixture of experts that have a plain MLP."""
    dense_intermediate_size: int = 0
    """Width of the MLP of those."""
    num_positions: int = 0
    """Rows of a learned position embedding."""
    attention_vector_parameters: int = 0
    """Norms and biases of one layer outside its MLP."""
    mlp_bias: bool = False
    """Whether the matrices of an MLP have biases."""
    shared_gate: bool = False
    """Whether the shared expert has a gate of its own: one number per token."""
    final_parameters: int = 0
    """Norms and biases outside the layers."""
    assumptions: tuple[str, ...] = ()
    """What the config did not say and was assumed."""

    # ---- parameters

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 1

    @property
    def attention_parameters(self) -> int:
        """The four projections of one layer."""
        return self.hidden_size * self.head_dim * 2 * (self.num_heads + self.num_kv_heads)

    @property
    def router_parameters(self) -> int:
        """What chooses a token's experts, of one layer."""
        gate = self.hidden_size if self.shared_gate and self.shared_intermediate_size else 0
        return self.hidden_size * self.num_experts + gate if self.is_moe else 0

    def mlp_parameters(self, width: int) -> int:
        """The matrices of an MLP of this width."""
        return (3 if self.gated else 2) * self.hidden_size * width

    @property
    def layer_parameters(self) -> int:
        """All parameters of one layer; of a mixture of experts, of a layer that has experts."""
        mlp = self.num_experts * self._mlp_with_biases(self.intermediate_size)
        shared = self._mlp_with_biases(self.shared_intermediate_size) if self.shared_intermediate_size else 0
        return self.attention_parameters + self.attention_vector_parameters + self.router_parameters + mlp + shared

    @property
    def active_layer_parameters(self) -> int:
        """Parameters of one layer that a token multiplies with: of the experts, those that it chose."""
        active = self.experts_per_token if self.is_moe else 1
        return (
            self.attention_parameters
            + self.router_parameters
            + active * self.mlp_parameters(self.intermediate_size)
            + self.mlp_parameters(self.shared_intermediate_size)
        )

    @property
    def embedding_parameters(self) -> int:
        """Token and position embeddings."""
        return (self.vocab_size + self.num_positions) * self.hidden_size

    @property
    def head_parameters(self) -> int:
        """The output head; 0 where it is the embedding."""
        return 0 if self.tied else self.vocab_size * self.hidden_size

    @property
    def num_parameters(self) -> int:
        """All parameters of the model."""
        dense = (
            self.attention_parameters
            + self.attention_vector_parameters
            + self._mlp_with_biases(self.dense_intermediate_size)
        )
        layers = (self.num_layers - self.num_dense_layers) * self.layer_parameters + self.num_dense_layers * dense
        return layers + self.embedding_parameters + self.head_parameters + self.final_parameters

    def _mlp_with_biases(self, width: int) -> int:
        biases = (2 if self.gated else 1) * width + self.hidden_size if self.mlp_bias else 0
        return self.mlp_parameters(width) + biases

    # ---- FLOPs, forward and backward

    def flops_by_kind(self) -> dict[str, int]:
        """FLOPs per token of what is linear in the tokens, forward and backward: 6 per active matrix parameter."""
        sparse = self.num_layers - self.num_dense_layers
        experts = self.experts_per_token if self.is_moe else 1
        width = experts * self.intermediate_size + self.shared_intermediate_size
        return {
            "attention_projections": 6 * self.num_layers * self.attention_parameters,
            "mlp": 6
            * (
                sparse * self.mlp_parameters(width)
                + self.num_dense_layers * self.mlp_parameters(self.dense_intermediate_size)
            ),
            "router": 6 * sparse * self.router_parameters,
            "head": 6 * self.vocab_size * self.hidden_size,
        }

    def linear_flops_per_token(self) -> int:
        """FLOPs per token, forward and backward, output head included and attention scores left out."""
        return sum(self.flops_by_kind().values())

    def attention_flops_per_square(self) -> int:
        """FLOPs per token squared of a sequence, forward and backward, of causal attention.

        Scores and their use are 4 * s^2 * heads * head_dim a layer, of which a causal mask leaves half; the backward of
        FlashAttention-2 is five matrix products to the forward's two: 2.5 times as much (arXiv 2307.08691, section 4).
        """
        return 7 * self.num_heads * self.head_dim * self.num_layers

    # ---- bytes

    def exchange_bytes_per_token(self, itemsize: int) -> int:
        """Bytes that a token moves through Ulysses' exchanges, forward and backward: q, k, v and the output.

        KV heads count as the model has them: what a degree repeats of them is in its effective bandwidth.
        """
        return (2 * self.num_heads + 2 * self.num_kv_heads) * self.head_dim * itemsize * self.num_layers * 2

    def kept_bytes_per_layer(self, itemsize: int) -> dict[str, int]:
        """What one layer keeps of a token for its backward, item by item, after Korthikanti et al. (arXiv 2205.05198).

        Without their dropout masks and with FlashAttention, which keeps its output and one number per head. Norms are
        taken as fused: they keep their input. Sums to 32 bytes per hidden unit for a GPT in bfloat16.
        """
        query, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        chosen = self.experts_per_token if self.is_moe else 1
        width = chosen * self.intermediate_size + self.shared_intermediate_size
        items = {
            "layer input": self.hidden_size * itemsize,
            "attention's norm": self.hidden_size * itemsize,
            "queries, keys, values": (query + 2 * kv) * itemsize,
            "attention's output": query * itemsize,
            "log-sum-exp of the scores": self.num_heads * FP32_BYTES,
            "middle of the layer": self.hidden_size * itemsize,
            "MLP's norm": self.hidden_size * itemsize,
            "MLP's inner": (4 if self.gated else 2) * width * itemsize,
        }
        if self.is_moe:  # each chosen expert gets a copy of its tokens, and its output waits for the weighted sum
            items["experts' tokens"] = 2 * chosen * self.hidden_size * itemsize
        return items

    def activation_bytes_per_token(self, policy: str = "none", itemsize: int = 2) -> int:
        """Bytes that one token holds in the layers on its device under a policy; `memory.loss_bytes` has the logits.

        - `none` keeps everything;
        - `selective` computes norms and the MLP's inner part again, and keeps attention;
        - `full` keeps each layer's input, and has one layer in work;
        - `offload` moves activations to the host, and has two layers on the device.

        Raises:
            ValueError: a policy of another name.
        """
        items = self.kept_bytes_per_layer(itemsize)
        layer = sum(items.values())
        if policy == "none":
            return self.num_layers * layer
        if policy == "selective":
            again = sum(items.get(name, 0) for name in RECOMPUTED_BY_SELECTIVE)
            return self.num_layers * (layer - again) + again
        if policy == "full":
            return (self.num_layers - 1) * items["layer input"] + layer
        if policy == "offload":
            return min(OFFLOAD_LAYERS, self.num_layers) * layer
        raise ValueError(f"policy={policy!r} is unknown; choose one of {', '.join(POLICIES)}")


RECOMPUTED_BY_SELECTIVE = ("attention's norm", "MLP's norm", "MLP's inner", "experts' tokens")
