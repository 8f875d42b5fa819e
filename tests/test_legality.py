"""Every rule of a legal plan is said when it is broken, and all of them at once."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import flexsp
from flexsp import Group, MicroBatch, Plan, violations
from profiles import profile

LENGTHS = [90, 60, 30, 20, 10, 5]
LEGAL = [[((0, 1), (0, 1)), ((2,), (2,)), ((3,), (3,))], [((0, 1, 2, 3), (4, 5))]]


def make(micro_batches, num_devices=4, **fields):
    return Plan(
        num_devices=num_devices,
        micro_batches=tuple(
            MicroBatch(groups=tuple(Group(ranks=tuple(r), sequences=tuple(s)) for r, s in groups))
            for groups in micro_batches
        ),
        **fields,
    )


def test_a_legal_plan_has_no_violation():
    assert violations(make(LEGAL), LENGTHS, profile()) == []


ILLEGAL = {
    "missing": ([LEGAL[0], [((0, 1, 2, 3), (4,))]], "1 of 6 sequences are in no group, the first is 5"),
    "twice": ([LEGAL[0], [((0, 1, 2, 3), (4, 5, 0))]], "sequence 0 is also in micro-batch 0 group 0"),
    "unknown sequence": ([LEGAL[0], [((0, 1, 2, 3), (4, 5, 6))]], "no sequence has index 6"),
    "negative sequence": ([LEGAL[0], [((0, 1, 2, 3), (4, 5, -1))]], "no sequence has index -1"),
    "empty micro-batch": ([*LEGAL, []], "micro-batch 2: no group"),
    "empty group": ([LEGAL[0], [((0, 1), (4, 5)), ((2, 3), ())]], "micro-batch 1 group 1: no sequence"),
    "shared rank": ([LEGAL[0], [((0, 1), (4,)), ((1,), (5,))]], "rank 1 is also in group 0"),
    "memory": ([[((0,), (0, 2)), ((1,), (1,)), ((2,), (3, 4, 5))]], "120 tokens on 1 ranks need 2200 bytes a device"),
    "gap in ranks": ([LEGAL[0], [((0, 2), (4, 5))]], r"ranks [0, 2] are not consecutive"),
    "descending ranks": ([LEGAL[0], [((1, 0), (4, 5))]], r"ranks [1, 0] are not consecutive"),
    "unaligned": ([LEGAL[0], [((1, 2), (4, 5))]], "degree 2 starts at place 1 of its node"),
    "beyond the devices": ([LEGAL[0], [((4,), (4, 5))]], "not all within 0..3"),
    "degree": ([LEGAL[0], [((0, 1, 2), (4, 5))]], "degree 3 is not in sp_degrees [1, 2, 4]"),
    "no ranks": ([LEGAL[0], [((), (4, 5))]], "degree 0 is not in sp_degrees"),
    "nothing": ([], "6 of 6 sequences are in no group"),
}


@pytest.mark.parametrize(("micro_batches", "message"), ILLEGAL.values(), ids=ILLEGAL.keys())
def test_each_rule(micro_batches, message):
    faults = violations(make(micro_batches), LENGTHS, profile())
    assert len(faults) == 1
    assert message in faults[0]


def test_all_faults_are_said_at_once():
    faults = violations(make([[((0, 2), (0, 0)), ((2,), (9,))]]), LENGTHS, profile())
    assert len(faults) == 5  # placement, twice, shared rank, unknown, missing


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (range(6, 10), "cross a node of 8 although 4 fit into one"),
        (range(4, 20), "degree 16 is larger than a node and does not start at a node's first rank"),
        (range(8, 24), "degree 16 starts at rank 8, not at a multiple of 16"),
        (range(2, 6), "degree 4 starts at place 2 of its node"),
    ],
)
def test_placement_on_nodes(ranks, message):
    p = profile(32, devices_per_node=8)
    (fault,) = violations(make([[(ranks, range(6))]], num_devices=32), LENGTHS, p)
    assert message in fault


def test_what_a_plan_states_of_itself_must_be_true():
    p = profile()
    good = flexsp.plan(LENGTHS, p)
    assert violations(good, LENGTHS, p) == []
    (fault,) = violations(replace(good, predicted_s=good.predicted_s * 1.01), LENGTHS, p)
    assert "predicted_s" in fault
    assert any("made for another batch" in f for f in violations(good, LENGTHS[::-1], p))
    assert any("num_devices=4 is not the profile's" in f for f in violations(good, LENGTHS, profile(8)))
    unknown = replace(good.micro_batches[0], policy="recompute")
    assert any("policy='recompute'" in f for f in violations(replace(good, micro_batches=(unknown,)), LENGTHS, p))


def test_a_plan_file_is_kept_as_it_was(tmp_path):
    p = profile()
    made = flexsp.plan(LENGTHS, p)
    document = {**made.to_json(), "sync": "micro-batch"}
    (tmp_path / "a.json").write_text(json.dumps(document))
    Plan.load(tmp_path / "a.json").save(tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text()) == document


def test_a_hand_written_plan_needs_little(tmp_path):
    groups = [{"ranks": [0], "sequences": [0]}]
    document = {"format": "flexsp-plan/1", "num_devices": 4, "micro_batches": [{"groups": groups}]}
    (tmp_path / "a.json").write_text(json.dumps(document))
    assert violations(Plan.load(tmp_path / "a.json"), [50], profile()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "flexsp-plan/9"}, r"format='flexsp-plan/9' must be 'flexsp-plan/1'"),
        ({"status": "done"}, r"status='done' must be one of optimal, feasible, infeasible, unknown"),
        ({"micro_batches": {}}, r"micro_batches=\{\} must be a JSON list"),
        ({"micro_batches": [{"groups": [{"ranks": [0]}]}]}, r"groups\[0\]: the field 'sequences' is missing"),
        ({"micro_batches": [{"groups": [{"ranks": ["0"], "sequences": []}]}]}, r"ranks='0' must be an integer"),
        ({"status": "infeasible"}, r"status='infeasible' needs a reason and no micro_batches"),
    ],
)
def test_a_malformed_plan_is_named_with_its_field(tmp_path, changes, message):
    document = {**flexsp.plan(LENGTHS, profile()).to_json(), **changes}
    (tmp_path / "a.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message) as raised:
        Plan.load(tmp_path / "a.json")
    assert "a.json" in str(raised.value)


def test_a_plan_prints_its_degrees():
    one = ((0,), (0,))
    text = str(make([[((0, 1), (0,)), ((2,), (1,)), ((3,), (2,))], [one], [one], [one], [((0, 1, 2, 3), (0,))]]))
    assert text == "<2,1,1> 3 x <1> <4>"
    assert str(make([[((r,), (0,)) for r in range(9)] + [((9, 10), (1,))]], num_devices=16)) == "<2,1x9>"
