"""What `flexsp profile` does on the ranks: measure, fill in from an estimate, save, and say what came out."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PreTrainedConfig
from transformers.utils import logging as transformers_logging

from flexsp.estimate import Cluster, ModelShape, estimate_profile, load_cluster, model_shape
from flexsp.estimate.cluster import known_peak
from flexsp.parallel import GroupPool, check_degrees, default_layouts, layouts_of, powers_of_two
from flexsp.parallel.control import from_first_rank
from flexsp.profile import Profile
from flexsp.profiler.alike import check_alike
from flexsp.profiler.layers import measure_layers
from flexsp.profiler.make import device_name
from flexsp.profiler.mixed import fill_from_estimate, other_device
from flexsp.profiler.parts import parts_of, read_model_config
from flexsp.profiler.work import planned_flops
from flexsp.train.display import Display
from flexsp.train.failures import Guard, Say
from flexsp.train.profile_room import Room, saying_where_memory_ran_out
from flexsp.train.ranks import joined_ranks
from flexsp.train.run_model import DTYPES

log = logging.getLogger(__name__)

TIMEOUT_S = 600.0
FOLDER = "flexsp-profile"
"""Made in the current folder where a rank fails, for its traceback."""
USUAL_SHARE = 0.4
"""Of a device's peak, which training a dense model in long rows reaches about: for saying how long measuring takes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileRequest:
    """The flags of `flexsp profile`."""

    model: str
    output: str
    dtype: str | None
    sp_degrees: list[int]
    probe_tokens: int | None
    weights: str
    policies: list[str]
    activation_checkpointing: bool
    shard_layers: bool
    memory_fraction: float
    max_tokens_per_rank: int | None
    cluster: str | None
    num_devices: int | None


def profile_model(request: ProfileRequest, say: Say) -> int:
    """Measures and saves; returns the exit status.

    Args:
        request: the flags.
        say: is given what goes wrong once the ranks are there, in one line and on one of them.

    Raises:
        ValueError: bad flags, or a model that cannot be run exactly or by few of its layers.
        SystemExit: with the status, where something went wrong later.
    """
    if not 0 < request.memory_fraction <= 1:
        raise ValueError(
            f"--memory-fraction={request.memory_fraction} must be above 0 and at most 1; give a share of the memory"
        )
    if request.num_devices is not None and request.cluster is None:
        raise ValueError(
            f"--num-devices={request.num_devices} needs --cluster: what other devices add is estimated; name one"
        )
    transformers_logging.disable_progress_bar()
    config = read_model_config(request.model)
    shape = model_shape(config.to_dict())
    if not parts_of(shape)[0].whole:
        check_alike(config, shape)
    cluster = None if request.cluster is None else load_cluster(request.cluster)
    with Guard(Path(FOLDER), TIMEOUT_S, say, goes_on=False) as guard, guard.explaining():
        guard.place.at("joining the other ranks")
        with joined_ranks(TIMEOUT_S) as device, guard.explaining(), Display() as display:
            guard.place.at("measuring the profile")
            _measure(request, config, shape, cluster, device, display)
    return 0


def _measure(
    request: ProfileRequest,
    config: PreTrainedConfig,
    shape: ModelShape,
    cluster: Cluster | None,
    device: torch.device,
    display: Display,
) -> None:
    groups = GroupPool()
    from_first_rank(lambda: _check_writable(Path(request.output)), groups)
    world_size = dist.get_world_size()
    dtype = request.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    degrees = request.sp_degrees or powers_of_two(world_size)
    weights_dtype, param_dtype = DTYPES[request.weights], DTYPES[dtype]
    room = Room.of_ranks(shape, dtype, weights_dtype.itemsize, device, request.memory_fraction, groups)
    if request.max_tokens_per_rank is None:  # else the profile's memory is artificial
        devices = world_size if cluster is None else request.num_devices or cluster.num_devices
        room.check_states(devices, for_cluster=cluster is not None)
    tokens = room.probe_tokens(request.probe_tokens, request.max_tokens_per_rank, request.policies)
    log.info(
        "profile: %s, %s parameters, %d layers, on %d ranks (%s), in %s",
        config.model_type, f"{shape.num_parameters:,}", shape.num_layers, world_size, dist.get_backend(), dtype,
    )  # fmt: skip
    estimate = doubt = None
    if cluster is not None:  # before anything slow, so that what is wrong with it is found at once
        estimate = estimate_profile(
            shape,
            cluster,
            num_devices=request.num_devices,
            sp_degrees=request.sp_degrees or None,
            dtype=dtype,
            weights=request.weights,
            memory_fraction=request.memory_fraction,
        )
        if doubt := other_device(device_name(device), cluster):
            log.warning("profile: %s", doubt)
        degrees = sorted({1, *(d for d in degrees if d <= world_size)})
    check_degrees(degrees, config, world_size, default_layouts(config, degrees))
    flops = planned_flops(
        shape, tokens, degrees, world_size, lambda degree: len(layouts_of(config, degree)), request.policies
    )
    log.info("profile: measuring computes %s", _work(flops, known_peak(device_name(device), dtype)))
    with saying_where_memory_ran_out(tokens):
        profile = measure_layers(
            config,
            groups,
            sp_degrees=degrees,
            probe_tokens=tokens,
            device=device,
            memory_fraction=request.memory_fraction,
            param_dtype=param_dtype if param_dtype != weights_dtype else None,
            weights_dtype=weights_dtype,
            activation_checkpointing=request.activation_checkpointing,
            shard_layers=request.shard_layers,
            sharded_over=None if estimate is None else estimate.num_devices,
            max_tokens_per_rank=request.max_tokens_per_rank,
            policies=request.policies,
            track=display.tell,
        )
    if estimate is not None:
        profile = fill_from_estimate(profile, estimate, doubt)
    from_first_rank(lambda: profile.save(request.output), groups)
    _say(profile, request.output)


def _work(flops: float, peak_flops_per_s: float | None) -> str:
    """How much a rank computes while it measures and, where a data sheet knows the device, how long that takes."""
    said = f"about {float(f'{flops / 1e12:.3g}'):,.10g} TFLOP a rank"
    if peak_flops_per_s is None:
        return said
    seconds = flops / (USUAL_SHARE * peak_flops_per_s)
    return f"{said}, some {seconds:.0f} s at {USUAL_SHARE:.0%} of {peak_flops_per_s / 1e12:,.0f} TFLOP/s"


def _check_writable(output: Path) -> None:
    """Refuses what could not be saved, before anything is measured."""
    folder = next((parent for parent in output.absolute().parents if os.path.exists(parent)), output)  # / has none
    if os.path.isdir(output) or not os.path.isdir(folder) or not os.access(folder, os.W_OK):
        raise ValueError(f"--output={output} cannot be written; give a file in a folder that can be")


def _say(profile: Profile, output: str) -> None:
    fit = profile.provenance["fit"]
    log.info(
        "profile: %.3g s a token, %.3g s a token squared, %.3g s a micro-batch; a rank holds %s tokens",
        profile.compute.linear_s, profile.compute.quadratic_s, profile.compute.fixed_s,
        f"{profile.capacity_tokens(1):,}",
    )  # fmt: skip
    log.info(
        "profile: on the layers measured, off by %.1f %% in the median on %d mixed micro-batches held out, at most "
        "%.1f %%; measured in %.0f s",
        100 * fit["held_out_median"], fit["held_out"], 100 * fit["held_out_worst"], profile.provenance["measured_in_s"],
    )  # fmt: skip
    log.info("profile: saved as %s; flexsp show %s", output, output)
