"""The optimizer and the learning-rate schedule of a run."""

from __future__ import annotations

import inspect
from collections.abc import Iterable

import torch
import transformers
from transformers import PreTrainedModel

from flexsp.train.build import DTYPES
from flexsp.train.config import Config, TrainConfig
from flexsp.train.out_of_memory import is_out_of_memory

OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}


def check_optimizer(config: Config, device: torch.device) -> None:
    """Tries the optimizer and the schedule on a parameter of its own, so that what they do not take is found at once.

    Args:
        config: of the run.
        device: of this rank; on some, options are not to be had.

    Raises:
        ValueError: names the key.
    """
    train = config.train
    parameter = torch.nn.Parameter(torch.ones(2, device=device, dtype=DTYPES[config.model.weights]))
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


def build_optimizer(
    model: PreTrainedModel, config: TrainConfig
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """The optimizer and the learning-rate schedule; see `check_optimizer`."""
    return _optimizer(model.parameters(), config)


def _optimizer(
    parameters: Iterable[torch.nn.Parameter], config: TrainConfig
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    """
    Raises:
        ValueError: options that the optimizer does not have, or an unknown schedule, or one that needs more arguments.
    """
    try:
        optimizer = OPTIMIZERS[config.optimizer](
            parameters, lr=config.lr, weight_decay=config.weight_decay, **config.optimizer_options
        )  # type: ignore[call-arg]
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"train.optimizer_options={config.optimizer_options}: {error}; correct them") from None
    try:
        schedule = transformers.get_scheduler(config.lr_schedule, optimizer, config.warmup_steps, config.steps)
    except (TypeError, ValueError) as error:
        raise ValueError(f"train.lr_schedule={config.lr_schedule!r}: {error}; choose another") from None
    return optimizer, schedule
