"""Ranks that were not started alike end with one error that names what differs; each trained wrongly before."""

from __future__ import annotations

import json

import pytest
import torch

from fault_runs import one_line
from flexsp.train.alike import _sum_of_bits

SAME = r": it must be the same on all ranks; start all nodes with one configuration and the same packages"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("other_lr", rf"train\.lr=0\.001 on rank 0, 1\.0 on rank 1{SAME}"),
        ("other_every", rf"checkpoint\.every=0 on rank 0, 3 on rank 1{SAME}"),
        ("other_options", rf"train\.optimizer_options\.amsgrad=nothing on rank 0, True on rank 1{SAME}"),
        ("other_kind_of_place", rf"planner\.profile=True on rank 0, False on rank 1{SAME}"),
        ("other_version", rf"version of numpy='[0-9.]+' on rank 0, '1\.0\.7' on rank 1{SAME}"),
        (
            "other_seed",
            r"train\.seed=0: rank 1 would begin with other weights than rank 0, first in model\.embed_tokens\.weight; "
            r"nodes whose processors round differently draw others; save a model once and give it as model\.path",
        ),
        (
            "one_other_weight",
            r"train\.seed=0: rank 1 would begin with .* than rank 0, first in model\.norm\.weight; .*",
        ),
    ],
)
def test_what_differs_is_named_with_its_values_and_ranks(launcher, fault, said):
    ended = launcher.run(fault)
    assert ended.statuses == [2, 2]
    one_line(ended, said)
    assert not (launcher.folder / f"out-{fault}/metrics.jsonl").exists()


def test_another_profile_is_named_by_its_first_field(launcher):
    document = json.loads((launcher.folder / "profile.json").read_text())
    document["compute"]["fixed_s"] *= 2
    (launcher.folder / "profile-of-another-node.json").write_text(json.dumps(document))
    ended = launcher.run("other_profile")
    assert ended.statuses == [2, 2]
    one_line(ended, r"planner\.profile: compute\.fixed_s=\S+ on rank 0, \S+ on rank 1: it must be .* the same file")


def test_where_a_node_keeps_things_may_differ(launcher):
    ended = launcher.run("other_places")
    assert (ended.statuses, ended.err) == ([0, 0], "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 3, 64, 1001])
def test_the_sum_of_bits_sees_one_bit_anywhere(dtype, size):
    values = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(dtype)
    before = _sum_of_bits(values)
    assert before == _sum_of_bits(values.clone()) and 0 <= before < 2**64
    for at in (0, size // 2, size - 1):
        other = values.clone()
        other.view(torch.uint8)[at * dtype.itemsize] ^= 1
        assert _sum_of_bits(other) != before
