"""Named distributions: that they say what their sources say, and that drawing from them is exact and repeatable."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexsp.distributions import Distribution, excess, find, lengths_of, names, summarise

K = 1024


def evenly(name, count=1_000_000):
    """Lengths at evenly spaced levels: what a very large draw tends to."""
    return find(name).quantile((np.arange(count) + 0.5) / count)


def table(**changes):
    fields = {
        "name": "test", "kind": "measured", "description": "d", "source": "s", "unit": "tokens",
        "levels": (0.0, 0.5, 0.75, 1.0), "tokens": (4, 64, 64, 1024),
    }  # fmt: skip
    return Distribution(**{**fields, **changes})


# ---- what the sources say

# Shares of the sequences and of their tokens by length, counted on the data: (most tokens, sequences, tokens). The last
# band is all that is longer.
COUNTED = {
    "wikipedia": [
        (256, 0.417175, 0.05525), (512, 0.20936, 0.07782), (1 * K, 0.162, 0.11656), (2 * K, 0.1078, 0.15312),
        (4 * K, 0.059585, 0.16763), (8 * K, 0.028135, 0.1567), (16 * K, 0.011225, 0.12351), (32 * K, 0.00344, 0.07532),
        (64 * K, 0.000985, 0.04317), (2**40, 0.000295, 0.03092),
    ],
    "source-code": [
        (256, 0.119567, 0.00297), (512, 0.155333, 0.01004), (1 * K, 0.1469, 0.019), (2 * K, 0.1609, 0.04156),
        (4 * K, 0.154733, 0.07901), (8 * K, 0.1256, 0.12673), (16 * K, 0.078233, 0.15714), (32 * K, 0.040567, 0.15854),
        (64 * K, 0.012933, 0.09826), (128 * K, 0.003167, 0.04796), (256 * K, 0.000933, 0.02859),
        (2**40, 0.001133, 0.23022),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", COUNTED)
def test_measured_tables_have_the_datas_share_of_sequences_and_tokens_in_each_band(name):
    lengths, above = evenly(name), 0
    for upto, sequences, tokens in COUNTED[name]:
        inside = (lengths > above) & (lengths <= upto)
        assert inside.mean() == pytest.approx(sequences, rel=0.05), upto
        assert lengths[inside].sum() / lengths.sum() == pytest.approx(tokens, rel=0.05), upto
        above = upto


@pytest.mark.parametrize(
    ("name", "mean", "middle", "longest"),
    [("wikipedia", 1012.27, 346, 269_572), ("source-code", 5715.36, 1432, 4_895_253)],
)
def test_measured_tables_have_the_datas_mean_and_extremes(name, mean, middle, longest):
    lengths = evenly(name)
    assert lengths.mean() == pytest.approx(mean, rel=0.02)
    assert find(name).quantile([0.5, 1.0]).tolist() == [middle, longest]


# Documents by their number of words: (at most that many words, documents), as published; the last band of prolong-64k
# goes to 65,536 there, and its finer histogram ends with 61,919.
DOCUMENTS = {
    "pile": [
        (10, 1_103_032), (50, 9_192_701), (100, 15_691_267), (200, 33_759_245), (500, 49_972_885),
        (1_024, 19_843_834), (2_048, 11_070_542), (4_096, 6_568_231), (8_192, 4_588_038), (12_288, 1_029_929),
        (16_384, 289_899), (24_576, 159_160), (32_768, 45_191), (49_152, 33_943), (65_536, 17_976), (131_072, 30_466),
        (196_608, 7_054), (393_216, 2_992), (524_288, 266), (9_323_147, 422),
    ],
    "prolong-64k": [
        (10, 15_144), (50, 544_051), (100, 2_113_605), (200, 4_353_117), (500, 8_399_774), (1_024, 5_991_350),
        (2_048, 2_590_745), (4_096, 906_066), (8_192, 333_593), (12_288, 82_249), (16_384, 35_834), (24_576, 60_844),
        (32_768, 33_893), (49_152, 51_821), (61_919, 53_497),
    ],
    "prolong-512k": [
        (10, 12_527), (50, 511_697), (100, 1_800_359), (200, 3_756_513), (500, 6_876_068), (1_024, 4_519_766),
        (2_048, 1_849_207), (4_096, 603_531), (8_192, 210_114), (12_288, 48_472), (16_384, 18_762), (24_576, 33_780),
        (32_768, 18_271), (49_152, 32_477), (65_536, 34_829), (131_072, 1_219), (196_608, 2_960), (393_216, 5_292),
        (475_862, 842),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", DOCUMENTS)
def test_counted_histograms_come_back(name):
    distribution = find(name)
    at = dict(zip(distribution.tokens, distribution.levels, strict=True))
    everything, so_far = sum(count for _, count in DOCUMENTS[name]), 0
    for words, count in DOCUMENTS[name]:
        so_far += count
        assert at[words] == pytest.approx(so_far / everything, abs=1e-9), words


def test_github_has_the_published_figures():
    lengths = evenly("github")
    assert (lengths <= 2 * K).mean() == pytest.approx(0.592, abs=0.001)
    assert (lengths > 64 * K).mean() == pytest.approx(0.006, abs=0.0001)
    assert lengths[lengths > 128 * K].sum() / lengths.sum() == pytest.approx(0.162, abs=0.004)
    assert find("github").tokens[-1] == 2 * K * K


def test_commoncrawl_has_the_published_figure_and_lies_between_github_and_wikipedia():
    below = {name: (evenly(name) < 8 * K).mean() for name in ("github", "commoncrawl", "wikipedia")}
    assert (evenly("commoncrawl") <= 2 * K).mean() == pytest.approx(0.699, abs=0.001)
    assert below["github"] < below["commoncrawl"] < 0.96 < below["wikipedia"]


def test_bytescale_has_the_published_figures():
    lengths = evenly("bytescale")
    tokens = lengths.sum()
    assert (lengths <= 4 * K).mean() == pytest.approx(0.8, abs=0.001)
    assert (lengths >= 128 * K).mean() == pytest.approx(0.01, rel=0.002)
    assert lengths[lengths >= 128 * K].sum() / tokens == pytest.approx(0.443, abs=0.003)
    assert (lengths == 2 * K * K).mean() == pytest.approx(0.0005, rel=0.002)
    assert lengths[lengths == 2 * K * K].sum() / tokens == pytest.approx(0.121, abs=0.002)


@pytest.mark.parametrize("name", names())
def test_every_table_says_where_it_is_from_and_reaches_into_the_tail(name):
    distribution = find(name)
    assert distribution.name == name
    assert distribution.description.endswith(".")
    assert "arXiv" in distribution.source or distribution.kind == "measured"
    assert distribution.unit.split()[0].strip(";,") in ("tokens", "words")
    # a thousandth, a ten-thousandth and the last have levels of their own, where lengths are not cut at 64K
    assert sum(level >= 0.999 for level in distribution.levels) >= 4 or distribution.tokens[-1] < 64 * K
    assert (distribution.name + distribution.description + distribution.source + distribution.unit).isascii()


# ---- quantiles and draws


def test_quantiles_are_interpolated_in_the_logarithm():
    assert table().quantile([0, 0.25, 0.5, 0.6, 0.875, 1]).tolist() == [4, 16, 64, 64, 256, 1024]


@settings(derandomize=True, deadline=None)
@given(
    tokens=st.lists(st.integers(1, 10**9), min_size=2, max_size=20).map(sorted),
    levels=st.lists(st.floats(0, 1), min_size=1, max_size=50),
)
def test_quantiles_meet_the_table_stay_inside_it_and_never_descend(tokens, levels):
    distribution = table(levels=tuple(np.linspace(0, 1, len(tokens)).tolist()), tokens=tuple(tokens))
    assert distribution.quantile(distribution.levels).tolist() == tokens
    found = distribution.quantile(sorted(levels)).tolist()
    assert found == sorted(found)
    assert tokens[0] <= found[0] <= found[-1] <= tokens[-1]


@pytest.mark.parametrize("name", names())
def test_draws_are_repeatable_and_follow_the_table(name):
    distribution = find(name)
    drawn = distribution.draw(20_000, 5)
    assert (drawn.dtype, drawn.shape) == (np.int64, (20_000,))
    assert (drawn == distribution.draw(20_000, 5)).all()
    assert (drawn != distribution.draw(20_000, 6)).any()
    # Kolmogorov and Smirnov: beyond 1.95 / sqrt(n) in one of a thousand draws; the seed is fixed
    levels = np.arange(1, 20_000) / 20_000
    share = np.searchsorted(np.sort(drawn), distribution.quantile(levels), side="right") / 20_000
    assert (share >= levels - 0.0138).all()


def test_draws_stay_what_they_were():
    """Reports name a distribution and a seed, and are to be made again from them."""
    assert find("wikipedia").draw(6, 0).tolist() == [532, 154, 62, 44, 1177, 2396]
    assert find("source-code").draw(6, 0).tolist() == [2569, 501, 113, 51, 6043, 12222]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: find("wikpedia"), r"distribution='wikpedia' is unknown; choose one of .*github, .*wikipedia"),
        (lambda: find("github").draw(0, 1), r"count=0 must be at least 1.*github"),
        (lambda: find("github").draw(1, -1), r"seed=-1 must be at least 0"),
        (lambda: table(kind="guessed"), r"kind='guessed' must be one of measured, published"),
        (lambda: table(levels=(0, 0.5, 1)), r"levels=3 must be as many as tokens=4"),
        (lambda: table(levels=(0, 0.5, 0.75, 0.9)), r"go from 0 to 1"),
        (lambda: table(levels=(0, 0.5, 0.5, 1)), r"levels must ascend strictly"),
        (lambda: table(tokens=(0, 1, 2, 3)), r"tokens must be at least 1"),
        (lambda: table(tokens=(4, 3, 5, 6)), r"tokens must be .* never descend"),
    ],
)
def test_errors_name_the_value_and_the_rule(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- a name or a file


def test_a_name_draws_and_a_path_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert (lengths_of("github", column=None, count=9, seed=3) == find("github").draw(9, 3)).all()
    (tmp_path / "l.txt").write_text("5\n17\n")
    (tmp_path / "r.jsonl").write_text('{"n": 5}\n')
    assert lengths_of("l.txt", column=None, count=9, seed=3).tolist() == [5, 17]
    assert lengths_of("r.jsonl", column="n", count=9, seed=3).tolist() == [5]


def test_a_file_of_a_distributions_name_is_not_guessed_about(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pile").mkdir()
    assert len(lengths_of("pile", column=None, count=9, seed=3)) == 9  # a folder holds no lengths
    (tmp_path / "github").write_text("5\n")
    with pytest.raises(ValueError, match=r"lengths='github' is a file here and a distribution too; write ./github"):
        lengths_of("github", column=None, count=9, seed=3)
    assert lengths_of("./github", column=None, count=9, seed=3).tolist() == [5]


def test_what_is_neither_lists_the_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"lengths='git-hub' must be a file or a distribution.*one of .*github"):
        lengths_of("git-hub", column=None, count=9, seed=3)
    with pytest.raises(ValueError, match=r"none.txt: cannot be read"):
        lengths_of("none.txt", column=None, count=9, seed=3)
    with pytest.raises(ValueError, match=r"column='length' must be left out: github is a distribution"):
        lengths_of("github", column="length", count=9, seed=3)


def test_neither_torch_nor_matplotlib_nor_pyarrow_is_imported():
    code = (
        "import sys, flexsp.distributions as d; d.lengths_of('github', column=None, count=3, seed=0); "
        "sys.exit(any(each in sys.modules for each in ('torch', 'matplotlib', 'pyarrow')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- summaries

some_lengths = st.lists(st.one_of(st.integers(1, 40), st.integers(1, 10**7)), min_size=1, max_size=200)


@settings(derandomize=True, deadline=None)
@given(lengths=some_lengths)
def test_bands_hold_every_sequence_once(lengths):
    summary = summarise(np.array(lengths))
    above = 0
    for band in summary.bands:
        inside = [each for each in lengths if band.above_tokens < each <= band.upto_tokens]
        assert (band.above_tokens, band.upto_tokens & (band.upto_tokens - 1)) == (above, 0)
        assert (band.num_sequences, band.num_tokens) == (len(inside), sum(inside))
        assert band.squared_tokens == pytest.approx(sum(each**2 for each in inside))
        above = band.upto_tokens
    assert summary.num_sequences == len(lengths) == sum(band.num_sequences for band in summary.bands)
    assert summary.num_tokens == sum(lengths)
    assert summary.squared_tokens == pytest.approx(sum(each**2 for each in lengths))
    assert summary.bands[0].num_sequences >= len(lengths) / 100
    assert summary.bands[-1].num_sequences > 0
    assert above >= max(lengths)


@settings(derandomize=True, deadline=None)
@given(lengths=some_lengths)
def test_quantiles_of_a_summary_are_the_least_lengths_that_do(lengths):
    for level, tokens in summarise(np.array(lengths)).quantiles.items():
        assert sum(each <= tokens for each in lengths) >= level * len(lengths) * (1 - 1e-12)
        assert sum(each < tokens for each in lengths) < max(level * len(lengths), 1e-9) or tokens == min(lengths)


@settings(derandomize=True, deadline=None)
@given(lengths=some_lengths, limit=st.integers(1, 10**7))
def test_excess_equals_brute_force(lengths, limit):
    over = excess(np.array(lengths), limit)
    longer = [each for each in lengths if each > limit]
    assert (over.max_length, over.num_sequences, over.num_tokens) == (limit, len(longer), sum(longer))
    assert over.tokens_beyond == sum(lengths) - sum(min(each, limit) for each in lengths)


def test_a_summary_by_hand():
    summary = summarise(np.array([1, 2, 3, 4, 5, 8, 9, 1000]))
    assert [(b.upto_tokens, b.num_sequences, b.num_tokens) for b in summary.bands if b.num_sequences] == [
        (1, 1, 1), (2, 1, 2), (4, 2, 7), (8, 2, 13), (16, 1, 9), (1024, 1, 1000),
    ]  # fmt: skip
    assert summary.quantiles == {
        0: 1,
        0.25: 2,
        0.5: 4,
        0.75: 8,
        0.9: 1000,
        0.95: 1000,
        0.99: 1000,
        0.999: 1000,
        1: 1000,
    }
    assert summary.mean_tokens == 129
    assert replace(summary, num_sequences=4).mean_tokens == 258
