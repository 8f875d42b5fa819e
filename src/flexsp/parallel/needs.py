"""What a model's layers will ask of attention kernels, as far as its config tells: known before a step begins.

A kernel that serves a whole row may refuse the blocks of a ring, and then some ranks alone would fail inside of a
layer, while others wait for them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from flexsp.parallel.kernels import KERNELS, Need, choose
from flexsp.profile import Layout


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """The attention of a prepared model."""

    kernel: str | None
    """The kernel that was asked for; None: the first that serves."""
    alone: tuple[Need, ...]
    """What its kinds of layers ask for where a rank has whole rows."""
    in_ring: tuple[Need, ...]
    """The same where keys come around a ring."""

    @classmethod
    def of(cls, config: PreTrainedConfig, device_type: str, dtype: torch.dtype, kernel: str | None) -> Attention:
        """The attention of a model that is computed in `dtype`.

        Raises:
            ValueError: there is no kernel of that name.
        """
        if kernel is not None and kernel not in KERNELS:
            raise ValueError(f"attention={kernel!r} is unknown; choose one of {', '.join(KERNELS)}")
        text = config.get_text_config()
        window = getattr(text, "sliding_window", None)
        window = window if isinstance(window, int) and window > 0 else None
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        head_dim = getattr(text, "qk_head_dim", None) or head_dim
        value_dim = getattr(text, "v_head_dim", None) or head_dim
        softcap = getattr(text, "attn_logit_softcapping", None) or None
        dropout = bool(getattr(text, "attention_dropout", 0.0))

        def needs(ring: bool) -> tuple[Need, ...]:
            return tuple(
                Need(
                    device_type=device_type, dtype=dtype, head_dim=head_dim, value_dim=value_dim, window=each,
                    softcap=softcap, by_positions=ring and each is not None, blocks=ring, dropout=dropout,
                )
                for each in dict.fromkeys((None, window))
            )  # fmt: skip

        return cls(kernel=kernel, alone=needs(ring=False), in_ring=needs(ring=True))

    def check(self, layouts: Iterable[Layout]) -> None:
        """Refuses layouts in which no kernel computes the model's attention.

        Raises:
            ValueError: says why.
        """
        for layout in layouts:
            for need in self.in_ring if layout.ring > 1 else self.alone:
                choose(need, self.kernel)
