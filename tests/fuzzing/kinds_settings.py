"""Model configs and clusters as `flexsp estimate` reads them, and the configuration of a run."""

from __future__ import annotations

import json
import tomllib
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

from flexsp.estimate import estimate_profile, load_cluster, load_model_shape, model_shape
from flexsp.profile import Profile
from flexsp.train.config import load_config, parse_config
from fuzzing import mutate, schema
from fuzzing.attempt import Broken, Refused, Tried, command, expect, library, written
from fuzzing.kinds_documents import fault_of, fixed_point, json_input
from fuzzing.schema import Bool, Either, Int, List, Map, Num, Obj, Str

LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256,
    "num_key_value_heads": 2, "intermediate_size": 128, "head_dim": 16, "tie_word_embeddings": False,
    "attention_bias": False, "hidden_act": "silu", "sliding_window": None, "_name_or_path": "a/llama",
}  # fmt: skip
MIXTRAL = {
    **LLAMA, "model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "mlp_only_layers": [0], "decoder_sparse_step": 1, "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
FALCON = {
    "model_type": "falcon", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 256,
    "multi_query": True, "parallel_attn": True, "new_decoder_architecture": False, "bias": False,
}  # fmt: skip


class ModelKind:
    """A Hugging Face config.json."""

    name = "model"

    def __init__(self, folder: Path) -> None:
        self.path = folder / "config.json"
        self.cluster = load_cluster("a100-40")
        self.bases = [LLAMA, MIXTRAL, FALCON, {"text_config": LLAMA, "model_type": "llava"}]

    def try_one(self, random: Random) -> Tried:
        base = random.choice(self.bases)
        data, what = json_input(base, random)
        written(self.path, data)
        names = (str(self.path), "model", "num_devices")
        fault = None if "text_config" in base or b"text_config" in data else fault_of(data, schema.MODEL)
        shape = library(lambda: load_model_shape(self.path), names)
        expect(isinstance(shape, Refused), fault, what)
        refused = isinstance(shape, Refused)
        if not refused:
            names = (*names, "zero_stage", shape.name)
            profile = library(lambda: estimate_profile(shape, self.cluster), names)
            refused = isinstance(profile, Refused)
            if not refused:
                fixed_point(profile, Profile.from_json)
        if refused or random.random() < 0.1:
            said = command(["estimate", "--model", str(self.path), "--cluster", "a100-40"], names)
            if refused != (said.status == 2):
                raise Broken(f"the library {'refuses' if refused else 'accepts'}, estimate ends with {said.status}")
        return Tried(not refused, what)


class ClusterKind:
    """A cluster file."""

    name = "cluster"

    def __init__(self, folder: Path) -> None:
        self.path, self.model = folder / "cluster.toml", written(folder / "config.json", json.dumps(LLAMA).encode())
        clusters = Path(__import__("flexsp.estimate").estimate.__file__).parent / "clusters"
        self.bases = [tomllib.loads(path.read_text()) for path in sorted(clusters.glob("*.toml"))]
        self.shape = model_shape(LLAMA)

    def try_one(self, random: Random) -> Tried:
        data, what, fault = toml_input(random.choice(self.bases), schema.CLUSTER, random)
        written(self.path, data)
        names = (str(self.path), "devices", "memory", "num_devices")
        found = library(lambda: load_cluster(self.path), names)
        refused = isinstance(found, Refused)
        expect(refused, fault, what)
        if not refused:
            profile = library(lambda: estimate_profile(self.shape, found), names)
            refused = isinstance(profile, Refused)
            if not refused:
                fixed_point(profile, Profile.from_json)
        if refused or random.random() < 0.1:
            said = command(["estimate", "--model", str(self.model), "--cluster", str(self.path)], names)
            if refused != (said.status == 2):
                raise Broken(f"the library {'refuses' if refused else 'accepts'}, estimate ends with {said.status}")
        return Tried(not refused, what)


def toml_input(base: Any, kind: Any, random: Random) -> tuple[bytes, str, str | None]:
    """A wrong TOML file of a well-formed document, how it is wrong, and what a reader must find if anything."""
    document, what = mutate.document(base, random)
    data = toml(document).encode("utf-8", "surrogatepass")
    if random.random() < 0.25:
        data, more = mutate.raw(data, random)
        what = f"{what}; {more}"
    try:
        fault = schema.fault(tomllib.loads(data.decode("utf-8")), kind)
    except (ValueError, RecursionError) as error:
        fault = f"no TOML: {error}"
    return data, what, fault


def toml(document: dict[str, Any]) -> str:
    return "".join(f"{_quoted(key)} = {_toml_value(value)}\n" for key, value in document.items())


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quoted(key)} = {_toml_value(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, str):
        return _quoted(value)
    return {"True": "true", "False": "false", "None": "null"}.get(str(value), str(value))


def _quoted(text: str) -> str:
    return json.dumps(str(text), ensure_ascii=False).replace("\x7f", "\\u007f")


TOKENS = Either((Int(0), Str()))
REAL = Num()
MODEL_SECTION = {
    "path": Str(), "config": Map(schema.Anything()), "dtype": Str(("float32", "bfloat16")),
    "weights": Str(("float32", "bfloat16")), "activation_checkpointing": Bool(), "loss_chunk_tokens": TOKENS,
    "shard_layers": Bool(), "replicate": Int(1), "exact": Bool(),
    "attention": Str(("", "varlen", "flash-attn", "flex", "sdpa", "math")),
}  # fmt: skip
CONFIG = Obj(
    {},
    {
        "model": Obj({}, MODEL_SECTION),
        "data": Obj({}, {"source": Str(), "max_length": TOKENS, "overlong": Str(("drop", "split", "error"))}),
        "planner": Obj(
            {},
            {
                "name": Str(), "options": Map(schema.Anything()), "profile": Str(), "sp_degrees": List(Int(1)),
                "policies": List(Str(("selective", "full", "offload"))), "plan_ahead": Int(1),
                "timeout_s": Num(most=1e7),
                "memory_fraction": Num(most=1), "correct": Bool(), "replay": Str(), "max_tokens_per_rank": TOKENS,
            },
        ),
        "train": Obj(
            {},
            {
                "steps": Int(0), "batch_size": Int(1), "seed": Int(0), "optimizer": Str(("adamw", "adam", "sgd")),
                "optimizer_options": Map(schema.Anything()), "lr": REAL, "weight_decay": REAL, "lr_schedule": Str(),
                "decay": Str(("all", "matrices")),
                "lr_schedule_options": Map(schema.Anything()), "warmup_steps": Int(0), "grad_clip": REAL,
            },
        ),
        "checkpoint": Obj({}, {"every": Int(0), "keep_last": Int(1), "resume": Str(), "asynchronous": Bool()}),
        "run": Obj(
            {}, {"dir": Str(), "compare_batches": Int(0), "save_model": Bool(), "timeout_s": Num(least=1, most=1e7)}
        ),
    },
    closed=True,
)  # fmt: skip
RUN: dict[str, Any] = {
    "model": {"config": {key: value for key, value in LLAMA.items() if value is not None},
        "dtype": "float32", "loss_chunk_tokens": "1K", 
        "shard_layers": True, "replicate": 1,
    },
    "data": {"source": "rows.jsonl", "max_length": "1K", "overlong": "split"},
    "planner": {
        "name": "flex", "options": {"time_limit_s": 0.1}, "sp_degrees": [1, 2], "policies": ["full"], "plan_ahead": 2,
        "timeout_s": 30.0, "memory_fraction": 0.5, "correct": False, "max_tokens_per_rank": 700,
    },
    "train": {
        "steps": 5, "batch_size": 4, "seed": 1, "optimizer": "adamw", "optimizer_options": {"betas": [0.9, 0.95]},
        "lr": 1e-3, "weight_decay": 0.1, "decay": "matrices", "lr_schedule": "cosine", "warmup_steps": 2,
        "lr_schedule_options": {"num_cycles": 0.5}, "grad_clip": 1.0,
    },
    "checkpoint": {"every": 2, "keep_last": 2, "resume": "auto", "asynchronous": True},
    "run": {"dir": "out", "compare_batches": 1, "save_model": False, "timeout_s": 60},
}  # fmt: skip


class ConfigKind:
    """The TOML file of `flexsp train`, and its dotted flags."""

    name = "config"

    def __init__(self, folder: Path) -> None:
        self.path = folder / "config.toml"

    def try_one(self, random: Random) -> Tried:
        data, what, fault = toml_input(RUN, CONFIG, random)
        flags: list[str] = []
        if random.random() < 0.4:
            data, fault = toml(RUN).encode(), None
            flags, what, fault = run_flags(random)
        written(self.path, data)
        names = (str(self.path), "model.config", *(flag for flag in flags if flag.startswith("-")), repr(flags[:1]))
        found = library(lambda: load_config(self.path, flags), names)
        refused = isinstance(found, Refused)
        expect(refused, fault, what)
        if not refused and parse_config(json.loads(json.dumps(asdict(found), allow_nan=False))) != found:
            raise Broken("written and read again it is another")
        return Tried(not refused, what)


def run_flags(random: Random) -> tuple[list[str], str, str | None]:
    """Flags, and whether they must be refused."""
    section = random.choice(list(RUN))
    key = random.choice(list(RUN[section]))
    value = mutate.value(random)
    text = value if isinstance(value, str) else _toml_value(value)
    text = text.replace("\ud800", "")  # no command line has it
    how = random.choice(
        ("value", "value", "value", "no value", "unknown key", "unknown section", "no dot", "deep", "twice")
    )
    flag = f"--{section}.{key}"
    if how == "value":
        return [f"{flag}={text}"], f"{flag}={text[:40]}", _flag_fault(section, key, text)
    if how == "twice":
        return [flag, "1", f"{flag}={text}"], f"{flag} twice", _flag_fault(section, key, text)
    made = {
        "no value": [flag],
        "unknown key": [f"--{section}.{random.choice(('x', '', ' ', key.upper(), '__class__'))}", text],
        "unknown section": [f"--{random.choice(('x', '', section.upper(), '__init__'))}.{key}", text],
        "no dot": [f"--{key}", text],
        "deep": [f"{flag}.x.y", text],
    }[how]
    deep_dict = how == "deep" and isinstance(RUN[section][key], dict)
    return made, how, None if deep_dict else how


def _flag_fault(section: str, key: str, text: str) -> str | None:
    """What is wrong with a value that a flag gives: TOML, or else text; text where text is wanted."""
    kind = CONFIG.optional[section].optional[key]
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except (tomllib.TOMLDecodeError, RecursionError):
        value = text
    if isinstance(kind, Str) and not isinstance(value, str):
        value = text
    return schema.fault(value, kind)
