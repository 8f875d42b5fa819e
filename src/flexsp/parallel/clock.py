"""How long a rank works on a micro-batch, apart from how long it waits for other ranks.

Under ZeRO-3 a rank waits for all others at every gather of parameters, so the seconds of a micro-batch are those of its
slowest group, and say nothing of the others. What a rank does inside its layers, its output head and its loss is its
own: FSDP2 gathers before a layer's forward begins and reduces after its backward has ended. So the clock is told where
each begins and ends, inside of FSDP2's hooks, on the way forward by hooks of the module and on the way back by hooks of
its input and its output:

    forward   gather | enter  layer  leave |        enter  head, loss  leave
    backward  reduce | leave  layer  enter | gather leave  head, loss  enter | gather

Head and loss are one, both inside of the model's call (`flexsp.parallel.loss`), be it once or chunk by chunk; where
there is no head to watch, the loss alone. On CUDA the marks are events on the current stream, read when the step has
ended; nothing is synchronised for them. The exchange of a group is inside: it belongs to the group's time. How much of
it that is, another clock says, which the group's channels drive (`ExchangeClock`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatchTime:
    """What one micro-batch took on one rank."""

    elapsed_s: float
    """From its begin to the next one's, waiting for other ranks included."""
    busy_s: float
    """Inside layers, head and loss, forward and backward, the exchanges of the rank's group included."""
    exchange_s: float = 0.0
    """Of that, in exchanges with the rank's group: in all-to-alls, and waiting for what travels around the ring. What
    it waits there for a rank of its group that is later is in it."""


class _Clock:
    """Moments, and the seconds between two: of the host, or of the current stream on CUDA."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1e3 if self._cuda else float(end - begin)


class ExchangeClock(_Clock):
    """What this rank spends in exchanges, by micro-batch. Channels enter it; nothing is kept outside of a step."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._spent: list[list[tuple[Any, Any]]] = []
        self._depth = 0
        self._entered: Any = None

    def reset(self) -> None:
        """A step begins; one before may have ended in an error."""
        self._spent = []

    def begin(self) -> None:
        """A micro-batch begins."""
        self._spent.append([])

    def __enter__(self) -> None:
        """An exchange begins; one inside of another is that one's."""
        if self._depth == 0 and self._spent:
            self._entered = self._now()
        self._depth += 1

    def __exit__(self, *_: object) -> None:
        self._depth -= 1
        if self._depth == 0 and self._spent:
            self._spent[-1].append((self._entered, self._now()))

    def read(self) -> tuple[float, ...]:
        """Seconds of each micro-batch since the last reading. On CUDA the device must have come past them."""
        spent, self._spent = self._spent, []
        return tuple(sum(self._between(enter, leave) for enter, leave in pairs) for pairs in spent)


