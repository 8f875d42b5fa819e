"""What `flexsp verify` does on the ranks: a small model of the user's kind, trained by the executor and on one device.

1. Check the model as `prepare_model` does; refuse it by name.
2. Make a small one: at least one layer of each kind, the model's own heads, random weights.
3. Run a global batch that uses every degree of the ranks through the executor, once by each way to split the degrees.
4. Run the same sequences one by one through transformers' eager attention on rank 0's device alone.
5. Compare the loss and the gradient of every parameter.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from flexsp.data import PlannedBatch
from flexsp.data.packing import IGNORE_INDEX, IntArray
from flexsp.parallel import GroupPool, check_model, default_layouts, layouts_of, prepare_model
from flexsp.parallel.experts import is_expert
from flexsp.parallel.small import make_small, quiet
from flexsp.profile import Layout
from flexsp.profiler.parts import read_model_config
from flexsp.profiler.points import batch_of
from flexsp.train.failures import Guard, Say
from flexsp.train.one_device import difference, one_device
from flexsp.train.ranks import joined_ranks

TIMEOUT_S = 600.0
WINDOW = 16
LENGTHS = (1, 2, 5, 11, 23, 48, 64)
"""Of sequences: shorter than a group, and longer than a window."""
TOLERANCES = {"float64": 1e-5, "float32": 1e-3, "bfloat16": 1e-1}
"""Norms, routers and rotary embeddings compute in fp32 inside, whatever the model's type."""
KEPT = (
    "num_attention_heads", "num_key_value_heads", "head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
)  # fmt: skip
CHUNK_TOKENS = 32
"""The loss of longer rows is computed in chunks."""
MASKED = 0.2
"""Share of the tokens that are no labels."""

FOLDER = "flexsp-verify"
"""Made in the current folder where a rank fails, for its traceback."""

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyRequest:
    """The flags of `flexsp verify`."""

    config: str
    """A Hugging Face directory or JSON file."""
    layers: int | None
    """Of the small model; None: one of each kind."""
    dtype: str
    tolerance: float | None
    """Relative, of loss and gradients; None: that of the type."""


def verify_model(request: VerifyRequest, tell: Tell, say: Say) -> int:
    """Compares, and returns the exit status: 0 within the tolerance, 1 beyond it.

    Args:
        request: what to compare.
        tell: takes what is found, line by line, on rank 0.
        say: is given what goes wrong once the ranks are there, in one line and on one of them.

    Raises:
        ValueError: bad flags, or a config that cannot be read; or the model is refused, which the message says.
        SystemExit: with the status, where something did go wrong.
    """
    if request.layers is not None and request.layers < 1:
        raise ValueError(f"--layers={request.layers} must be at least 1; leave it out for one layer of each kind")
    if request.tolerance is not None and not request.tolerance >= 0:
        raise ValueError(f"--tolerance={request.tolerance} must not be negative; give a relative difference")
    with quiet():
        config = _read(request.config)
        kind, config = _checked(config)
        model = _small_model(kind, config, request)
    with Guard(Path(FOLDER), TIMEOUT_S, say, goes_on=False) as guard, guard.explaining():
        guard.place.at("joining the other ranks")
        with joined_ranks(TIMEOUT_S) as device, guard.explaining():
            guard.place.at("comparing with one device")
            held = _compare(config, model, request, tell if dist.get_rank() == 0 else _say_nothing, device)
    return 0 if held else 1


def _compare(
    config: PreTrainedConfig, model: PreTrainedModel, request: VerifyRequest, say: Tell, device: torch.device
) -> bool:
    """Whether loss and gradients are within the tolerance. A collective."""
    tolerance = TOLERANCES[request.dtype] if request.tolerance is None else request.tolerance
    for line in _described(config, model.config, request.dtype):
        say(line)
    if request.dtype == "bfloat16" and any(is_expert(name) for name, _ in model.named_parameters()):
        say("in bfloat16 rounding may send a token to another expert, which is no fault; float32 tells")
    worst = _worst(model, device, say)
    held = all(each <= tolerance for each in worst)  # nan is not
    world_size = dist.get_world_size()
    verdict, beyond = ("equal", "within") if held else ("not equal", "beyond")
    say(
        f"{verdict}: on {world_size} rank{'s' * (world_size > 1)} loss and gradients differ by at most "
        f"{worst[0]:.1e} and {worst[1]:.1e} from one device, {beyond} the tolerance of {tolerance:.0e}"
    )
    return held


def _say_nothing(line: str) -> None:
    pass


def _read(path: str) -> PreTrainedConfig:
    """
    Raises:
        ValueError: it cannot be read.
    """
    try:
        return read_model_config(path)
    except ValueError:
        raise
    except Exception as error:  # a config's own validation, of any kind
        raise ValueError(f"{path}: transformers cannot make a config of it ({_line(error)}); correct it") from None


def _checked(config: PreTrainedConfig) -> tuple[type[PreTrainedModel], PreTrainedConfig]:
    """The class that transformers would build, and its config, checked on a model without memory for its weights.

    Raises:
        ValueError: says "refused", and why.
    """
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(
            f"refused: model_type={config.model_type!r} has no causal language model in transformers; use one that has"
        )
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # of the model's own code
        raise ValueError(
            f"refused: transformers cannot build model_type={config.model_type!r} of this config ({_line(error)}); "
            f"correct it"
        ) from None
    try:
        check_model(model)
    except ValueError as error:
        raise ValueError(f"refused: {error}") from None
    return type(model), model.config


