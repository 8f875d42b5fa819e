"""Whether all ranks were started alike: one configuration, the same versions, profile and model.

Each node reads its own copy of the TOML, its own environment and its own files. A copy that is older than the others'
would not fail: it would train wrongly, with another learning rate on a few of the shards say.
"""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import Any

import torch.distributed as dist
from transformers import PreTrainedModel

from flexsp import jsonfields as jf
from flexsp.train.checkpoint import versions
from flexsp.train.config import Config
from flexsp.train.roll_call import ranks_text

PLACES_OF_A_NODE = (
    "data.cache_dir",
    "data.source",
    "data.tokenizer",
    "eval.source",
    "model.path",
    "planner.profile",
    "planner.profile_dir",
    "planner.replay",
)
"""Keys that may differ: where a node keeps something. What lies there is compared, or read by rank 0 alone."""
NOT_COMPUTED_WITH = ("_name_or_path", "architectures", "quantization_config", "transformers_version")
"""Fields of a model's config that say where it is from, and how weights are stored that rank 0 alone reads."""
Flat = dict[str, Any]


def check_alike(config: Config) -> None:
    """Compares configuration and versions of all ranks. The first collective of a run.

    Args:
        config: of this rank.

    Raises:
        ValueError: on all ranks alike: names the first key that differs, its values and their ranks.
    """
    # its own group: what the run's groups are made with is among what is compared
    control = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=config.run.timeout_s))
    versioned = {f"version of {package}": str(version) for package, version in versions().items()}
    _same({**versioned, **_compared(config)}, control, "start all nodes with one configuration and the same packages")
    dist.destroy_process_group(control)


def check_profile(document: Mapping[str, Any], control: dist.ProcessGroup) -> None:
    """Compares the profile that each rank has read. A collective.

    Args:
        document: what it says.
        control: a CPU group of all ranks.

    Raises:
        ValueError: on all ranks alike: they differ.
    """
    said = {f"planner.profile: {key}": value for key, value in _flat(document)}
    _same(said, control, "give all nodes the same file")


def check_model(model: PreTrainedModel, config: Config, control: dist.ProcessGroup) -> None:
    """Compares the model configs that the ranks have read. A collective.

    Weights are rank 0's on all of them, and `prepare_model` compares names and shapes; but what a layer computes with
    them, its activation or the base of its rotary embedding say, each rank takes from its own file.

    Args:
        model: whole, or on the meta device.
        config: of the run.
        control: a CPU group of all ranks.

    Raises:
        ValueError: on all ranks alike: names the first field that differs, its values and their ranks.
    """
    where = "model.path" if config.model.path else "model.config"
    fields = json.loads(model.config.to_json_string(use_diff=False))
    said = {f"{where}: {key}": value for key, value in _flat(fields) if key.split(".")[0] not in NOT_COMPUTED_WITH}
    _same(said, control, "give all nodes the same config.json")


def _compared(config: Config) -> Flat:
    """The keys of a configuration that all ranks must share. Of a place, whether there is one: what is done differs."""
    flat = dict(_flat(asdict(config)))
    del flat["data.workers"]  # changes nothing in the tokens
    return {key: bool(value) if key in PLACES_OF_A_NODE else value for key, value in flat.items()}


def _flat(document: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values."""
    for key, value in document.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{where}{key}.")
        else:
            yield f"{where}{key}", value


def _same(own: Flat, control: dist.ProcessGroup, fix: str) -> None:
    """
    Raises:
        ValueError: on all ranks alike: they have not said the same.
    """
    if (found := _first_difference(own, control)) is None:
        return
    key, by_value = found
    said = [f"{jf.short(json.loads(text)) if text else 'nothing'} on {ranks_text(ranks)}" for text, ranks in by_value]
    more = f" and {len(said) - 4} more values" if len(said) > 4 else ""
    raise ValueError(f"{key}={', '.join(said[:4])}{more}: it must be the same on all ranks; {fix}")


def _first_difference(own: Flat, control: dist.ProcessGroup) -> tuple[str, list[tuple[str, list[int]]]] | None:
    """The first key of which ranks do not say the same, with each value as JSON and its ranks; None: they all agree."""
    texts = {key: json.dumps(value, sort_keys=True) for key, value in own.items()}
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()
    digests: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(digests, digest, group=control)
    if len(set(digests)) == 1:
        return None
    every: list[Any] = [None] * len(digests)
    dist.all_gather_object(every, texts, group=control)
    for key in dict.fromkeys(key for said in every for key in said):
        ranks: dict[str, list[int]] = {}
        for rank, said in enumerate(every):
            ranks.setdefault(said.get(key, ""), []).append(rank)
        if len(ranks) > 1:
            return key, list(ranks.items())
    raise AssertionError("digests differ, and nothing that they are of")
