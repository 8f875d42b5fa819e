"""One device's loss and gradients, sharing nothing with packing, sharding, exchange or attention of the project.

Every sequence goes through the model alone, unpadded; attention and loss are written out as in a textbook, in the
model's own precision (transformers' eager attention has an fp32 softmax, too coarse for fp64).
"""

from __future__ import annotations

import torch
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig


def textbook_attention(  # type: ignore[no-untyped-def]
    module, query, key, value, attention_mask, scaling, dropout=0.0, sliding_window=None, softcap=None, s_aux=None, **_
):
    heads, tokens = query.shape[1:3]
    outs = []
    for head in range(heads):
        kv_head = head * key.shape[1] // heads
        scores = query[0, head] @ key[0, kv_head].T * scaling
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        hidden = torch.ones(tokens, tokens).triu(1).bool()
        if sliding_window is not None:  # a token sees itself and the sliding_window - 1 before it
            hidden |= torch.ones(tokens, tokens).tril(-sliding_window).bool()
        scores = scores.masked_fill(hidden, -torch.inf)
        if s_aux is not None:  # a key of no value that every query sees
            scores = torch.cat([scores, s_aux[head].expand(tokens, 1).to(scores.dtype)], dim=1)
        outs.append(scores.softmax(-1)[:, :tokens] @ value[0, kv_head])
    return torch.stack(outs, dim=1)[None], None


AttentionInterface.register("textbook", textbook_attention)


def small_config(num_heads: int = 4, num_kv_heads: int = 2, **changes: object) -> PretrainedConfig:
    from transformers import LlamaConfig

    fields = dict(
        vocab_size=64, hidden_size=8 * num_heads, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=num_heads, num_key_value_heads=num_kv_heads, max_position_embeddings=4096,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaConfig(**{**fields, **changes})


def build(config: PretrainedConfig, dtype: torch.dtype, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(  # other implementations of experts lack fp64
        config, attn_implementation="textbook", experts_implementation="eager"
    ).to(dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():  # away from the tiny initial weights, where a fault of attention hides in rounding
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=dtype) * 0.1)
    return model


def reference_step(
    model: torch.nn.Module, sequences: list[list[int]], labels: list[list[int]]
) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss over the labels of the batch that count, and the gradient of every parameter."""
    total = torch.zeros((), dtype=torch.float64)
    count = sum(label != -100 for row in labels for label in row[1:])
    for tokens, row in zip(sequences, labels, strict=True):
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
        log_probabilities = logits.log_softmax(-1)
        picked = [log_probabilities[i, row[i + 1]] for i in range(len(tokens) - 1) if row[i + 1] != -100]
        if picked:
            loss = -torch.stack(picked).sum() / count
            loss.backward()
            total += loss.detach().double()
        else:  # no label counts
            (logits.sum() * 0).backward()
    return total.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
