"""The configuration of a run: a TOML file of sections, any key overridden by a dotted flag."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NewType, get_args, get_type_hints

from flexsp import jsonfields as jf
from flexsp.data.options import DataOptions
from flexsp.lengths import parse_tokens

Tokens = NewType("Tokens", int)
"""A number of tokens; written as an integer or as `16K` (1024 each)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    path: str = ""
    """A Hugging Face directory to start from; empty: build a new model from `config`."""
    config: dict[str, Any] = field(default_factory=dict)
    """Without `path`: `model_type` and fields of a Hugging Face config; vocab_size must hold the corpus's tokens.
    With `path`: fields that differ from the directory's config, tables field by field; all weights must still fit."""
    dtype: str = "float32"
    """What is computed in: float32 or bfloat16."""
    weights: str = "float32"
    """What weights, gradients and optimizer states are kept in: float32 or bfloat16."""
    reduce_dtype: str = "float32"
    """What gradients are summed over the ranks in: float32 or bfloat16."""
    activation_checkpointing: bool = False
    """Recompute each layer in the backward instead of holding its activations, where a plan names no policy."""
    loss_chunk_tokens: Tokens = Tokens(0)
    """The loss is computed for so many tokens at a time; 0: as many as 512 MiB of logits in float32 are."""
    shard_layers: bool = True
    """Gather parameters layer by layer (an FSDP2 unit each); false gathers all at once, faster for a small model."""
    reshard_after_forward: bool = True
    """Free a layer's gathered parameters after its forward and gather them again in the backward (ZeRO-3); false keeps
    them in between, which costs memory and saves a gather."""
    replicate: int = 1
    """How many times parameters are held, each time sharded over world_size / replicate consecutive ranks; 1 shards
    over all."""
    attention: str = ""
    """The attention kernel: varlen, flash-attn, flex, sdpa or math; empty: the first that serves."""
    exact: bool = True
    """Refuse dropout, which would make loss and gradients depend on the plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig(DataOptions):
    source: str = "python-stdlib"
    """`python-stdlib`; a .jsonl or .parquet file; a folder or a pattern of such files, or of files of text; a folder
    that `save_to_disk` of `datasets` wrote; or `hf:NAME`, a data set by name."""
    max_length: Tokens = Tokens(16384)
    """The context limit, in tokens."""
    overlong: str = "error"
    """What to do with documents above the limit: drop, split or error."""
    held_out: int = 0
    """Documents kept from training, whole, for `[eval]`; chosen by train.seed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerConfig:
    name: str = "flex"
    """flex, batch-adaptive, static, or module:function."""
    options: dict[str, Any] = field(default_factory=dict)
    """For the planner."""
    profile: str = ""
    """A profile file; empty: measure one at the first run and reuse it."""
    profile_dir: str = "~/.cache/flexsp/profiles"
    """Where measured profiles are kept."""
    max_tokens_per_rank: Tokens = Tokens(0)
    """An artificial memory limit of a rank; 0: the rank's own memory."""
    memory_fraction: float = 0.9
    """Of a rank's memory that a plan may fill, where there is no artificial limit: the GPU's; on a CPU the process's
    limit (`ulimit -d`) or its share of the machine's."""
    sp_degrees: list[int] = field(default_factory=list)
    """Degrees that a plan may use; empty: powers of two."""
    policies: list[str] = field(default_factory=list)
    """Activation policies to measure, among which a plan chooses: selective, full, offload; empty: none. A profile
    that is given has its own."""
    plan_ahead: int = 4
    """Batches planned ahead."""
    timeout_s: float = 300.0
    """After which a plan that does not come ends the run with an error; less than run.timeout_s, and where it is not
    given at most half of that."""
    replay: str = ""
    """The plans.jsonl of a run, or its folder: its steps are planned as they were then, and others by the planner."""
    correct: bool = True
    """Correct the profile by what each step measures; it is saved as profile.json in run.dir, from which the next run
    there goes on."""
    fallback: str = ""
    """What plans a step at which the planner fails (raises, ends, gives nothing within timeout_s, plans illegally):
    batch-adaptive, with a warning; empty: that is an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    steps: int = 30
    batch_size: int = 32
    """Sequences of a global batch."""
    seed: int = 0
    """Of initial weights and data order."""
    optimizer: str = "adamw"
    """adamw, adam or sgd."""
    optimizer_options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the torch optimizer, e.g. betas."""
    lr: float = 1e-3
    weight_decay: float = 0.0
    """Of the parameters that `decay` names."""
    decay: str = "all"
    """What weight_decay is for: all parameters; or matrices, those of two dimensions and more, without norms and biases
    (but for biases of experts that are stacked in one parameter)."""
    lr_schedule: str = "cosine"
    """A schedule of transformers: constant_with_warmup, linear, cosine, ..."""
    lr_schedule_options: dict[str, Any] = field(default_factory=dict)
    """What the schedule takes beside warmup_steps and steps: min_lr or min_lr_rate of cosine_with_min_lr,
    num_decay_steps of warmup_stable_decay, power of polynomial, ..."""
    warmup_steps: int = 0
    """Of a rate that rises from 0; below steps."""
    grad_clip: float = 1.0
    """Global gradient norm to clip to; 0: none."""
    on_not_finite: str = "error"
    """What a step does whose loss or gradients are not finite. error: it ends the run, with the weights as they were;
    skip: it is left out, with a warning, and ten in a row are an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    dir: str = "runs/run"
    """Where metrics.jsonl, comparison.json and the model go."""
    compare_batches: int = 0
    """Batches on which the planners are compared at the end; 0: no comparison."""
    save_model: bool = True
    """Save a Hugging Face directory at the end, with the tokenizer where data.tokenizer or model.path has one."""
    transport: str = ""
    """How groups exchange: `groups`, a communicator for each set of ranks; `peers`, point-to-point on one communicator,
    for clusters where many communicators take too much memory; empty: by device."""
    timeout_s: float = 600.0
    """After which a collective that does not come about is an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointConfig:
    every: int = 100
    """Steps between checkpoints; the last step is saved too. 0: no checkpoints."""
    keep_last: int = 2
    """How many are kept; older ones are removed."""
    resume: str = "auto"
    """auto: go on from the last checkpoint in run.dir, if there is one; never: begin at step 0, in a run.dir without
    checkpoints; or the path of a checkpoint."""
    asynchronous: bool = True
    """Write while training goes on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchConfig:
    tensorboard: bool = False
    """Write TensorBoard's event files too, in run.dir/tensorboard."""
    wandb: str = ""
    """The Weights & Biases project to write to as well; empty: none. Where and whether it sends is for its own
    environment variables to say (WANDB_MODE=offline, ...)."""
    peak_tflops: float = 0.0
    """Of one device, for mfu; 0: by the device's name, where its data sheet is known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalConfig:
    every: int = 0
    """Steps between evaluations; after the last step too. 0: none."""
    source: str = ""
    """A corpus to evaluate on, named as in data.source; empty: the documents that data.held_out keeps from training."""
    batch_size: int = 0
    """Sequences of a batch; 0: train.batch_size."""
    batches: int = 0
    """How many batches, of sequences chosen by train.seed; 0: all sequences once, the last batch may be smaller."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    planner: PlannerConfig = field(default_factory=PlannerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    run: RunConfig = field(default_factory=RunConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


