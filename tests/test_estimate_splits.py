"""How estimated degrees split into heads x context: traffic by hand, links, what is hidden, and the choice."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

import flexsp
from flexsp.cli.main import main
from flexsp.estimate import estimate_profile, load_cluster, load_model_shape, model_shape
from flexsp.estimate.seconds import exchange_bytes_per_s, exchange_latency_s, kv_repetition
from flexsp.estimate.splits import (
    HIDING_TOKENS,
    WORTH,
    exposed_s,
    hops,
    layouts_of,
    merged_bytes,
    ring_bytes_per_token,
    soonest,
    splits_of,
    step_bytes_per_s,
)
from flexsp.profile import Layout, Profile

MODELS = Path(__file__).parent.parent / "examples" / "models"
LLAMA = load_model_shape(MODELS / "llama-3-8b.json")  # 32 heads, 8 KV heads of 128, 32 layers
H100 = load_cluster("h100").with_devices(64)


def split(ulysses, ring):
    return Layout(ulysses=ulysses, ring=ring)


def of(shape, degree, layout, cluster=H100, rank_tokens=10_000):
    found = splits_of(shape, cluster, degree, "bfloat16", rank_tokens)
    return next(each for each in found if each.layout == split(*layout))


def estimate(shape=LLAMA, cluster=H100, **options):
    return estimate_profile(shape, cluster, **options)


# ---- which splits there are


def test_every_split_whose_ulysses_ranks_divide_the_heads_most_ulysses_first():
    assert layouts_of(32, 12) == [split(4, 3), split(2, 6), split(1, 12)]
    assert layouts_of(32, 64)[0] == split(32, 2)
    assert layouts_of(32, 7) == [split(1, 7)]
    assert layouts_of(52, 8) == [split(4, 2), split(2, 4), split(1, 8)]


# ---- traffic


@pytest.mark.parametrize(("ulysses", "ring"), [(1, 2), (4, 3), (8, 2), (16, 4), (32, 2)])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_a_ring_sends_what_the_formula_says(ulysses, ring, itemsize):
    # by steps: every rank of the ring sends U ranks' tokens of its lcm(K, U) / U KV heads; U such rings; fp32 gradients
    tokens, kv_heads = 12 * 64, math.lcm(8, ulysses) // ulysses
    keys = tokens // ring * 2 * kv_heads * 128
    sent = 0
    for _ in range(ring):  # ranks of a ring
        sent += (ring - 1) * keys * itemsize  # forward
        sent += (ring - 1) * keys * itemsize + ring * keys * 4  # backward
    assert ring_bytes_per_token(LLAMA, split(ulysses, ring), itemsize) * tokens == ulysses * sent * LLAMA.num_layers


def test_ulysses_alone_sends_nothing_around():
    assert ring_bytes_per_token(LLAMA, split(8, 1), 2) == 0
    assert of(LLAMA, 8, (8, 1)).ring_s == 0


def test_few_kv_heads_make_a_light_ring_until_ulysses_repeats_them():
    eight, sixteen, full = (ring_bytes_per_token(LLAMA, split(u, 2), 2) for u in (8, 16, 32))
    assert (sixteen, full) == (2 * eight, 4 * eight)
    assert ring_bytes_per_token(LLAMA, split(1, 2), 2) == eight
    many = replace(LLAMA, num_kv_heads=32)
    assert ring_bytes_per_token(many, split(8, 2), 2) == full
    # so of more KV heads less can be hidden, and more Ulysses pays
    assert of(many, 64, (8, 8)).hidden_s / of(many, 64, (8, 8)).ring_s < 0.5
    assert of(LLAMA, 64, (8, 8)).hidden_s / of(LLAMA, 64, (8, 8)).ring_s > 0.8


def test_parts_are_merged_once_a_step():
    shape = model_shape({
        "model_type": "llama", "hidden_size": 8, "intermediate_size": 20, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50, "hidden_act": "silu",
    })  # fmt: skip
    # head_dim 2; 2.5 meetings of 8 query numbers at 36 bytes; of 8 of keys and values 10 each, 2 zeroings, 1 joining
    assert merged_bytes(shape, split(1, 2), 2) == 3 * (2.5 * 8 * 36 + 8 * (2.5 * 10 + 2 * 4 + 12))


# ---- links


def test_ring_steps_are_as_slow_as_their_slowest_hop():
    inside, across = 450e9 * 0.8, 50e9 * 0.87
    assert hops(H100, split(1, 8)) == {False}
    assert hops(H100, split(4, 4)) == {False, True}  # ranks 0 4 8 12 in nodes 0 0 1 1
    assert hops(H100, split(8, 2)) == {True}
    assert step_bytes_per_s(H100, split(4, 2)) == pytest.approx(inside)
    assert step_bytes_per_s(H100, split(4, 4)) == step_bytes_per_s(H100, split(8, 2)) == pytest.approx(across)
    mesh = load_cluster("mi300x")
    assert step_bytes_per_s(mesh, split(1, 8)) == pytest.approx(448e9 / 7 * 0.8)  # one link to the next device


def test_ulysses_of_a_hybrid_stays_in_its_node_where_it_fits():
    assert exchange_bytes_per_s(H100, 8, 4) == exchange_bytes_per_s(H100, 8)
    assert exchange_bytes_per_s(H100, 16, 2) == exchange_bytes_per_s(H100, 16)
    assert exchange_latency_s(LLAMA, H100, 8, 4) == exchange_latency_s(LLAMA, H100, 8)
    # of ranks 0-5 | 6-11 the second six lie in two nodes: two of them with one device, four with three others
    six = 1 / exchange_bytes_per_s(H100, 6, 2) - 1 / exchange_bytes_per_s(H100, 6)
    assert six == pytest.approx(4 / 6 / 40e9 + (1 - 5) / 6 / (450e9 * 0.66))
    assert exchange_latency_s(LLAMA, H100, 6, 2) > exchange_latency_s(LLAMA, H100, 6)


@pytest.mark.parametrize("name", ["h100", "a100-80", "b200"])
def test_a_ring_costs_more_across_nodes_than_inside_one(name):
    cluster = load_cluster(name).with_devices(64)
    one_node = replace(cluster, devices_per_node=64)
    for layout in ((4, 4), (8, 2), (8, 8), (1, 16)):
        degree = layout[0] * layout[1]
        near, far = (of(LLAMA, degree, layout, each) for each in (one_node, cluster))
        assert near.ring_s < far.ring_s
        assert near.bandwidth_bytes_per_s > far.bandwidth_bytes_per_s
        assert near.latency_s < far.latency_s
    # in one fast node all heads are traded; across nodes Ulysses stays inside and the ring crosses
    assert soonest(splits_of(LLAMA, one_node, 16, "bfloat16", 10_000)).layout == split(16, 1)
    assert soonest(splits_of(LLAMA, cluster, 16, "bfloat16", 10_000)).layout == split(8, 2)


# ---- what attention hides


def test_what_is_exposed_by_hand():
    # nothing to hide behind: 3 forward and 3 backward steps of keys, 4 of gradients
    assert exposed_s(1.0, 2.0, 0.0, 4) == 6 * 1.0 + 4 * 2.0
    # attention without end: the last gradients alone
    assert exposed_s(1.0, 2.0, 1e9, 4) == 2.0
    # 28 s of attention on 4 ranks: 2 s a step forward, 5 s backward
    assert exposed_s(3.0, 6.0, 28.0, 4) == pytest.approx(3 * (3 - 2) + 0 + 2 * (9 - 5) + (6 - 5) + 6)
    assert exposed_s(3.0, 6.0, 0.0, 2) == 3 + 3 + 6 + 6


def test_longer_sequences_hide_more_up_to_the_length_that_the_profile_says():
    hidden = [of(LLAMA, 64, (16, 4), rank_tokens=tokens).hidden_s for tokens in (1, 64, 256, 512, 5000)]
    assert hidden[0] < hidden[1] < hidden[2] < hidden[3] == hidden[4]
    assert of(LLAMA, 64, (16, 4), rank_tokens=64).hiding_tokens == 64 * 64
    assert of(LLAMA, 64, (16, 4), rank_tokens=5000).hiding_tokens == HIDING_TOKENS


def test_what_a_split_costs_is_the_sum_of_its_parts():
    found = of(LLAMA, 16, (8, 2))
    traded = LLAMA.exchange_bytes_per_token(2) * kv_repetition(LLAMA, 8) / exchange_bytes_per_s(H100, 8, 2)
    merged = merged_bytes(LLAMA, split(8, 2), 2) / 3.35e12
    assert found.ring_s == pytest.approx(ring_bytes_per_token(LLAMA, split(8, 2), 2) / (50e9 * 0.87))
    exchange = traded + found.ring_s - found.hidden_s + merged
    assert LLAMA.exchange_bytes_per_token(2) / found.bandwidth_bytes_per_s == pytest.approx(exchange)
    # four all-to-alls inside a node, and four steps to another one, a layer
    assert found.latency_s == pytest.approx(32 * (4 * 25e-6 + 4 * 35e-6))


# ---- the choice


def test_the_most_ulysses_is_taken_of_those_about_as_soon():
    most, middle, least = splits_of(LLAMA, H100, 12, "bfloat16", 10_000)
    about = replace(middle, token_s=most.token_s * (1 - WORTH / 2))
    sooner = replace(least, token_s=most.token_s * (1 - 2 * WORTH))
    assert soonest([most, about]) == most
    assert soonest([most, about, sooner]) == sooner
    assert soonest([most, about, replace(sooner, token_s=about.token_s * 0.98)]) == about


def test_degrees_are_powers_of_two_whatever_the_heads():
    profile = estimate(load_model_shape(MODELS / "gpt-30b.json"))  # 52 heads
    assert profile.sp_degrees == (1, 2, 4, 8, 16, 32, 64)
    assert set(profile.layouts) == {8, 16, 32, 64}
    assert profile.layouts[8] == split(4, 2)
    assert estimate(cluster=load_cluster("h100"), num_devices=6).sp_degrees == (1, 2, 4)


def test_a_degree_beyond_the_heads_or_beside_them_has_a_ring():
    profile = estimate(sp_degrees=[64, 12, 1, 7, 8])
    assert profile.sp_degrees == (1, 7, 8, 12, 64)
    assert profile.layouts[12] == split(4, 3)
    assert profile.layouts[7] == split(1, 7)
    assert profile.layouts[64].ulysses <= 32
    assert 8 not in profile.layouts
    pure = exchange_bytes_per_s(H100, 8) / kv_repetition(LLAMA, 8)
    assert profile.all_to_all.bandwidth_bytes_per_s[8] == pure


def test_a_profile_says_what_was_tried_and_what_is_hidden_at_which_length():
    profile = estimate(sp_degrees=[1, 8, 64])
    told = profile.provenance
    assert list(told["splits_s_per_token"]["64"]) == ["32x2", "16x4", "8x8", "4x16", "2x32", "1x64"]
    assert list(told["ring_hidden"]) == ["64"]
    assert told["ring_hidden"]["64"]["tokens"] == HIDING_TOKENS
    assert 0.5 < told["ring_hidden"]["64"]["share"] < 1
    assert f"attention of sequences of {HIDING_TOKENS} tokens" in told["assumptions"][-1]
    assert "ulysses x ring" in told["fields"]["layouts"]
    assert "ring" in told["fields"]["all_to_all.bandwidth_bytes_per_s"]
    without = estimate(sp_degrees=[1, 8]).provenance
    assert "ring_hidden" not in without
    assert without["assumptions"] == told["assumptions"][:-1]


def test_small_memory_says_the_lengths_that_its_groups_hold():
    told = estimate(sp_degrees=[1, 3, 64], memory_fraction=0.11).provenance
    lengths = {degree: each["tokens"] for degree, each in told["ring_hidden"].items()}
    assert lengths["3"] < lengths["64"] <= HIDING_TOKENS
    assert f"of {lengths['3']} to {lengths['64']} (ring_hidden" in told["assumptions"][-1]


# ---- where the profile goes


def test_layouts_are_in_the_file_and_plans_use_such_degrees(tmp_path, capsys):
    path = tmp_path / "p.json"
    options = ["--num-devices", "64", "--sp-degrees", "1,2,4,8,12,64", "--output", str(path)]
    assert main(["estimate", "--model", str(MODELS / "llama-3-8b.json"), "--cluster", "h100", *options]) == 0
    printed = capsys.readouterr().out
    assert "12 (4x3)" in printed
    assert "64 (8x8)" in printed
    profile = Profile.load(path)
    assert profile.layouts == {12: split(4, 3), 64: split(8, 8)}
    assert profile.to_json() == estimate(sp_degrees=[1, 2, 4, 8, 12, 64], date=profile.provenance["date"]).to_json()

    # without a policy 8 devices hold 101,685 tokens, 12 hold 152,528
    plain = replace(profile, memory=replace(profile.memory, policies={}))
    lengths = [110_000, 110_000, 9_000, 4_000, 700]
    for longest, usable in ((500_000, profile.sp_degrees), (110_000, profile.sp_degrees[:-1])):
        used = replace(plain, sp_degrees=usable)
        plan = flexsp.plan([longest, *lengths], used)
        assert flexsp.violations(plan, [longest, *lengths], used) == []
        assert usable[-1] in {group.sp_degree for each in plan.micro_batches for group in each.groups}

    (tmp_path / "lengths.txt").write_text("\n".join(map(str, lengths)))
    command = ["--profile", str(path), "--batch-size", "5"]
    assert main(["simulate", str(tmp_path / "lengths.txt"), *command]) == 0
    assert "flex" in capsys.readouterr().out
    assert main(["show", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "64 (8x8)" in shown
    assert max(map(len, shown.splitlines()[:20])) <= 80
