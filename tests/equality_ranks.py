"""What runs on each rank in the equality tests."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from channel_pools import pool
from flexsp.data.batch import PlannedBatch
from flexsp.parallel import forward_backward, prepare_model
from flexsp.plans import Group, MicroBatch, Plan
from flexsp.profile import Layout
from reference import build, reference_step


class Tokens:
    """A SequenceSource over lists, its labels shifted by plain indexing."""

    def __init__(self, sequences: list[list[int]], labels: list[list[int]]) -> None:
        self.sequences, self.labels = sequences, labels

    def read(self, sequence: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        labels = [*self.labels[sequence][1:], -100]
        return np.array(self.sequences[sequence][start:stop]), np.array(labels[start:stop])


def make_batch(
    lengths: list[int],
    plan: Plan,
    seed: int,
    masked: float,
    vocab_size: int = 64,
    layouts: Mapping[int, Layout] | None = None,
) -> PlannedBatch:
    draw = random.Random(seed)
    sequences = [[draw.randrange(vocab_size) for _ in range(n)] for n in lengths]
    labels = [[-100 if draw.random() < masked else t for t in row] for row in sequences]
    return PlannedBatch(
        step=0, sequence_ids=np.arange(len(lengths)), lengths=np.array(lengths), plan=plan,
        source=Tokens(sequences, labels), layouts=layouts or {},
    )  # fmt: skip


def random_plan(num_sequences: int, world_size: int, draw: random.Random, degrees: list[int]) -> Plan:
    """Any legal plan: random micro-batches, layouts with idle ranks, sequences in any group."""
    while True:
        layouts = []
        for _ in range(draw.randint(1, 3)):
            layout, start = [], 0
            while start < world_size:
                degree = draw.choice([d for d in degrees if start % d == 0 and start + d <= world_size])
                if draw.random() < 0.8:
                    layout.append(tuple(range(start, start + degree)))
                start += degree
            layouts.append(layout)
        slots = [(b, g) for b, layout in enumerate(layouts) for g in range(len(layout))]
        if not all(layouts) or len(slots) > num_sequences:
            continue
        order = draw.sample(range(num_sequences), num_sequences)
        held: dict[tuple[int, int], list[int]] = {slot: [order.pop()] for slot in slots}
        for index in order:
            held[draw.choice(slots)].append(index)
        return Plan(
            num_devices=world_size,
            micro_batches=tuple(
                MicroBatch(groups=tuple(
                    Group(ranks=ranks, sequences=tuple(held[b, g])) for g, ranks in enumerate(layout)
                ))
                for b, layout in enumerate(layouts)
            ),
        )  # fmt: skip


def worst_difference(
    config: Any, dtype: torch.dtype, batch: PlannedBatch, transport: str = "groups", **prepare: Any
) -> tuple[float, float, str]:
    """Relative difference of the loss and the worst of the parameters' gradients, and that parameter's name."""
    model = prepare_model(build(config, dtype), **prepare)
    result = forward_backward(model, batch, pool(transport))
    source = batch.source
    expected_loss, expected = reference_step(build(config, dtype), source.sequences, source.labels)
    worst, where = 0.0, ""
    for name, parameter in model.named_parameters():
        assert isinstance(parameter.grad, DTensor), f"{name} has no gradient"
        difference = (parameter.grad.full_tensor() - expected[name]).norm() / expected[name].norm()
        if not difference <= worst:
            worst, where = difference.item(), name
    return abs(result.loss - expected_loss) / abs(expected_loss), worst, where


def check_equal(
    config: Any,
    dtype: torch.dtype,
    cases: list[tuple[list[int], Plan, float]],
    prepare: dict[str, Any] | None = None,
    layouts: Mapping[int, Layout] | None = None,
    transport: str = "groups",
) -> None:
    tolerance = {torch.float64: 1e-9, torch.float32: 1e-5}[dtype]
    for seed, (lengths, plan, masked) in enumerate(cases):
        batch = make_batch(lengths, plan, seed, masked, layouts=layouts)
        loss, gradient, where = worst_difference(config, dtype, batch, transport, **(prepare or {}))
        assert loss <= tolerance, f"loss off by {loss:.2e} with {lengths} on {plan}"
        assert gradient <= tolerance, f"gradient of {where} off by {gradient:.2e} with {lengths} on {plan}"
