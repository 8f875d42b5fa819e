"""What ranks do in the tests of checkpoints."""

from __future__ import annotations

import os
import resource
import signal
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

from channel_pools import pool
from flexsp.parallel import prepare_model
from flexsp.train import checkpoint, safe_load
from flexsp.train.checkpoint import CheckpointError, Checkpoints, load_checkpoint
from flexsp.train.config import Config, parse_config
from flexsp.train.optimizers import build_optimizer
from flexsp.train.records import NAMES
from flexsp.train.resume import find_start, resume_point
from profiles import profile

MODEL = {
    "model_type": "llama", "vocab_size": 64, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip


def control() -> dist.ProcessGroup:
    return pool().control


def config_of(folder: str, decay: str = "all", **checkpoint: object) -> Config:
    train = {"steps": 50, "lr": 0.1, "warmup_steps": 5, "weight_decay": 0.1, "decay": decay}
    return parse_config({
        "model": {"config": MODEL}, "data": {"max_length": 256}, "train": train,
        "checkpoint": {"every": 1, **checkpoint}, "run": {"dir": folder},
    })  # fmt: skip


def built(config: Config, seed: int):
    torch.manual_seed(seed)
    fields = {k: v for k, v in MODEL.items() if k != "model_type"}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **fields))
    return prepare_model(model), *build_optimizer(model, config.train)


def step(model, optimizer, schedule, number: int) -> None:
    """A step whose gradients are made up, the same whatever the number of ranks."""
    for index, parameter in enumerate(model.parameters()):
        whole = torch.sin(torch.arange(parameter.numel(), dtype=torch.float32) * (index + 1) + number)
        from torch.distributed.tensor import distribute_tensor

        parameter.grad = distribute_tensor(whole.view(parameter.shape), parameter.device_mesh, parameter.placements)
    optimizer.step()
    optimizer.zero_grad()
    schedule.step()


def whole(model, optimizer) -> list[torch.Tensor]:
    """All weights and optimizer states."""
    found = []
    for parameter in model.parameters():
        found.append(parameter.detach().full_tensor())
        for value in optimizer.state[parameter].values():
            found.append(value.full_tensor() if hasattr(value, "full_tensor") else value.clone())
    return found


def save_then_go_on(folder: str, asynchronous: bool, decay: str = "all") -> None:
    """Saves after 3 steps and goes on at once: what is saved must be what was there after 3."""
    config = config_of(folder, decay, asynchronous=asynchronous, keep_last=2)
    model, optimizer, schedule = built(config, 0)
    checkpoints = Checkpoints(config, control())
    for number in range(3):
        step(model, optimizer, schedule, number)
    expected, learning_rate = whole(model, optimizer), optimizer.param_groups[0]["lr"]
    checkpoints.save(3, model, optimizer, schedule, profile(4))
    random = torch.get_rng_state()
    for number in range(3, 6):
        step(model, optimizer, schedule, number)
    torch.rand(5)
    checkpoints.finish()
    if dist.get_rank() == 0:
        torch.save({"tensors": expected, "lr": learning_rate, "random": random}, Path(folder) / "expected.pt")
    dist.barrier()


def load_and_compare(folder: str, decay: str = "all") -> str:
    """What of the checkpoint is not as it was saved."""
    config = config_of(folder, decay)
    model, optimizer, schedule = built(config, 1)
    start = find_start(config)
    assert start is not None and start.steps == 3
    load_checkpoint(start.path, start.state, model, optimizer, schedule)
    expected = torch.load(Path(folder) / "expected.pt", weights_only=True)
    found = whole(model, optimizer)
    if len(found) != len(expected["tensors"]):
        return f"{len(found)} tensors instead of {len(expected['tensors'])}"
    for index, (ours, theirs) in enumerate(zip(found, expected["tensors"], strict=True)):
        if not torch.equal(ours, theirs):
            return f"tensor {index} differs by {(ours - theirs).abs().max()}"
    if optimizer.param_groups[0]["lr"] != expected["lr"]:
        return f"learning rate {optimizer.param_groups[0]['lr']} instead of {expected['lr']}"
    if dist.get_rank() == 0 and not torch.equal(torch.get_rng_state(), expected["random"]):
        return "random numbers differ"
    before = optimizer.param_groups[0]["lr"]
    step(model, optimizer, schedule, 3)
    return "" if optimizer.param_groups[0]["lr"] > before else "the schedule's warm-up does not go on"


