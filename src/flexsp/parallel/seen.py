"""The attentions that a small model runs through while it is looked at (`kinds`), and what they see.

Letters: T = tokens, N = heads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

DENSE, APART = "flexsp-probe-dense", "flexsp-probe-apart"
HARMLESS = {
    "is_causal", "position_ids", "cache_position", "output_attentions", "output_hidden_states", "use_cache",
    "output_router_logits", "logits_to_keep", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
}  # fmt: skip
"""Arguments of attention that do not change what plain attention computes."""


@dataclass(slots=True)
class Seen:
    """What attention layers were called with; handed through the model's forward as the real context is."""

    calls: int = 0
    strange: set[str] = field(default_factory=set)
    """Arguments that nobody here knows."""
    masked: bool = False
    not_causal: str = ""
    """Class of a layer that sees later tokens."""
    sinks: bool = False
    dropout: bool = False

    def note(
        self,
        module: torch.nn.Module,
        attention_mask: Tensor | None,
        s_aux: Tensor | None,
        dropout: float,
        arguments: dict[str, Any],
    ) -> None:
        self.calls += 1
        self.sinks |= s_aux is not None
        self.dropout |= bool(dropout)
        self.masked |= attention_mask is not None
        self.strange |= {name for name, value in arguments.items() if value is not None and name not in HARMLESS}
        causal = arguments.get("is_causal")
        if not (getattr(module, "is_causal", True) if causal is None else causal):
            self.not_causal = type(module).__name__

    def fault(self) -> str | None:
        """What our attention would not have computed."""
        if self.calls == 0:
            return "its layers do not hand keyword arguments to the attention interface of transformers"
        if self.not_causal:
            return f"is_causal=False of {self.not_causal}: its tokens see later ones"
        if self.strange:
            return f"its attention takes {', '.join(sorted(self.strange))}, which flexsp's does not compute"
        if self.masked:
            return "its attention is given a mask of its own"
        return None


def _dense(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sp_context: Seen | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """What `flexsp_attention` computes for one sequence, written out."""
    if sp_context is not None:
        sp_context.note(module, attention_mask, s_aux, dropout, arguments)
    groups = query.shape[1] // key.shape[1]
    k_NTH, v_NTV = (x[0].repeat_interleave(groups, dim=0) for x in (key, value))
    scores_NTT = query[0] @ k_NTH.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap:
        scores_NTT = softcap * (scores_NTT / softcap).tanh()
    place = torch.arange(query.shape[2])
    distance_TT = place[:, None] - place
    hidden = (distance_TT < 0) | (distance_TT >= (sliding_window or len(place)))
    scores_NTT = scores_NTT.masked_fill(hidden, -torch.inf)
    if s_aux is not None:
        sinks = s_aux.to(scores_NTT.dtype)[:, None, None].expand(-1, len(place), 1)
        scores_NTT = torch.cat([scores_NTT, sinks], dim=-1)
    weights = scores_NTT.softmax(-1)[..., : len(place)]
    return (weights @ v_NTV).transpose(0, 1)[None].contiguous(), None


def _apart(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    sp_context: Seen | None = None,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """An attention in which a token sees itself alone, yet whose output tells queries and keys apart."""
    groups = query.shape[1] // key.shape[1]
    out = value.repeat_interleave(groups, dim=1)
    for x in (query, key.repeat_interleave(groups, dim=1)):
        direction = torch.arange(1, x.shape[-1] + 1, dtype=x.dtype, device=x.device).sin()
        out = out + (x @ direction)[..., None].tanh()
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(DENSE, _dense)
AttentionInterface.register(APART, _apart)