SECTIONS: dict[str, type[Any]] = {
    "model": ModelConfig,
    "data": DataConfig,
    "planner": PlannerConfig,
    "train": TrainConfig,
    "checkpoint": CheckpointConfig,
    "run": RunConfig,
    "watch": WatchConfig,
    "eval": EvalConfig,
}
CHOICES = {
    "model.attention": ("", "varlen", "flash-attn", "flex", "sdpa", "math"),
    "run.transport": ("", "groups", "peers"),
    "model.dtype": ("float32", "bfloat16"),
    "model.weights": ("float32", "bfloat16"),
    "model.reduce_dtype": ("float32", "bfloat16"),
    "planner.policies": ("selective", "full", "offload"),
    "data.overlong": ("drop", "split", "error"),
    "data.train_on": ("assistant", "all"),
    "data.on_broken": ("error", "skip"),
    "data.on_empty": ("error", "skip"),
    "planner.fallback": ("", "batch-adaptive"),
    "train.optimizer": ("adamw", "adam", "sgd"),
    "train.on_not_finite": ("error", "skip"),
    "train.decay": ("all", "matrices"),
}
LEAST = {
    "model.loss_chunk_tokens": 0,
    "model.replicate": 1,
    "data.max_length": 2,
    "data.workers": 0,
    "planner.max_tokens_per_rank": 0,
    "planner.sp_degrees": 1,
    "planner.plan_ahead": 1,
    "train.steps": 0,
    "train.batch_size": 1,
    "train.seed": 0,
    "train.lr": 0,
    "train.warmup_steps": 0,
    "train.grad_clip": 0,
    "train.weight_decay": 0,
    "checkpoint.every": 0,
    "checkpoint.keep_last": 1,
    "run.compare_batches": 0,
    "run.timeout_s": 1,
    "planner.memory_fraction": 0,
    "planner.timeout_s": 0,
    "watch.peak_tflops": 0,
    "data.held_out": 0,
    "eval.every": 0,
    "eval.batch_size": 0,
    "eval.batches": 0,
}
MOST = {
    "planner.memory_fraction": 1,
    "planner.timeout_s": 1e7,
    "run.timeout_s": 1e7,
}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a TOML file and applies flags like `--train.steps 20` or `--run.dir=DIR`.

    Raises:
        ValueError: the file cannot be read, a section or key is unknown, or a value is of the wrong type or range.
    """
    document = jf.parse_toml(jf.read_text(path, "a TOML file"), str(path))
    for keys, value in _flags(overrides):
        _set(document, keys, value)
    return parse_config(document, str(path))


def parse_config(document: Mapping[str, Any], where: str = "config") -> Config:
    """The Config of a document of sections."""
    unknown = sorted(set(document) - set(SECTIONS))
    if unknown:
        raise ValueError(f"{where}: section [{unknown[0][:60]}] is unknown; the sections are {', '.join(SECTIONS)}")
    config = Config(**{name: _section(name, document.get(name, {}), where) for name in SECTIONS})
    if "timeout_s" not in document.get("planner", {}):
        plan_s = min(config.planner.timeout_s, config.run.timeout_s / 2)
        config = replace(config, planner=replace(config.planner, timeout_s=plan_s))
    if config.planner.timeout_s >= config.run.timeout_s:  # the other ranks would give up first, and blame rank 0
        raise ValueError(
            f"{where}: planner.timeout_s={config.planner.timeout_s:g} must be less than run.timeout_s="
            f"{config.run.timeout_s:g}, for which the other ranks wait; lower the one or raise the other"
        )
    if not (config.model.path or config.model.config):
        raise ValueError(
            f"{where}: model.path='' and model.config={{}}: there is no model; give a directory to start from, a "
            f"config to build, or a directory and what is to differ in its config"
        )
    if config.train.warmup_steps and config.train.warmup_steps >= config.train.steps:
        raise ValueError(
            f"{where}: train.warmup_steps={config.train.warmup_steps} must be below train.steps={config.train.steps}, "
            f"or the learning rate never reaches train.lr; lower the one or raise the other"
        )
    if config.eval.every and not (config.data.held_out or config.eval.source):
        raise ValueError(
            f"{where}: eval.every={config.eval.every} has nothing to evaluate on; set data.held_out to a number of "
            f"documents, or eval.source to a corpus"
        )
    return config


def _section(name: str, values: Any, where: str) -> Any:
    kind = SECTIONS[name]
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: {name}={jf.short(values)} must be a section; write [{name}]")
    known = [entry.name for entry in fields(kind)]
    hints = get_type_hints(kind)
    for key in values:
        if key not in known:
            raise ValueError(f"{where}: {name}.{key[:60]} is unknown; the keys of [{name}] are {', '.join(known)}")
    return kind(**{key: _value(value, hints[key], f"{name}.{key}", where) for key, value in values.items()})


def _value(value: Any, hint: Any, key: str, where: str) -> Any:
    if hint is Tokens and not value == 0:
        value = Tokens(parse_tokens(value, f"{where}: {key}"))
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) <= jf.MOST_INTEGER else math.inf
    _check_plain(value, f"{where}: {key}")
    expected = int if hint is Tokens else getattr(hint, "__origin__", hint)
    if not isinstance(value, expected) or (isinstance(value, bool) and expected is not bool):
        raise ValueError(f"{where}: {key}={jf.short(value)} must be of type {expected.__name__}; correct it")
    if isinstance(value, list):
        (inner,) = get_args(hint)
        if not all(isinstance(item, inner) and not isinstance(item, bool) for item in value):
            kind = "integers" if inner is int else "names"
            raise ValueError(f"{where}: {key}={jf.short(value)} must be a list of {kind}; correct it")
    for item in value if isinstance(value, list) else [value]:
        if key in CHOICES and item not in CHOICES[key]:
            choices = ", ".join(choice or "''" for choice in CHOICES[key])
            raise ValueError(f"{where}: {key}={jf.short(item)} must be one of {choices}; correct it")
        if key in LEAST and item < LEAST[key]:
            raise ValueError(f"{where}: {key}={item} must be at least {LEAST[key]}; correct it")
        if key in MOST and item > MOST[key]:
            raise ValueError(f"{where}: {key}={item} must be at most {MOST[key]}; correct it")
    return value


def _check_plain(value: Any, where: str) -> None:
    """Refuses what a checkpoint could not say in JSON: dates and times, NaN, and numbers beyond 64 bits."""
    if isinstance(value, Mapping | list):
        items = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, inner in items:
            _check_plain(inner, f"{where}.{key}")
    elif isinstance(value, float) and not abs(value) <= jf.MOST:  # nor is NaN
        raise ValueError(f"{where}={value} must be a finite number, up to {jf.MOST:g}; correct it")
    elif isinstance(value, int) and abs(value) > jf.MOST_INTEGER:
        raise ValueError(f"{where}={jf.short(value)} must be a number of 64 bits; correct it")
    elif value is not None and not isinstance(value, str | int | float):
        raise ValueError(f"{where}={value!s:.60} must be text, a number, true or false, or a list of them; correct it")


def _flags(overrides: Sequence[str]) -> list[tuple[list[str], Any]]:
    """Flags as key paths and values; a value is read as TOML, or else as a string."""
    parsed, rest = [], list(overrides)
    while rest:
        flag = rest.pop(0)
        name, equals, text = flag.partition("=")
        if not name.startswith("--") or "." not in name:
            raise ValueError(f"flag {jf.short(flag)} is unknown; override a key of the config by --section.key value")
        if not equals:
            if not rest:
                raise ValueError(f"flag {jf.short(flag)} has no value; write {flag[:60]} VALUE")
            text = rest.pop(0)
        keys = name[2:].split(".")
        parsed.append((keys, _flag_value(keys, text)))
    return parsed


def _flag_value(keys: Sequence[str], text: str) -> Any:
    """What a flag's text says: TOML (`20`, `true`, `[1, 2]`), or the text itself for strings, quotes not needed."""
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
    kind = SECTIONS.get(keys[0])
    wants_text = kind is not None and get_type_hints(kind).get(keys[1]) is str
    return text if wants_text and not isinstance(value, str) else value


def _set(document: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        document = document.setdefault(key, {})
        if not isinstance(document, dict):
            raise ValueError(f"flag --{'.'.join(keys)}: {key} is no section; override a key of the config")
    document[keys[-1]] = value
