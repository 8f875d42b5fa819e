"""Fitting the cost model: readings made from known coefficients give them back, those of parts of a model too."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from flexsp.profiler.fit import TABLE_AT, Fit, robust_nonnegative
from flexsp.profiler.points import Part, Point, batch_of, fit_points, held_out_mixes
from flexsp.profiler.probe import Reading

WHOLE = Part(layers=6, head=1.0, whole=True)
DEGREES = [1, 2, 4]
LAYER = {
    "fixed": 3e-3,
    "quadratic": 2e-9,
    "linear": 4e-6,
    "exchange": {2: 5e-7, 4: 8e-7},
    "latency": {2: 1e-4, 4: 3e-4},
}
MODEL = {"fixed": 2e-3, "head_fixed": 5e-3, "head_linear": 6e-6}


def layer_s(lengths, degree):
    """One layer's seconds of a row, written out anew."""
    alone = sum(LAYER["quadratic"] * s * s + LAYER["linear"] * s for s in lengths) / degree
    if degree > 1:
        alone += LAYER["exchange"][degree] * sum(lengths) + LAYER["latency"][degree]
    return alone


def true_s(point, layers, head):
    row = layers * (LAYER["fixed"] + layer_s(point.lengths, point.degree))
    row += MODEL["fixed"] + head * (MODEL["head_fixed"] + MODEL["head_linear"] * point.tokens / point.degree)
    return point.count * row


def readings_of(part, points, layers, head, spread=0.0):
    return [Reading(point=p, part=part, seconds=true_s(p, layers, head), spread=spread) for p in points]


def test_coefficients_are_recovered_and_never_below_zero():
    features = np.array([[1, 100, 10], [1, 900, 30], [1, 50, 50], [4, 0, 1]], dtype=float)
    truth = np.array([0.2, 3e-3, 1e-2])
    np.testing.assert_allclose(robust_nonnegative(features, features @ truth), truth, rtol=1e-9)
    found = robust_nonnegative(features, features @ np.array([0.2, -1e-4, 1e-2]))
    assert (found >= 0).all()
    assert found[1] == 0


def test_an_outlier_moves_a_robust_fit_far_less_than_least_squares():
    rng = np.random.default_rng(0)
    features = np.stack([np.ones(20), rng.uniform(1, 100, 20)], axis=1)
    truth = np.array([5.0, 0.3])
    seconds = features @ truth
    seconds[7] *= 4
    robust = np.abs(robust_nonnegative(features, seconds) / truth - 1).max()
    plain = np.abs(np.linalg.lstsq(features / seconds[:, None], np.ones(20), rcond=None)[0] / truth - 1).max()
    assert robust < 0.01 < plain


def test_a_whole_models_readings_give_its_coefficients():
    readings = readings_of(WHOLE, fit_points(1024, DEGREES), 6, 1.0)
    fit = Fit(readings, DEGREES, {2: LAYER["exchange"][2], 4: LAYER["exchange"][4]})
    found = fit.for_layers(1)
    assert found.quadratic_s == pytest.approx(6 * LAYER["quadratic"], rel=1e-3)
    assert found.linear_s == pytest.approx(6 * LAYER["linear"] + MODEL["head_linear"], rel=1e-3)
    assert found.fixed_s == pytest.approx(6 * LAYER["fixed"] + MODEL["fixed"] + MODEL["head_fixed"], rel=1e-3)
    assert max(map(abs, fit.residuals())) < 0.01
    assert fit.tables(1) == {}


