"""Whether the memory at hand is enough for `flexsp profile`, found before anything is measured, and that it ran out."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist

from flexsp.estimate import ModelShape
from flexsp.estimate.memory import STATES, model_state_bytes
from flexsp.estimate.shape import FP32_BYTES
from flexsp.parallel import GroupPool
from flexsp.parallel.control import largest_of_all
from flexsp.parallel.policies import OFFLOAD
from flexsp.profiler.make import ranks_per_node
from flexsp.profiler.measure import PROBE_TOKENS
from flexsp.profiler.memory import LEAST_MARGIN, held_now_bytes, memory_limit
from flexsp.profiler.parts import needed_bytes, pinned_bytes
from flexsp.train.board import Board
from flexsp.train.failures import PATIENCE_S
from flexsp.train.out_of_memory import OutOfMemoryError, is_out_of_memory
from flexsp.train.roll_call import failed_collective

log = logging.getLogger(__name__)

LEAST_PROBE_TOKENS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """What the ranks have, and what of a model is to be held there."""

    shape: ModelShape
    dtype: str
    """Computed in."""
    weight_bytes: int
    """Of a parameter as it is kept."""
    device: torch.device
    limit_bytes: float
    """Of the rank with the least, so that all decide alike."""
    said: str
    """Where this rank's limit comes from."""
    before_bytes: float
    """What the rank with the most holds before anything is built: on a CPU the process."""

    @classmethod
    def of_ranks(
        cls, shape: ModelShape, dtype: str, weight_bytes: int, device: torch.device, fraction: float, groups: GroupPool
    ) -> Room:
        """A collective."""
        own, said = memory_limit(device, fraction, ranks_per_node())
        return cls(
            shape=shape,
            dtype=dtype,
            weight_bytes=weight_bytes,
            device=device,
            limit_bytes=-largest_of_all(-float(own), groups),
            said=said,
            before_bytes=largest_of_all(float(held_now_bytes(device)), groups),
        )

    def check_states(self, devices: int, for_cluster: bool) -> None:
        """Refuses a model whose states, sharded over so many devices, leave nothing for activations.

        Raises:
            ValueError: says what there is, what is needed, and what would help.
        """
        share, whole = model_state_bytes(self.shape, devices, self.dtype, weight_bytes=self.weight_bytes)
        beside = whole + self.before_bytes
        room = self.limit_bytes * (1.0 - LEAST_MARGIN[self.device.type])
        if share + beside < room:
            return
        ways = []
        if room > beside:
            least = math.floor(share * devices / (room - beside)) + 1
            ways.append(f"{'' if for_cluster else '--cluster NAME '}--num-devices {least} or more")
            ways += [] if for_cluster else [f"{least} ranks of as much memory"]
        if self.weight_bytes == FP32_BYTES and share / 2 + beside < room:
            ways.append("--weights bfloat16")
        raise ValueError(
            f"model states of {_gib(share + whole)} GiB a device ({STATES * self.weight_bytes} bytes for each of "
            f"{self.shape.num_parameters:,} parameters, over num_devices={devices}, and {_gib(whole)} GiB gathered) do "
            f"not fit into {_gib(room - self.before_bytes)} GiB ({self.said}, less a margin"
            f"{' and the process' if self.before_bytes else ''}); use {', or '.join([*ways, 'devices of more memory'])}"
        )

    def probe_tokens(self, given: int | None, most: int | None, policies: list[str]) -> int:
        """Tokens of the largest row, after saying what measuring will hold; fewer than by default where it must be.

        Args:
            given: tokens asked for.
            most: a limit on those that are not.
            policies: that are measured too.

        Raises:
            ValueError: they do not fit.
        """
        default = PROBE_TOKENS[self.device.type]
        tokens = given or min(default, most or default)
        while given is None and self._needed(tokens) > self.limit_bytes and tokens >= 2 * LEAST_PROBE_TOKENS:
            tokens //= 2
        needed = self._needed(tokens)
        if needed > self.limit_bytes:
            raise ValueError(
                f"--probe-tokens={tokens}: measuring would hold about {_gib(needed)} GiB a rank, and there are "
                f"{_gib(self.limit_bytes)} ({self.said}); measure fewer tokens, on more ranks or on devices of more "
                f"memory"
            )
        host = ""
        if OFFLOAD in policies and self.device.type == "cuda":
            host = f"; policy offload, about {_gib(pinned_bytes(self.shape, tokens, self.dtype))} GiB of pinned memory"
            host += " of the host a rank, four times that for larger rows, up to twice either as torch rounds up"
        log.info(
            "profile: rows of up to %s tokens a rank; measuring will hold about %s of %s GiB a rank, and at most %s "
            "where larger rows tell how memory grows%s",
            f"{tokens:,}", _gib(needed), _gib(self.limit_bytes), _gib(max(needed, self.limit_bytes / 2)), host,
        )  # fmt: skip
        return tokens

    def _needed(self, tokens: int) -> float:
        ranks = dist.get_world_size()
        needed = needed_bytes(self.shape, tokens, self.dtype, weight_bytes=self.weight_bytes, ranks=ranks)
        return self.before_bytes + needed


@contextmanager
def saying_where_memory_ran_out(tokens: int) -> Iterator[None]:
    """Memory that runs out inside, on any rank, is one error with the same words on every rank.

    Args:
        tokens: of a rank in the largest row.

    Raises:
        OutOfMemoryError: names the first rank on which it did. A rank in a collective of NCCL may not notice; torchrun
            ends it once another one has ended.
    """
    board = Board()
    try:
        yield
    except Exception as error:
        ran_out = is_out_of_memory(error)
        if not ran_out and failed_collective(error) is None:
            raise
        if ran_out and board.add("profile/ran out", 1) in (None, 1):
            said = (
                f"out of memory on rank {dist.get_rank()} while measuring rows of up to {tokens:,} tokens a rank; "
                f"give fewer with --probe-tokens"
            )
            board.post("profile/said", said)
        else:
            said = board.wait("profile/said", PATIENCE_S)
            if said is None:
                raise
        raise OutOfMemoryError(said) from None  # the words say all


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f}"
