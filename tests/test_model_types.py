"""The model types of docs/models.md: each is prepared, small, and its attention is as wide as its config was read."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import pytest
import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface

from flexsp.parallel import prepare_model
from flexsp.parallel.needs import Attention
from flexsp.parallel.small import make_small, quiet
from flexsp.parallel.widths import Widths, attention_widths

DOCS = Path(__file__).parent.parent / "docs" / "models.md"
COMPLETED: dict[str, dict[str, object]] = {
    "cohere_compass_text": dict(
        rope_parameters={
            kind: dict(rope_type="default", rope_theta=10000.0) for kind in ("full_attention", "sliding_attention")
        }
    ),
    "deepseek_v2": dict(n_group=1, topk_group=1, num_experts_per_tok=2),
    "dots1": dict(n_routed_experts=8, n_shared_experts=1, num_experts_per_tok=2),
}
"""Fields of those whose default configs do not run."""
CYCLES = ("hrm_text",)
"""Types whose small model runs its layers more often than it has some."""


def types_said_equal() -> list[str]:
    """Those of "Equal to one device, 90" and "The same once their dropout is 0, 7"."""
    text = DOCS.read_text(encoding="utf-8")
    lists = re.findall(r"\*\*(?:Equal to one device|The same once their dropout is 0), (\d+)\*\*[^:]*: ([^.]*)\.", text)
    assert len(lists) == 2
    names = [re.findall(r"[\w-]+", said) for _, said in lists]
    assert [len(each) for each in names] == [int(count) for count, _ in lists]
    return [name for each in names for name in each]


def recording(module, query, key, value, attention_mask=None, **arguments):
    SEEN.append(Widths(heads=query.shape[1], kv_heads=key.shape[1], head_dim=query.shape[3], value_dim=value.shape[3]))
    return value.repeat_interleave(query.shape[1] // key.shape[1], dim=1).transpose(1, 2).contiguous(), None


SEEN: list[Widths] = []
AttentionInterface.register("recording", recording)


def widths_seen(model) -> list[Widths]:
    """What the layers hand to attention."""
    SEEN.clear()
    model.set_attn_implementation("recording")
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        model(input_ids=tokens, position_ids=tokens, use_cache=False)
    return list(SEEN)


def small_model(model_type: str) -> torch.nn.Module:
    config = CONFIG_MAPPING[model_type](**COMPLETED.get(model_type, {}))
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    config = config if isinstance(config, kind.config_class) else config.get_text_config()
    with quiet():
        return make_small(kind, config, torch.float64, few_heads=True)


def check_types(model_types: list[str]) -> dict[str, str]:
    """What is wrong, by type."""
    faults = {}
    for model_type in model_types:
        try:
            model = small_model(model_type)
            read, seen = attention_widths(model.config), widths_seen(model)
            if set(read) != set(seen) or (model_type not in CYCLES and read != seen):
                faults[model_type] = f"read {read}, but seen {seen}"
            prepare_model(model)
        except Exception as error:  # of any kind: the others are tried all the same
            faults[model_type] = f"{type(error).__name__}: {error}"
        gc.collect()
    return faults


def test_the_types_of_gemma_4_whose_heads_differ_by_layer_are_prepared(ranks):
    """transformers refuses to read what differs from the whole config: a layer's own tells."""
    assert ranks(1).run(check_types, ["gemma4_text", "gemma4_unified_text", "mimo_v2_flash", "deepseek_v3"]) == [{}]


def test_what_differs_by_layer_is_asked_of_kernels_for_each():
    attention = Attention.of(CONFIG_MAPPING["gemma4_text"](), "cuda", torch.bfloat16, None)
    assert {(need.head_dim, need.window) for need in attention.alone} == {
        (256, None), (256, 512), (512, None), (512, 512),
    }  # fmt: skip


@pytest.mark.slow
def test_every_model_type_that_the_docs_say_is_equal_is_prepared(ranks):
    assert ranks(1).run(check_types, types_said_equal(), timeout_s=500.0) == [{}]