def decayed(decay: str, options: dict[str, object]) -> set[str]:
    """The names of parameters that a step without any gradient's direction makes smaller."""
    train = {"steps": 50, "lr": 0.1, "lr_schedule": "constant", "weight_decay": 0.5, "decay": decay}
    config = parse_config({"model": {"config": MODEL}, "train": {**train, "optimizer_options": options}})
    model, optimizer, _ = built(config, 0)
    before = {name: parameter.detach().full_tensor().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return {name for name, p in model.named_parameters() if not torch.equal(p.detach().full_tensor(), before[name])}


def load_error(folder: str) -> str:
    """The error of loading, if any."""
    config = config_of(folder)
    try:
        start = find_start(config)
        assert start is not None
        load_checkpoint(start.path, start.state, *built(config, 1))
    except ValueError as error:
        return str(error)
    return ""


def load_with_other_rates(folder: str, train: dict[str, object]) -> tuple[list[float], list[float], dict[str, object]]:
    """Goes on with another [train]: learning rates of this and the next steps, those of a run that was always so, and
    the other values of the optimizer."""
    config = parse_config({
        "model": {"config": MODEL}, "data": {"max_length": 256}, "train": {"steps": 50, **train},
        "checkpoint": {"resume": f"{folder}/checkpoints/step-00000003"}, "run": {"dir": f"{folder}/other"},
    })  # fmt: skip
    start = find_start(config)
    assert start is not None and not start.own
    state, always = built(config, 1), built(config, 1)
    for number in range(3):
        step(*always, number)
    load_checkpoint(start.path, start.state, *state)
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(3, 8):
        for run, rates in zip((state, always), found, strict=True):
            rates.append(run[1].param_groups[0]["lr"])
            step(*run, number)
    rest = {key: state[1].param_groups[0][key] for key in ("weight_decay", "betas", "initial_lr")}
    return (*found, rest)


def error_of_one_that_fails(folder: str, kind: str) -> str:
    """What each rank gets where reading fails on rank 1, for a reason of its own."""
    config = config_of(folder)
    start = find_start(config)
    assert start is not None
    honest = safe_load.FileSystemReader.read_data

    def fail(*_: object) -> None:
        raise {"memory": MemoryError("no room"), "device": RuntimeError("CUDA error: unspecified")}[kind]

    if dist.get_rank() == 1:
        safe_load.FileSystemReader.read_data = fail
    try:
        load_checkpoint(start.path, start.state, *built(config, 1))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        safe_load.FileSystemReader.read_data = honest
    return ""


def resumed(folder: str, resume: str = "auto") -> tuple[int, str]:
    """After how many steps the ranks go on, and what kept them from it."""
    try:
        start = resume_point(config_of(folder, resume=resume), pool())
    except ValueError as error:
        return -1, str(error)
    return (start.steps if start else 0), ""


def synced(folder: str) -> list[str]:
    """What rank 0 syncs and renames while it saves, in order."""
    seen: list[str] = []
    for name in NAMES:
        (Path(folder) / name).write_text("a row")
    fsync, replace = os.fsync, os.replace

    def noting(file: int) -> None:
        seen.append(Path(os.readlink(f"/proc/self/fd/{file}")).name)
        fsync(file)

    def renaming(old: Path, new: Path) -> None:
        replace(old, new)
        seen.append(f"{Path(old).name} -> {Path(new).name}")

    os.fsync, os.replace = noting, renaming
    try:
        save_many(folder, 1)
    finally:
        os.fsync, os.replace = fsync, replace
    return seen


def die_while_loading(folder: str, dies: int) -> None:
    """One rank is killed where it would read its tensors."""

    def die(*_: object, **__: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    config = config_of(folder)
    start = find_start(config)
    assert start is not None
    state = built(config, 1)
    if dist.get_rank() == dies:
        checkpoint.load_tensors = die
    load_checkpoint(start.path, start.state, *state)


def save_many(folder: str, count: int) -> None:
    config = config_of(folder, keep_last=2)
    state = built(config, 0)
    checkpoints = Checkpoints(config, control())
    for number in range(count):
        step(*state, number)
        checkpoints.after_step(number + 1, *state, profile(4))
    checkpoints.finish()


def save_on_a_full_disk(folder: str, full_rank: int) -> str:
    """A rank may write no more than a few bytes to a file; the error that each rank gets."""
    config = config_of(folder)
    state = built(config, 0)
    checkpoints = Checkpoints(config, control())
    step(*state, 0)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if dist.get_rank() == full_rank:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        checkpoints.save(1, *state, profile(4))
        checkpoints.finish()
    except CheckpointError as error:
        return str(error)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    return ""


def resident_around_a_checkpoint(folder: str, cut_up_bytes: int) -> tuple[int, int]:
    """Resident bytes before and after a checkpoint has been written, in a heap most of which is free but cut up."""
    config = config_of(folder, every=40)
    state = built(config, 0)
    checkpoints = Checkpoints(config, control())
    block = 8192  # not the allocator's of Python, and below malloc's own mappings
    blocks = [bytearray(b"x" * block) for _ in range(cut_up_bytes // block)]
    kept = blocks[::32]  # which hold every page run apart from the next
    del blocks
    before = resident_bytes()
    checkpoints.after_step(40, *state, profile(4))
    writing = checkpoints._writing
    assert writing is not None
    writing[1].result()
    checkpoints.after_step(41, *state, profile(4))  # which saves nothing
    after = resident_bytes()
    checkpoints.finish()
    del kept
    return before, after


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