def _small_model(kind: type[PreTrainedModel], config: PreTrainedConfig, request: VerifyRequest) -> PreTrainedModel:
    """
    Raises:
        ValueError: the model's own code does not run, with its own heads, at any size.
    """
    dtype = getattr(torch, request.dtype)
    try:
        model: PreTrainedModel = make_small(kind, config, dtype, layers=request.layers, window=WINDOW)
    except Exception as error:  # of any kind
        raise ValueError(
            f"refused: no small model of model_type={config.model_type!r} runs ({_line(error)}); correct its config"
        ) from None
    return model


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _described(config: PreTrainedConfig, small: PreTrainedConfig, dtype: str) -> Iterator[str]:
    """What the small model has of the user's, and what it has not."""
    names = config.get_text_config().attribute_map
    own, text = _sizes(config), _sizes(small)
    layers = names.get("num_hidden_layers", "num_hidden_layers")
    kinds = Counter(getattr(small.get_text_config(), "layer_types", None) or [])
    yield (
        f"{config.model_type}: a small model in {dtype}, {text.pop(layers, '?')} of {own.pop(layers, '?')} layers"
        + (f" ({', '.join(f'{count} {kind}' for kind, count in kinds.items())})" if kinds else "")
    )
    same = [names.get(key, key) for key in KEPT]
    kept = [f"{key}={own[key]}" for key in same if key in own and own[key] == text.get(key)]
    changed = [key for key in own if own[key] != text.get(key) and not key.endswith("_id")]
    yield f"as in the model: {', '.join(kept) or 'nothing of its attention'}"
    yield f"smaller than in the model: {', '.join(f'{key}={text.get(key)} ({own[key]})' for key in changed)}"
    if any("window" in key for key in changed):
        yield f"sequences of up to {max(LENGTHS)} tokens, longer than the windows, which were made smaller for that"


def _sizes(config: PreTrainedConfig) -> dict[str, int]:
    """The whole numbers of a config, and head_dim where it follows from others."""
    text = config.get_text_config()
    sizes = {key: value for key, value in text.to_dict().items() if type(value) is int}
    if not any(key.endswith("head_dim") for key in sizes):
        sizes["head_dim"] = text.hidden_size // text.num_attention_heads
    return sizes


def _worst(model: PreTrainedModel, device: torch.device, say: Tell) -> tuple[float, float]:
    """The worst relative differences of losses and of gradients; the same on all ranks."""
    groups, config = GroupPool(), model.config
    world_size, vocabulary = dist.get_world_size(), config.get_text_config().vocab_size
    batch = make_batch(world_size, vocabulary)
    expected = one_device(copy.deepcopy(model).to(device), batch) if dist.get_rank() == 0 else (0.0, {})
    prepared = prepare_model(model, loss_chunk_tokens=CHUNK_TOKENS)
    worst = (0.0, 0.0)
    for ways, layouts in _layouts(config, world_size).items():
        found = difference(prepared, replace(batch, layouts=layouts), groups, *expected)
        say(
            f"{batch.plan}, {ways}: loss {found.loss:.6f}, off by {found.loss_difference:.1e}; gradients off by at "
            f"most {found.gradient_difference:.1e} ({found.parameter}); attention by {', '.join(sorted(found.kernels))}"
        )
        worst = (_larger(worst[0], found.loss_difference), _larger(worst[1], found.gradient_difference))
    return worst


def _larger(a: float, b: float) -> float:
    """nan is larger than all else."""
    return b if b != b or b > a else a


def _layouts(config: PreTrainedConfig, world_size: int) -> dict[str, Mapping[int, Layout]]:
    """Ways to split the degrees, by what to call them."""
    degrees = _degrees(world_size)
    heads = default_layouts(config, degrees)
    context = {degree: layouts_of(config, degree)[-1] for degree in degrees if degree > 1}
    ways: dict[str, Mapping[int, Layout]] = {"most Ulysses": heads}
    if context and dict(heads) != context:
        ways["ring alone"] = context
    return ways


def _degrees(world_size: int) -> list[int]:
    return sorted({d for d in (1, 2, 3, *(1 << n for n in range(2, 20)), world_size) if d <= world_size})


def make_batch(world_size: int, vocab_size: int, seed: int = 0) -> PlannedBatch:
    """A global batch that uses every degree: as many groups of it as fit, then single ranks, and one that is idle."""
    draw = Random(seed)
    micro_batches = []
    for degree in _degrees(world_size):
        groups = [degree] * (world_size // degree)
        groups += [1] * (world_size - sum(groups) - 1)
        if len(groups) > 1 and degree == 1:
            groups.pop()
        micro_batches.append([(each, tuple(draw.choices(LENGTHS, k=draw.randint(1, 3)))) for each in groups])
    batch = batch_of(micro_batches, world_size, vocab_size, {})
    tokens = [np.array(draw.choices(range(vocab_size), k=length)) for length in batch.lengths]
    return replace(batch, source=_Tokens(tokens, [np.array([draw.random() < MASKED for _ in row]) for row in tokens]))


class _Tokens:
    """A SequenceSource over arrays."""

    def __init__(self, tokens: Sequence[IntArray], masked: Sequence[np.ndarray[Any, Any]]) -> None:
        """`masked`: which tokens are no labels."""
        self.tokens = tokens
        labels = [np.where(gone, IGNORE_INDEX, row) for row, gone in zip(tokens, masked, strict=True)]
        self.labels = [np.append(row[1:], IGNORE_INDEX) for row in labels]

    def read(self, sequence: int, start: int, stop: int) -> tuple[IntArray, IntArray]:
        return self.tokens[sequence][start:stop], self.labels[sequence][start:stop]