class BusyClock(_Clock):
    """The clock of one model on one rank. `forward_backward` runs it: `begin`, `turn` a micro-batch; `end`, `read`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._begins: list[Any] = []
        self._busy: list[list[tuple[Any, Any]]] = []
        self._depth = 0
        self._entered: Any = None
        self._ended: Any = None
        self._forward = False
        self._in_loss = False
        self.layers_done = 0
        """Layers whose forward has ended in this micro-batch: how far it had got where memory ran out."""

    def reset(self) -> None:
        """A step begins; one before may have ended in an error."""
        self._begins, self._busy, self._depth = [], [], 0

    def begin(self) -> None:
        """A micro-batch begins."""
        self._close()
        self._begins.append(self._now())
        self._busy.append([])
        self.layers_done = 0
        self._forward, self._in_loss = True, False

    @property
    def micro_batch(self) -> int:
        """Which micro-batch since the last reading is running, from 0; -1 where none has begun."""
        return len(self._begins) - 1

    def progress(self) -> str:
        """How far the step is, in words; for other threads, which may ask at any time."""
        at, layers = self.micro_batch, self.layers_done
        return "" if at < 0 else f"micro-batch {at}, {layers} layers forward"

    def turn(self, loss: Tensor) -> None:
        """Forward and loss have ended, the backward begins, with what FSDP2 does at the model's output, the loss."""
        self._forward = False
        if loss.requires_grad:
            loss.register_hook(lambda grad: self._enter())  # after FSDP2's own, which gathers

    def _enter(self) -> None:
        """Work begins. Where other work has not ended yet (no gather lies between two layers), it goes on."""
        if self._depth == 0:
            self._entered = self._now()
        self._depth += 1

    def _leave(self) -> None:
        self._depth -= 1
        if self._depth == 0 and self._busy:
            self._busy[-1].append((self._entered, self._now()))

    def _close(self) -> None:
        """Ends what nothing ended: frozen embeddings have no gradient to say that the backward is through."""
        if self._depth > 0 and self._busy:
            self._busy[-1].append((self._entered, self._now()))
        self._depth = 0

    def end(self) -> None:
        """The last micro-batch ends."""
        self._close()
        self._ended = self._now()

    def read(self) -> tuple[MicroBatchTime, ...]:
        """The micro-batches since the last reading, after `end`. On CUDA it waits for the device."""
        ends = [*self._begins[1:], self._ended]
        if self._cuda:
            torch.cuda.synchronize()
        times = tuple(
            MicroBatchTime(
                elapsed_s=self._between(begin, end), busy_s=sum(self._between(enter, leave) for enter, leave in busy)
            )
            for begin, end, busy in zip(self._begins, ends, self._busy, strict=True)
        )
        self._begins, self._busy = [], []
        return times

    def watch_input(self, module: torch.nn.Module) -> None:
        """Work begins at the module's first input, the hidden states, and on the way back ends there."""

        def hook(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs["hidden_states"]
            if self._forward:  # and not a forward that is computed again in the backward
                self._enter()
                if x.requires_grad:
                    x.register_hook(lambda grad: self._leave())

        module.register_forward_pre_hook(hook, with_kwargs=True)  # after FSDP2's own, which gathers

    def watch_output(self, layer: torch.nn.Module) -> None:
        """Work ends at the layer's output, or the first of them, and on the way back begins there."""

        def hook(_: torch.nn.Module, args: Any, output: Any) -> None:
            x: Tensor = output[0] if isinstance(output, tuple) else output
            if self._forward:
                self.layers_done += 1
                self._leave()
                if x.requires_grad:
                    x.register_hook(lambda grad: self._enter())

        layer.register_forward_hook(hook)  # after FSDP2's own, so that backward gathers before it enters

    def watch_head(self, head: torch.nn.Module) -> None:
        """Where the head is called from outside of the loss, its input is where the work of head and loss begins."""

        def hook(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.begin_loss(args[0] if args else next(iter(kwargs.values())))

        head.register_forward_pre_hook(hook, with_kwargs=True)

    def begin_loss(self, x: Tensor) -> None:
        """Head and loss begin at `x`, and on the way back end there; nothing where they have begun."""
        if self._forward and not self._in_loss:
            self._in_loss = True
            self._enter()
            if x.requires_grad:
                x.register_hook(lambda grad: self._leave())

    def end_loss(self) -> None:
        """The loss has been computed."""
        if self._forward and self._in_loss:
            self._leave()


def install(model: PreTrainedModel, layers: list[torch.nn.Module], device: torch.device) -> None:
    """Gives `model` a clock that its layers and its output head drive. To be called after `fully_shard`."""
    clock = BusyClock(device)
    for layer in layers:
        clock.watch_input(layer)
        clock.watch_output(layer)
    head = model.get_output_embeddings()
    if isinstance(head, torch.nn.Module):
        clock.watch_head(head)
    object.__setattr__(model, "_flexsp_clock", clock)


def clock_of(model: torch.nn.Module) -> BusyClock:
    """The clock of a prepared model."""
    clock = getattr(model, "_flexsp_clock", None)
    if not isinstance(clock, BusyClock):
        raise ValueError(f"model={type(model).__name__} has not been prepared; call prepare_model first")
    return clock
