"""`flexsp estimate`: a profile of a model on a cluster from data sheets, without hardware or torch."""

from __future__ import annotations

import argparse
import datetime
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from flexsp.estimate import ModelShape, cluster_names, estimate_profile, load_cluster, load_model_shape
from flexsp.profile import Profile


def add_to(commands: Any) -> None:
    parser: argparse.ArgumentParser = commands.add_parser(
        "estimate", help="a profile from data sheets", description=__doc__
    )
    parser.add_argument("--model", required=True, metavar="CONFIG", help="a Hugging Face config.json, or its directory")
    parser.add_argument(
        "--cluster", required=True, metavar="CLUSTER", help=f"{', '.join(cluster_names())}, or a .toml file"
    )
    parser.add_argument("--num-devices", type=int, metavar="N", help="devices (default: as the cluster file says)")
    parser.add_argument("--sp-degrees", metavar="1,2,4", help="degrees of plans (default: powers of two)")
    parser.add_argument(
        "--dtype", default="bfloat16", metavar="DTYPE", help="bfloat16 or float32, what the model computes in"
    )
    parser.add_argument(
        "--weights",
        default="float32",
        metavar="DTYPE",
        help="bfloat16 or float32, what weights and optimizer states are kept in (default: float32)",
    )
    parser.add_argument(
        "--zero-stage",
        type=int,
        default=3,
        metavar="Z",
        help="1, 2 or 3, what is sharded (default: 3, as flexsp train)",
    )
    parser.add_argument(
        "--memory-fraction", type=float, default=0.9, metavar="F", help="of a device that plans may fill (default: 0.9)"
    )
    parser.add_argument("--output", metavar="PROFILE.json", help="where to save the profile")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    shape = load_model_shape(arguments.model)
    profile = estimate_profile(
        shape,
        load_cluster(arguments.cluster),
        num_devices=arguments.num_devices,
        sp_degrees=None if arguments.sp_degrees is None else _degrees(arguments.sp_degrees),
        dtype=arguments.dtype,
        weights=arguments.weights,
        memory_fraction=arguments.memory_fraction,
        zero_stage=arguments.zero_stage,
        date=datetime.date.today().isoformat(),
    )
    if arguments.output is not None:
        profile.save(arguments.output)
    show(shape, profile, Console(markup=False))
    return 0


def _degrees(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isascii() and part.isdigit() for part in parts):
        raise ValueError(f"--sp-degrees={text!r} must be positive integers with commas between; write it like 1,2,4")
    return [int(part) for part in parts]


def show(shape: ModelShape, profile: Profile, console: Console) -> None:
    """Prints every coefficient of an estimated profile, and how it came about."""
    fields = profile.provenance["fields"]
    table = Table(title=profile.name, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("coefficient", overflow="fold")
    table.add_column("value", justify="right", no_wrap=True)
    table.add_column("how", overflow="fold")
    for key, value in _values(profile).items():
        table.add_row(key.split(".")[-1], value, fields[key])
    console.print(table)
    _show_by_degree(profile, console)
    _show_memory(profile, console)
    experts = f" in {shape.num_experts} experts a layer" if shape.is_moe else ""
    _say(console, f"{shape.num_parameters:,} parameters{experts}; assumed:")
    for assumption in profile.provenance["assumptions"]:
        _say(console, f"- {assumption}")


def _values(profile: Profile) -> dict[str, str]:
    return {
        "compute.quadratic_s": f"{profile.compute.quadratic_s:.3e} s",
        "compute.linear_s": f"{profile.compute.linear_s:.3e} s",
        "compute.fixed_s": f"{profile.compute.fixed_s:.3g} s",
        "all_to_all.bytes_per_token": f"{profile.all_to_all.bytes_per_token:,.0f}",
        "memory.memory_bytes": _gib(profile.memory.memory_bytes),
        "memory.model_state_bytes": _gib(profile.memory.model_state_bytes),
        "memory.unsharded_bytes": _gib(profile.memory.unsharded_bytes),
        "memory.activation_bytes_per_token": f"{profile.memory.activation_bytes_per_token:,.0f}",
        "optimizer_s": f"{profile.optimizer_s:.3g} s",
    }


def _show_by_degree(profile: Profile, console: Console) -> None:
    fields = profile.provenance["fields"]
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("degree", "bandwidth GB/s", "latency ms", "tokens that fit"):
        table.add_column(column, justify="right")
    for degree in profile.sp_degrees:
        bandwidth = profile.all_to_all.bandwidth_bytes_per_s.get(degree)
        table.add_row(
            profile.degree_text(degree),
            "" if bandwidth is None else f"{bandwidth / 1e9:.3g}",
            "" if bandwidth is None else f"{profile.latency_s(degree) * 1e3:.2g}",
            f"{profile.capacity_tokens(degree):,}",
        )
    console.print(table)
    _say(console, f"bandwidth: {fields['all_to_all.bandwidth_bytes_per_s']}")
    _say(console, f"latency: {fields['all_to_all.latency_s']}")
    if profile.layouts:
        _say(console, f"(ulysses x ring): {fields['layouts']}")


def _show_memory(profile: Profile, console: Console) -> None:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in ("policy", "bytes a token", "compute", "tokens a device"):
        table.add_column(column, justify="left" if column == "policy" else "right")
    for name, policy in profile.memory.policies.items():
        table.add_row(
            name,
            f"{policy.activation_bytes_per_token:,.0f}",
            f"x {policy.compute_factor:.2f}",
            f"{profile.capacity_tokens(1, name):,}",
        )
    console.print(table)
    _say(console, f"{profile.provenance['fields']['memory.policies']}\n")


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def _say(console: Console, line: str) -> None:
    console.print(line, highlight=False, soft_wrap=True)
