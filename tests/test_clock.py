"""The busy clock, in logical time in which only collectives take long: it counts exchanges and leaves gathers out."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from channel_pools import channel_of_all, pool
from equality_ranks import make_batch
from flexsp.parallel import forward_backward, loss, prepare_model
from flexsp.parallel.clock import BusyClock, ExchangeClock, clock_of
from flexsp.plans import Group, MicroBatch, Plan
from reference import build, small_config

pytestmark = pytest.mark.alone

GATHER, EXCHANGE, LOSS = 1000, 10, 1
"""Ticks of an FSDP2 collective, of an all-to-all and of a loss; reading the clock takes none."""
FSDP2 = ("all_gather_single", "all_gather_into_tensor", "reduce_scatter_single", "reduce_scatter_tensor")
"""What FSDP2 calls, under the names of one version of torch or another."""
PLAN = Plan(
    num_devices=2,
    micro_batches=(
        MicroBatch(groups=(Group(ranks=(0,), sequences=(0,)), Group(ranks=(1,), sequences=(1,)))),
        MicroBatch(groups=(Group(ranks=(0, 1), sequences=(2,)),)),
    ),
)


def logical_times(**prepare) -> tuple[list[tuple[float, float, float]], int]:
    """Elapsed, busy and exchange ticks of each micro-batch of PLAN, and the model's layers."""
    ticks = [0]
    patch = pytest.MonkeyPatch()

    def taking(function, cost):
        def call(*args, **kwargs):
            ticks[0] += cost
            return function(*args, **kwargs)

        return call

    model = prepare_model(build(small_config(), torch.float32), **prepare)
    for name in FSDP2:
        patch.setattr(dist, name, taking(getattr(dist, name, None), GATHER), raising=False)
    patch.setattr(dist, "all_to_all_single", taking(dist.all_to_all_single, EXCHANGE))
    patch.setattr(loss, "cross_entropy_sum", taking(loss.cross_entropy_sum, LOSS))
    for kind in (BusyClock, ExchangeClock):
        patch.setattr(kind, "_now", lambda self: float(ticks[0]))
    try:
        times = forward_backward(model, make_batch([20, 9, 12], PLAN, seed=0, masked=0.0), pool()).times
    finally:
        patch.undo()
    return [(t.elapsed_s, t.busy_s, t.exchange_s) for t in times], model.config.num_hidden_layers


@pytest.mark.parametrize(
    "prepare",
    [
        {},
        {"shard_layers": False},
        {"activation_checkpointing": True},
        {"reshard_after_forward": False},
        {"loss_chunk_tokens": 5},
    ],
    ids=["layers", "one unit", "recompute", "kept", "loss in chunks"],
)
def test_waiting_for_gathers_is_left_out_and_exchanges_are_counted(ranks, prepare):
    for (times, num_layers), alone_tokens in zip(ranks(2).run(_run, prepare), (20, 9), strict=True):
        (elapsed_alone, busy_alone, exchange_alone), (elapsed_shared, busy_shared, exchange_shared) = times
        assert elapsed_alone >= 2 * GATHER  # at least a gather and a reduction
        assert elapsed_shared >= 2 * GATHER
        assert busy_alone == _losses(alone_tokens, **prepare) * LOSS
        exchanges = 4 + 2 * bool(prepare.get("activation_checkpointing"))  # recomputed ones are work too
        assert exchange_alone == 0
        assert exchange_shared == exchanges * num_layers * EXCHANGE
        assert busy_shared == exchanges * num_layers * EXCHANGE + _losses(6, **prepare) * LOSS


def _losses(tokens, loss_chunk_tokens=64, **_) -> int:
    """How many are computed; those of chunks again in the backward."""
    chunks = -(-tokens // loss_chunk_tokens)
    return chunks if chunks == 1 else 2 * chunks


def test_exchanges_outside_of_a_step_are_not_kept_and_inner_ones_count_once(monkeypatch):
    ticks = iter(range(0, 1000, 10))
    monkeypatch.setattr(ExchangeClock, "_now", lambda self: next(ticks))
    clock = ExchangeClock(torch.device("cpu"))
    with clock:  # of the profiler, say
        pass
    assert clock.read() == ()
    clock.begin()
    with clock:  # 0
        with clock:
            pass
    with clock:  # 20 to 30
        pass
    clock.begin()
    assert clock.read() == (20, 0)
    clock.begin()  # and the step ends in an error
    clock.reset()
    assert clock.read() == ()


def shifted_time() -> float:
    """Ticks of exchange of a ring's shift, whose wait takes long, and its start none."""
    channel = channel_of_all("groups")
    clock = pool("groups").clock
    patch, ticks = pytest.MonkeyPatch(), [0]

    patch.setattr(ExchangeClock, "_now", lambda self: float(ticks[0]))
    try:
        clock.begin()
        pending = channel.shift([torch.ones(3)], [torch.empty(3)])
        ticks[0] += LOSS  # work, while it travels
        pending._works = Slow(pending._works, ticks)
        pending.wait()
        return clock.read()[0]
    finally:
        patch.undo()


class Slow(tuple):
    """Works whose wait takes EXCHANGE ticks."""

    def __new__(cls, works, ticks):
        made = super().__new__(cls, works)
        made.ticks = ticks
        return made

    def __iter__(self):
        self.ticks[0] += EXCHANGE
        return super().__iter__()


def test_of_a_shift_the_wait_counts_and_not_what_was_done_meanwhile(ranks):
    assert ranks(2).run(shifted_time) == [EXCHANGE, EXCHANGE]


def _run(prepare):
    return logical_times(**prepare)


def test_a_model_that_was_not_prepared_is_named():
    with pytest.raises(ValueError, match="model=Linear has not been prepared; call prepare_model first"):
        clock_of(torch.nn.Linear(1, 1))


def test_work_that_nothing_ends_ends_with_the_micro_batch(monkeypatch):
    """Frozen embeddings: no gradient reaches the first layer's input."""
    ticks = iter(range(0, 1000, 10))
    monkeypatch.setattr(BusyClock, "_now", lambda self: next(ticks))
    clock, layer = BusyClock(torch.device("cpu")), torch.nn.Linear(2, 2)
    clock.watch_input(layer)
    clock.watch_output(layer)
    clock.begin()  # 0
    out = layer(torch.ones(1, 2))  # 10 to 20
    loss = out.sum()
    clock.turn(loss)
    loss.backward()  # enters at 30, and nothing leaves
    clock.begin()  # ends it at 40, begins at 50
    clock.end()
    first, second = clock.read()
    assert first.busy_s == 20
    assert second.busy_s == 0


def step_after_one_that_failed() -> None:
    model, batch = prepare_model(build(small_config(), torch.float32)), make_batch([20, 9, 12], PLAN, 0, 0.0)
    expected = forward_backward(model, batch, pool()).loss
    model.zero_grad()
    hook = model.model.layers[1].register_forward_hook(lambda *_: (_ for _ in ()).throw(MemoryError("no room")))
    with pytest.raises(MemoryError, match="no room"):
        forward_backward(model, batch, pool())
    hook.remove()
    model.zero_grad()
    result = forward_backward(model, batch, pool())
    assert result.loss == expected and len(result.times) == len(PLAN.micro_batches)


def test_a_step_that_failed_does_not_spoil_the_next_one(ranks):
    """One's own loop may leave out a batch for which memory ran out."""
    ranks(2).run(step_after_one_that_failed)
