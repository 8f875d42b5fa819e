"""FLOPs of a model's forward and backward, as MFU counts them: what the model needs, nothing computed twice.

    FLOPs = 6 * P * sum(s)  +  sum over layers of 12 * heads * head_dim * sum(pairs(s))

P are the matrix parameters that a token multiplies with: projections, MLP (of experts those it chose), router and
output head, not the embedding's rows. A pair is a token and a token that it sees: s^2 / 2 in causal attention, and
w*s - w^2/2 in a window of w tokens where s > w. That is the count of PaLM (arXiv 2204.02311, appendix B), whose
attention is twice ours: it counts all s^2 pairs, and a causal mask leaves half. The estimate of seconds counts 7 where
this counts 6 (`ModelShape.attention_flops_per_square`): FlashAttention's backward computes the scores again. MFU leaves
that out, as it leaves out what an activation policy or the loss in chunks computes again. Norms, activation functions,
softmax and rotary embeddings are left out of both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from flexsp import jsonfields as jf
from flexsp.estimate.read_config import model_shape
from flexsp.lengths import LengthArray

FULL = 0
"""The window of a layer that has none."""
KINDS = {"full_attention": False, "sliding_attention": True, "global": False, "local": True}
"""Names of layers in configs, and whether they have a window."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlopCount:
    """The FLOPs of one model by the lengths of its sequences."""

    num_parameters: int
    """All parameters that these sizes give: a model with another number is not of these sizes."""
    linear_flops_per_token: int
    """Forward and backward, output head included and attention scores left out."""
    layer_flops_per_pair: int
    """Forward and backward of one layer's scores and their use, for a token and a token that it sees."""
    windows: Mapping[int, int]
    """How many layers have which window, in tokens; `FULL` is none."""
    assumptions: tuple[str, ...] = ()
    """What the config did not say and was assumed."""

    def step_flops(self, lengths: LengthArray) -> float:
        """Forward and backward of sequences of these lengths, each attending to itself alone.

        Args:
            lengths: (K,) tokens.
        """
        s = lengths.astype(np.float64)
        pairs = sum(count * float(visible_pairs(s, window).sum()) for window, count in self.windows.items())
        return self.linear_flops_per_token * float(s.sum()) + self.layer_flops_per_pair * pairs


def visible_pairs(s: np.ndarray[Any, np.dtype[np.float64]], window: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Pairs of a token and a token that it sees, (K,) of sequences of `s` (K,) tokens; the diagonal counts half."""
    seen = s if window == FULL else np.minimum(s, window)
    return seen * s - seen * seen / 2


def flop_count(config: Mapping[str, Any], where: str = "model config") -> FlopCount:
    """The FLOPs of the model of a Hugging Face config, e.g. `config.to_dict()`.

    Raises:
        ValueError: a field is missing or wrong, or the attention is of a kind that is not counted.
    """
    shape = model_shape(config, where)
    windows = layer_windows(config, shape.num_layers, where)
    return FlopCount(
        num_parameters=shape.num_parameters,
        linear_flops_per_token=shape.linear_flops_per_token(),
        layer_flops_per_pair=12 * shape.num_heads * shape.head_dim,
        windows=Counter(windows),
        assumptions=tuple(text for text in shape.assumptions if not text.startswith("sliding_window=")),
    )


def layer_windows(config: Mapping[str, Any], num_layers: int, where: str = "model config") -> tuple[int, ...]:
    """How many tokens a token sees at most, itself included, by layer; `FULL` where it sees all before it.

    Raises:
        ValueError: a layer is of a kind that is not counted, or the kinds are not one a layer.
    """
    fields = config.get("text_config") or config
    window = fields.get("sliding_window") if fields.get("use_sliding_window", True) else None
    kinds = fields.get("layer_types") or fields.get("attention_layers")
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * num_layers
    if fields.get("model_type") == "gpt_neo":
        window = fields.get("window_size")
    kinds = jf.as_list(kinds, f"{where}: layer_types")
    if len(kinds) != num_layers:
        raise ValueError(f"{where}: layer_types has {len(kinds)} entries for {num_layers} layers; give one a layer")
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(
                f"{where}: layer_types has {kind!r}, whose FLOPs are not counted; known are {', '.join(KINDS)}"
            )
    width = FULL if window is None else jf.as_integer(window, f"{where}: sliding_window", 1)
    return tuple(width if KINDS[kind] else FULL for kind in kinds)
