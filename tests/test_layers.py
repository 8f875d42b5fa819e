"""What few layers tell of the whole model: by difference, and nothing of it twice."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from flexsp.estimate import model_shape
from flexsp.profiler.layers import _by_difference, _PartDone, whole_model_states, whole_model_tokens
from flexsp.profiler.memory import PeakFit, peak_fit
from flexsp.profiler.parts import parts_of
from flexsp.profiler.points import Part
from flexsp.profiler.splits import Splits

SHAPE = model_shape(
    {
        "model_type": "llama", "vocab_size": 8192, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 20,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 512,
    }
)  # fmt: skip


@dataclass(frozen=True)
class Truth:
    """What a number comes to: so much a layer, so much for a whole vocabulary, so much whatever is run."""

    base: float
    layer: float
    head: float

    def of(self, part: Part) -> float:
        return self.base + self.layer * part.layers + self.head * (part.head == 1.0)


def done(part: Part, per_token: float, at_rest: float = 0.0, residual: float = 0.0, shard: int = 0) -> _PartDone:
    peaks = PeakFit(bytes_per_token=per_token, at_rest_bytes=at_rest, residual_bytes=residual)
    return _PartDone(
        part=part, readings=[], tried=[], alone={}, splits=Splits(layouts={}, seconds={}), optimizer_s=0.0, peaks=peaks,
        degree_factor=1.0, policies={}, shard_bytes=shard, kernels=frozenset(),
    )  # fmt: skip


def test_the_parts_are_three_layers_one_layer_and_one_with_the_whole_vocabulary():
    assert [(p.layers, p.head) for p in parts_of(SHAPE)] == [(3, 1024 / 8192), (1, 1024 / 8192), (1, 1.0)]


def test_a_number_of_the_whole_model_is_put_together_from_its_parts():
    truth = Truth(base=5.0, layer=7.0, head=11.0)
    parts = [done(part, truth.of(part)) for part in parts_of(SHAPE)]
    whole = truth.base + 20 * truth.layer + truth.head
    assert _by_difference(parts, [truth.of(each.part) for each in parts], SHAPE) == pytest.approx(whole)
    assert whole_model_tokens(parts, SHAPE)[0] == pytest.approx(whole)


def test_a_layer_that_seems_to_cost_less_than_nothing_counts_as_nothing():
    parts = [done(part, value) for part, value in zip(parts_of(SHAPE), (5.0, 6.0, 4.0), strict=True)]
    assert whole_model_tokens(parts, SHAPE)[0] == 5.0


def test_the_worst_peak_of_any_part_is_the_residual():
    parts = [done(part, 1.0, residual=r) for part, r in zip(parts_of(SHAPE), (3.0, 9.0, 4.0), strict=True)]
    assert whole_model_tokens(parts, SHAPE)[1] == 9.0


@pytest.mark.parametrize(("weight_bytes", "each"), [(4, 16), (2, 8)])
def test_states_are_counted_over_all_devices_and_what_is_whole_is_that_of_the_fullest_part_and_a_layer(
    weight_bytes, each
):
    held = ((900.0, 100), (700.0, 90), (800.0, 20))
    parts = [done(p, 1.0, at_rest=rest, shard=own) for p, (rest, own) in zip(parts_of(SHAPE), held, strict=True)]
    share, whole = whole_model_states(parts, SHAPE, 8, weight_bytes, gathered_itemsize=2)
    assert share == each * SHAPE.num_parameters / 8
    assert whole == 800.0 - 2 * 20 + 2 * SHAPE.layer_parameters
    _, at_once = whole_model_states(parts, SHAPE, 8, weight_bytes, gathered_itemsize=None)
    assert at_once == pytest.approx(700.0 + 17 * (700.0 - 520.0) / 2 + (760.0 - 520.0))  # grows with the layers


def test_peaks_are_a_line_over_tokens_and_what_is_above_it_is_the_residual(monkeypatch):
    """By a meter of our own: a process's resident set is what it is."""
    of_rows = {64: 10_640, 256: 12_560, 512: 15_120, 1024: 20_640}  # 10 a token above 10,000, the last 400 more
    ran: list[int] = []
    monkeypatch.setattr("flexsp.profiler.memory.PeakMeter.peak_bytes", lambda self: of_rows[ran[-1]])
    monkeypatch.setattr("flexsp.profiler.memory.most_live_bytes", lambda run: 0)
    fit = peak_fit(ran.append, list(of_rows), torch.device("cpu"), 1e9, largest=float)
    assert fit.peaks == tuple(of_rows.items())
    assert 10.0 < fit.bytes_per_token < 10.6
    assert 0 < fit.residual_bytes < 400
    for tokens, peak in of_rows.items():  # so that nothing measured is above what is planned with
        assert fit.at_rest_bytes + fit.bytes_per_token * tokens + fit.residual_bytes >= peak
    ran.clear()
    short = peak_fit(ran.append, list(of_rows), torch.device("cpu"), 13_000.0, largest=float)
    assert [tokens for tokens, _ in short.peaks] == [64, 256]  # the next would not fit
    assert short.bytes_per_token == pytest.approx(10.0)
