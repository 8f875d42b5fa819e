"""`flexsp profile`: measure a model on the ranks at hand (under torchrun), by few of its layers; fits a profile."""

from __future__ import annotations

import argparse
from typing import Any

from flexsp.cli.allocator import grow_segments
from flexsp.cli.last_line import say_as
from flexsp.lengths import parse_tokens


def add_to(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "profile", help="measure a model on the ranks at hand (under torchrun)", description=__doc__
    )
    parser.add_argument("model", metavar="MODEL", help="a Hugging Face config: a directory or a JSON file")
    parser.add_argument("--output", required=True, metavar="PROFILE.json", help="where to save the profile")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="computed in (default: bfloat16 on CUDA)")
    parser.add_argument(
        "--weights", choices=("float32", "bfloat16"), default="float32", help="what weights are kept in (float32)"
    )
    parser.add_argument("--sp-degrees", metavar="1,2,4", help="default: powers of two")
    parser.add_argument(
        "--probe-tokens", metavar="TOKENS", help="tokens a rank in the largest row (default: 2K; 32K on CUDA)"
    )
    parser.add_argument("--policies", metavar="full,...", help="measure these too: selective, full, offload")
    parser.add_argument("--activation-checkpointing", action="store_true", help="recompute layers in the backward")
    parser.add_argument(
        "--shard-layers", action=argparse.BooleanOptionalAction, default=True, help="gather parameters layer by layer"
    )
    parser.add_argument("--memory-fraction", type=float, default=0.9, metavar="F", help="of a rank's memory (0.9)")
    parser.add_argument("--max-tokens-per-rank", metavar="TOKENS", help="an artificial memory limit")
    parser.add_argument(
        "--cluster", metavar="NAME", help="estimate for this cluster what cannot be measured here; see flexsp estimate"
    )
    parser.add_argument("--num-devices", type=int, metavar="N", help="of the cluster (default: as its file says)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    grow_segments()
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise ValueError(f"{error}: measuring needs torch and transformers; pip install 'flexsp[train]'") from None
    from flexsp.train.board import first_to_say
    from flexsp.train.profiling import ProfileRequest, profile_model

    def tokens(text: str | None, flag: str) -> int | None:
        return None if text is None else parse_tokens(text, flag)

    try:
        request = ProfileRequest(
            model=arguments.model,
            output=arguments.output,
            dtype=arguments.dtype,
            sp_degrees=_degrees(arguments.sp_degrees),
            probe_tokens=tokens(arguments.probe_tokens, "--probe-tokens"),
            weights=arguments.weights,
            policies=[name.strip() for name in (arguments.policies or "").split(",") if name.strip()],
            activation_checkpointing=arguments.activation_checkpointing,
            shard_layers=arguments.shard_layers,
            memory_fraction=arguments.memory_fraction,
            max_tokens_per_rank=tokens(arguments.max_tokens_per_rank, "--max-tokens-per-rank"),
            cluster=arguments.cluster,
            num_devices=arguments.num_devices,
        )
        return profile_model(request, say_as("profile"))
    except ValueError as error:  # of flags and configs; what goes wrong later, the ranks say themselves
        if first_to_say(str(error)):
            raise
        return 2


def _degrees(text: str | None) -> list[int]:
    if text is None:
        return []
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise ValueError(f"--sp-degrees={text!r} must be positive integers with commas between; write them like 1,2,4")
    return sorted({int(part) for part in parts})