def test_few_layers_and_a_small_vocabulary_give_those_of_the_whole_model():
    few, one, head = Part(layers=3, head=0.05), Part(layers=1, head=0.05), Part(layers=1, head=1.0)
    readings = readings_of(few, fit_points(1024, DEGREES), 3, 0.05)
    readings += readings_of(one, fit_points(1024, [1]), 1, 0.05)
    readings += readings_of(head, fit_points(512, [1]), 1, 1.0)
    found = Fit(readings, DEGREES, dict(LAYER["exchange"])).for_layers(32)
    assert found.quadratic_s == pytest.approx(32 * LAYER["quadratic"], rel=1e-3)
    assert found.linear_s == pytest.approx(32 * LAYER["linear"] + MODEL["head_linear"], rel=1e-3)
    assert found.fixed_s == pytest.approx(32 * LAYER["fixed"] + MODEL["fixed"] + MODEL["head_fixed"], rel=1e-3)
    for degree in (2, 4):
        assert found.exchange_s[degree] == pytest.approx(32 * LAYER["exchange"][degree], rel=1e-2)
        assert found.latency_s[degree] == pytest.approx(32 * LAYER["latency"][degree], rel=1e-2)


def test_where_no_step_tells_an_exchange_from_compute_it_is_what_it_took_by_itself():
    def seconds(p: Point) -> float:
        """Degree 2 takes half of what degree 1 takes and nothing for its exchange."""
        return true_s(p, 6, 1.0) if p.degree == 1 else true_s(Point(1, p.lengths, p.count), 6, 1.0) / 2

    readings = [Reading(point=p, part=WHOLE, seconds=seconds(p), spread=0.0) for p in fit_points(1024, [1, 2])]
    assert 0.0 < Fit(readings, [1, 2], {2: 7e-7}).for_layers(1).exchange_s[2] <= 6 * 7e-7


def test_rows_that_two_terms_miss_become_tables():
    """A device that short sequences under-use: they take twice the seconds a token."""
    points = fit_points(1024, [1])
    shortest = min(p.alike for p in points if p.alike)
    seconds = {p: true_s(p, 6, 1.0) * (2.0 if p.alike == shortest else 1.0) for p in points}
    fit = Fit([Reading(point=p, part=WHOLE, seconds=s, spread=0.01) for p, s in seconds.items()], [1], {})
    assert max(map(abs, fit.residuals())) > TABLE_AT
    table = fit.tables(1)[1]
    fixed_s = fit.for_layers(1).fixed_s
    for length, per_token in zip(table.lengths, table.seconds_per_token, strict=True):
        point = next(p for p in points if p.alike == length)
        assert per_token * point.tokens + fixed_s == pytest.approx(seconds[point])
    noisy = Fit([Reading(point=p, part=WHOLE, seconds=s, spread=1.0) for p, s in seconds.items()], [1], {})
    assert noisy.tables(1) == {}  # what noise explains is no table


@settings(derandomize=True, deadline=None)
@given(
    tokens=st.integers(1, 5000),
    world_size=st.sampled_from([1, 2, 3, 4, 6, 8]),
    seed=st.integers(0, 9),
    least=st.sampled_from([1, 2]),
)
def test_points_and_held_out_rows_fit_the_ranks_and_their_memory(tokens, world_size, seed, least):
    degrees = [d for d in (1, 2, 4, 8) if least <= d <= world_size]
    mixes = [mix for p in fit_points(tokens, degrees) for mix in p.mixes(world_size)]
    assume(degrees)
    mixes += held_out_mixes(tokens, degrees, world_size, 3, seed)
    for mix in mixes:
        assert sum(degree for degree, _ in mix) <= world_size
        assert all(0 < sum(lengths) <= tokens * degree for degree, lengths in mix)
        assert all(length >= 1 for _, lengths in mix for length in lengths)
    batch = batch_of(mixes, world_size, vocab_size=7, layouts={})
    for mix, micro_batch in zip(mixes, batch.plan.micro_batches, strict=True):
        starts = [group.ranks[0] for group in micro_batch.groups]
        assert all(s % group.sp_degree == 0 for s, group in zip(starts, micro_batch.groups, strict=True))
        held = [tuple(batch.lengths[list(group.sequences)].tolist()) for group in micro_batch.groups]
        assert held == [tuple(lengths) for _, lengths in mix]
