"""What a model's layers will ask of attention kernels, by its config and its small model: known before a step begins.

A kernel that serves a whole row may refuse the blocks of a ring, and then some ranks alone would fail inside of a
layer, while others wait for them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

import torch
from transformers import PreTrainedConfig

from flexsp.parallel.kernels import KERNELS, Need, choose
from flexsp.parallel.kinds import NOTHING, Asked
from flexsp.parallel.widths import attention_widths, layer_configs
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
    def of(
        cls,
        config: PreTrainedConfig,
        device_type: str,
        dtype: torch.dtype,
        kernel: str | None,
        asked: Asked = NOTHING,
    ) -> Attention:
        """The attention of a model that is computed in `dtype`.

        Args:
            config: of the model.
            device_type: "cpu" or "cuda".
            dtype: of queries, keys and values.
            kernel: the name of one; None: the first that serves.
            asked: from `asked_of`.

        Raises:
            ValueError: there is no kernel of that name.
        """
        if kernel is not None and kernel not in KERNELS:
            raise ValueError(f"attention={kernel!r} is unknown; choose one of {', '.join(KERNELS)}")
        dims = dict.fromkeys((each.head_dim, each.value_dim) for each in attention_widths(config))
        windows: dict[int | None, None] = {None: None}
        softcaps: dict[float | None, None] = {}
        for own in layer_configs(config):
            window = getattr(own, "sliding_window", None)
            if isinstance(window, int) and window > 0:
                windows[window] = None
            softcaps[getattr(own, "attn_logit_softcapping", None) or None] = None

        def needs(ring: bool) -> tuple[Need, ...]:
            return tuple(
                Need(
                    device_type=device_type, dtype=dtype, head_dim=head_dim, value_dim=value_dim, window=window,
                    softcap=softcap, by_positions=ring and window is not None, blocks=ring or asked.sinks,
                    dropout=asked.dropout,
                )
                for (head_dim, value_dim), window, softcap in product(dims, windows, softcaps)
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
