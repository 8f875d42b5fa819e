"""The optimizer and the learning-rate schedule of a run."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from flexsp.train.checkpoint import Schedule
from flexsp.train.config import Config, TrainConfig
from flexsp.train.out_of_memory import is_out_of_memory
from flexsp.train.run_model import DTYPES

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}
WITHOUT_OPTIONS = ("constant", "constant_with_warmup")
"""Schedules to which transformers does not hand any on, without a word."""
TRIED = 1000
"""About how many steps of a schedule are tried."""


def check_optimizer(config: Config, device: torch.device) -> None:
    """Tries the optimizer and the schedule on a parameter of its own, so that what they do not take is found at once.

    Args:
        config: of the run.
        device: of this rank; on some, options are not to be had.

    Raises:
        ValueError: names the key.
    """
    train = config.train
    parameter = torch.nn.Parameter(torch.ones(2, 2, device=device, dtype=DTYPES[config.model.weights]))
    parameter.grad = torch.ones_like(parameter)
    optimizer, schedule = _optimizer([parameter], train)
    try:
        optimizer.step()
    except Exception as error:  # of torch's own code: of any kind
        if is_out_of_memory(error):
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"train.optimizer_options={train.optimizer_options}: {train.optimizer} takes no step with them ({said}); "
            f"correct them"
        ) from None
    if any(each.default is each.empty for each in inspect.signature(schedule.step).parameters.values()):
        raise ValueError(
            f"train.lr_schedule={train.lr_schedule!r} needs a metric at each step, which it is not given; choose "
            f"another"
        )
    _check_rates(schedule, train)


def build_optimizer(model: PreTrainedModel, config: TrainConfig) -> tuple[torch.optim.Optimizer, Schedule]:
    """The optimizer and the learning-rate schedule; see `check_optimizer`."""
    # a schedule goes on where the optimizer leaves out the first step
    warnings.filterwarnings("ignore", message=r"Detected call of .lr_scheduler\.step", category=UserWarning)
    return _optimizer(model.parameters(), config)


def _optimizer(parameters: Iterable[torch.nn.Parameter], config: TrainConfig) -> tuple[torch.optim.Optimizer, Schedule]:
    """
    Raises:
        ValueError: options that the optimizer or the schedule does not have or needs, or an unknown schedule.
    """
    try:
        optimizer = OPTIMIZERS[config.optimizer](
            _decayed(parameters, config), lr=config.lr, weight_decay=config.weight_decay, **config.optimizer_options
        )  # type: ignore[call-arg]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"train.optimizer_options={config.optimizer_options}: {error}; correct them") from None
    return optimizer, _schedule(optimizer, config)


def _decayed(parameters: Iterable[torch.nn.Parameter], config: TrainConfig) -> list[Any]:
    """The parameters as an optimizer takes them: those that do not decay are a group of their own."""
    if config.decay == "all":
        return list(parameters)
    groups: tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]] = [], []
    for parameter in parameters:
        groups[parameter.ndim < 2].append(parameter)  # of a sharded one too: the whole parameter's dimensions
    matrices, rest = groups
    decaying = [{"params": matrices}] if matrices else []
    return [*decaying, {"params": rest, "weight_decay": 0.0}] if rest else decaying


def _schedule(optimizer: torch.optim.Optimizer, config: TrainConfig) -> Schedule:
    """
    Raises:
        ValueError: see `_optimizer`.
    """
    options = config.lr_schedule_options
    if options and config.lr_schedule in WITHOUT_OPTIONS:
        raise ValueError(
            f"train.lr_schedule_options={options}: the schedule {config.lr_schedule!r} takes none; leave them out, or "
            f"choose another schedule"
        )
    try:
        schedule: Schedule = transformers.get_scheduler(
            config.lr_schedule, optimizer, config.warmup_steps, config.steps, options
        )
    except Exception as error:  # of the schedule's own code: of any kind
        raise _schedule_error(config, error) from None
    return schedule


def _check_rates(schedule: Schedule, config: TrainConfig) -> None:
    """Asks a schedule for rates all along the run: some options fail only after warm-up, or give no rate.

    Raises:
        ValueError: a rate cannot be computed, is no number or is below 0.
    """
    every = max(1, config.steps // TRIED)
    for step in sorted({*range(0, config.steps, every), config.warmup_steps, config.steps}):
        for factor in getattr(schedule, "lr_lambdas", []):
            try:
                rate = config.lr * factor(step)
                right = math.isfinite(rate) and rate >= 0
            except Exception as error:  # of the schedule's own code: of any kind
                raise _schedule_error(config, error) from None
            if not right:
                raise _schedule_error(config, f"the learning rate of step {step} would be {rate:g}")


def _schedule_error(config: TrainConfig, why: object) -> ValueError:
    said = " ".join(str(why).split())
    key = f"train.lr_schedule={config.lr_schedule!r}"
    if config.lr_schedule_options:
        return ValueError(f"{key}, train.lr_schedule_options={config.lr_schedule_options}: {said}; correct them")
    return ValueError(f"{key}: {said}; choose another, or give train.lr_schedule_options")
