"""Bad input made by machine, a few hundred of each kind; benchmarks/fuzz.py tries as many as wanted."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexsp import jsonfields as jf
from flexsp.plans import Plan
from flexsp.profile import Profile
from fuzzing import mutate, oracle, schema
from fuzzing.attempt import Broken, command, one_line
from fuzzing.kinds_documents import LENGTHS, PlanKind, fault_of, rich_profile
from fuzzing.runner import run_kind
from fuzzing.worker import KINDS

INPUTS = {"profile": 200, "plan": 400, "plan log": 300, "lengths": 400, "cluster": 250, "model": 250, "config": 200,
          "flags": 200, "corpus": 200, "run folder": 200, "checkpoint": 25}  # fmt: skip
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("kind", KINDS)
def test_every_input_is_refused_in_a_line_or_taken_for_what_it_says(kind, tmp_path):
    count = run_kind(kind, INPUTS[kind], seed=7, folder=tmp_path)
    assert not count.failures, json.dumps(count.failures[:3], indent=1)
    assert count.tried == INPUTS[kind] and count.refused > count.tried / 10 and count.accepted > count.tried / 20


# ---- the machine itself finds what it is to find


def test_a_reader_that_accepts_everything_is_found_out(tmp_path, monkeypatch):
    """A deliberate fault: sequences may be in two groups."""
    monkeypatch.setattr("flexsp.cli.check.violations", lambda *_: [])
    kind, broken = PlanKind(tmp_path), 0
    for index in range(60):
        try:
            kind.try_one(mutate.Random(f"plan/1/{index}"))
        except Broken:
            broken += 1
    assert broken > 10


@pytest.mark.parametrize("text", ["a\nb", "", "Traceback", "wrong"])
def test_what_is_no_good_error_is_broken(text):
    with pytest.raises(Broken):
        one_line(text, ["file.json"])


def test_a_worker_that_hangs_dies_or_eats_memory_is_a_failure_of_the_input_that_it_began(tmp_path):
    count = run_kind("fuzzing.kinds_deadly:Deadly", 6, seed=0, folder=tmp_path, limit_s=2)
    said = [str(failure["failed"]) for failure in count.failures]
    assert [re.sub("Unable.*", "", each) for each in said] == [
        "the process ended with -6", "took too long", "MemoryError: ", "KeyError: 'x'",
    ]  # fmt: skip
    assert (count.tried, count.accepted, count.refused) == (6, 1, 1)
    assert [failure["index"] for failure in count.failures] == [1, 2, 3, 4]


# ---- the JSON formats, by Hypothesis

NUMBERS = st.floats(0, 1e6) | st.integers(0, 2**40)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


@settings(derandomize=True, deadline=None, max_examples=150)
@given(data=st.data(), changes=st.integers(0, 2))
@pytest.mark.parametrize("kind", ["plan", "profile"])
def test_a_document_that_breaks_its_schema_is_refused_and_another_stays_as_it_is(kind, data, changes):
    document = rich_profile(4) if kind == "profile" else json.loads(json.dumps(PLAN))
    for _ in range(changes):
        path = data.draw(st.sampled_from(mutate.paths(document)))
        mutate.at(document, path[:-1])[path[-1]] = data.draw(JSON)
        if not mutate.paths(document):
            return
    read, expected = (Profile, schema.PROFILE) if kind == "profile" else (Plan, schema.PLAN)
    try:
        found = read.from_json(jf.as_object(jf.parse(json.dumps(document), "made.json"), "made.json"), "made.json")
    except ValueError as error:
        one_line(str(error), ["made.json"])
        assert changes
        return
    assert schema.fault(document, expected) is None
    assert read.from_json(json.loads(json.dumps(found.to_json(), allow_nan=False))) == found


PLAN = {
    "format": "flexsp-plan/1", "num_devices": 4, "status": "feasible",
    "micro_batches": [
        {"groups": [{"ranks": [0, 1, 2, 3], "sequences": [0]}], "policy": None},
        {"groups": [{"ranks": [0, 1], "sequences": [1, 2]}, {"ranks": [2], "sequences": [3, 4, 5, 6, 7]}]},
    ],
}  # fmt: skip


# ---- the oracle, against plans that are told apart by hand


@pytest.mark.parametrize(
    ("ranks", "sequences", "legal"),
    [
        ([2, 3], [3, 4, 5, 6, 7], True),
        ([1, 2], [3, 4, 5, 6, 7], False),
        ([2], [3, 4, 5, 6], False),
        ([2], [3, 4, 5, 6, 7, 7], False),
        ([2, 4], [3, 4, 5, 6, 7], False),
        ([], [3, 4, 5, 6, 7], False),
    ],
)
def test_the_independent_check_and_flexsp_check_know_the_rules(tmp_path, ranks, sequences, legal):
    plan = json.loads(json.dumps(PLAN))
    plan["micro_batches"][1]["groups"][1] = {"ranks": ranks, "sequences": sequences}
    assert oracle.legal(LENGTHS, rich_profile(4), plan) is legal
    files = [tmp_path / name for name in ("lengths.txt", "profile.json", "plan.json")]
    for path, text in zip(files, ("\n".join(map(str, LENGTHS)), rich_profile(4), plan), strict=True):
        path.write_text(text if isinstance(text, str) else json.dumps(text))
    assert command(["check", *map(str, files)], [str(files[2])]).status == int(not legal)


def test_the_schemas_fit_what_flexsp_writes():
    assert fault_of(json.dumps(rich_profile(16)).encode(), schema.PROFILE) is None
    assert fault_of(json.dumps(PLAN).encode(), schema.PLAN) is None
    assert fault_of(b'{"format": 1, "format": 1}', schema.PLAN) == "a key is there twice"


# ---- what the documentation says


def test_the_documented_counts_are_those_of_the_committed_run():
    result = json.loads((ROOT / "benchmarks/results/fuzz.json").read_text())
    page = (ROOT / "docs/reliability.md").read_text()
    assert set(result["kinds"]) == set(KINDS) and not result["failures"]
    for kind, count in result["kinds"].items():
        row = next(line for line in page.splitlines() if line.startswith(f"| {kind} |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")]
        assert cells[-4:] == [f"{count[key]:,}" for key in ("tried", "refused", "accepted", "failed")]
    assert f"| **all** | | **{result['tried']:,}** |" in page
    assert result["tried"] == sum(count["tried"] for count in result["kinds"].values())
