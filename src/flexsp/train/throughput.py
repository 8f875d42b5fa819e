"""What a step computed, in FLOPs: of the model, a second, and as a share of what the device could do."""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedModel

from flexsp.estimate.cluster import known_peak
from flexsp.estimate.flops import FlopCount, flop_count
from flexsp.lengths import LengthArray

log = logging.getLogger(__name__)

PARAMETERS_AGREE = 0.02
"""Sizes are those of the model if they give as many parameters, but for this share: a norm or a bias may be missed."""


class Throughput:
    """Counts the steps of one run. What cannot be known is left out, and said once, when it is made."""

    def __init__(
        self, model: PreTrainedModel, world_size: int, device: torch.device, dtype: str, peak_tflops: float
    ) -> None:
        """
        Args:
            model: sharded or not.
            world_size: ranks that share the work.
            device: of this rank.
            dtype: what is computed in, "bfloat16" say.
            peak_tflops: of a device; 0: by its name.
        """
        self._world_size = world_size
        self._count = _count_of(model)
        self._peak_flops_per_s: float | None = peak_tflops * 1e12 or None
        if self._count is not None and self._peak_flops_per_s is None:
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
            self._peak_flops_per_s = known_peak(name, dtype)
            if self._peak_flops_per_s is None:
                log.info("watch: no mfu: the peak of %s in %s is not known; watch.peak_tflops sets it", name, dtype)

    def of(self, lengths: LengthArray, step_s: float) -> dict[str, float]:
        """What metrics.jsonl says of a step's FLOPs.

        Args:
            lengths: (K,) tokens of the global batch.
            step_s: what the step took.
        """
        if self._count is None:
            return {}
        flops = self._count.step_flops(lengths)
        per_rank = flops / step_s / self._world_size
        found = {"model_flops": flops, "tflops_per_s": per_rank / 1e12}
        if self._peak_flops_per_s is not None:
            found["mfu"] = per_rank / self._peak_flops_per_s
        return found


def _count_of(model: PreTrainedModel) -> FlopCount | None:
    """None where the model's sizes are not understood: a wrong number would be worse than none."""
    try:
        count = flop_count(model.config.to_dict(), f"{type(model).__name__}'s config")
        parameters = sum(p.numel() for p in model.parameters())
        if abs(count.num_parameters / parameters - 1) > PARAMETERS_AGREE:
            raise ValueError(
                f"the sizes in {type(model).__name__}'s config give {count.num_parameters:,} parameters, and it has "
                f"{parameters:,}"
            )
    except ValueError as error:
        log.info("watch: FLOPs are not counted, and there is no mfu: %s", error)
        return None
    return count
