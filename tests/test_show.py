from __future__ import annotations

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexsp.cli.main import main
from flexsp.profile import AllToAll, Compute, Memory, Policy, Profile
from flexsp.simulate.crossovers import (
    LEAST_SAVING,
    MOST_TOKENS,
    cost,
    crossovers,
    formula_over_table,
    least_cost,
    longest_tokens,
    policies,
    powers_of_four,
)
from flexsp.simulate.pictures.profile import draw, save_figure
from profiles import profile, profile_json

RECOMPUTE = {"recompute": {"activation_bytes_per_token": 2, "compute_factor": 1.5}}


TABLES = {
    "1": {"lengths": [8, 64], "seconds_per_token": [0.00324, 0.00164]},
    "2": {"lengths": [8, 64], "seconds_per_token": [0.0015, 0.0014]},
}
"""At degree 1 thrice the formula at 8 tokens and the formula's at 64."""


def with_policies(named=RECOMPUTE, **changes):
    document = profile_json(**changes)
    document["memory"]["policies"] = named
    return Profile.from_json(document)


def pays(p, policy=None):
    return [found.pays_from_tokens for found in crossovers(p, policy)]


# ---- costs and crossovers by hand


def test_costs_are_those_of_the_formula_by_hand():
    found = cost(profile(), 2, 50)
    # (1e-5 * 2500 + 1e-3 * 50) / 2 of compute, 1000 * 50 / (2 * 2e6) of exchange and 0.004 of latency
    compute_s, exchange_s = 0.0375, 0.0125 + 0.004
    assert found.token_s == pytest.approx((compute_s + exchange_s) / 50)
    assert found.token_device_s == pytest.approx(2 * (compute_s + exchange_s) / 50)
    assert found.exchange_share == pytest.approx(exchange_s / (compute_s + exchange_s))
    assert cost(profile(), 1, 50).exchange_share == 0


def test_crossovers_by_hand():
    # Degree 2 saves 5e-6 s^2 + 5e-4 s - 2.5e-4 s - 0.004 against degree 1: nothing up to s = 12.7.
    # Degree 4 saves 2.5e-6 s^2 + 2.5e-4 s - 0 - 0.004 against degree 2: nothing up to s = 14.03,
    # and 7.5e-6 s^2 + 7.5e-4 s - 2.5e-4 s - 0.008 against degree 1: nothing up to s = 13.3.
    found = crossovers(profile())
    assert [each.sp_degree for each in found] == [1, 2, 4]
    assert [each.pays_from_tokens for each in found] == [1, 13, 15]
    assert [each.needed_from_tokens for each in found] == [1, 101, 201]
    assert [each.capacity_tokens for each in found] == [100, 200, 400]


def test_a_policy_holds_more_and_pays_sooner_because_it_computes_more():
    p = with_policies()
    found = crossovers(p, "recompute")
    assert [each.capacity_tokens for each in found] == [500, 1000, 2000]
    assert [each.needed_from_tokens for each in found] == [1, 501, 1001]
    # 1.5 times the compute: 7.5e-6 s^2 + 5e-4 s - 0.004 is 0 at 7.2; 3.75e-6 s^2 + 3.75e-4 s - 0.004 at 9.7
    assert [each.pays_from_tokens for each in found] == [1, 8, 10]
    assert longest_tokens(p) == 2000


def test_what_the_plain_policy_cannot_hold_is_costed_under_the_soonest_that_can():
    named = {**RECOMPUTE, "offload": {"activation_bytes_per_token": 1, "compute_factor": 3.0}}
    p = with_policies(named)
    assert policies(p) == (None, "recompute", "offload")
    assert [least_cost(p, 1, tokens).policy for tokens in (100, 101, 500, 501, 1000)] == [
        None, "recompute", "recompute", "offload", "offload",
    ]  # fmt: skip
    assert least_cost(p, 1, 1001) is None
    assert cost(p, 1, 101) is None
    assert least_cost(p, 1, 500).token_s == pytest.approx(1.5 * (1e-5 * 500 + 1e-3))


def test_a_cost_is_the_tables_where_the_degree_has_one():
    p = profile(tables=TABLES)
    found = cost(p, 1, 8)
    assert (found.token_s, found.table_token_s, found.token_device_s) == pytest.approx((0.00108, 0.00324, 0.00324))
    assert cost(p, 2, 8).token_device_s == pytest.approx(2 * 0.0015)
    assert cost(p, 4, 8).table_token_s is None
    assert cost(p, 4, 8).best_token_s == cost(p, 4, 8).token_s
    assert crossovers(p) == crossovers(profile())  # they are the formula's


def test_how_far_the_formula_is_off_is_said_of_full_rows():
    p = profile(tables=TABLES)
    assert formula_over_table(p, 1) == pytest.approx({8: 1 / 3, 64: 1.0})
    # half of 0.00108 and 0.00164, 0.00025 of exchange, and 0.004 of latency over 64 tokens
    assert formula_over_table(p, 2) == pytest.approx({8: 0.0008525 / 0.0015, 64: 0.0011325 / 0.0014})
    document = profile_json(tables={"1": {"lengths": [1, 2**62], "seconds_per_token": [0, 1e20]}})
    assert list(formula_over_table(Profile.from_json(document), 1)) == [2**62]  # of nothing there is no ratio


def costing(quadratic_s=0.0, linear_s=0.0, bandwidth=4e6, latency_s=0.0, bytes_per_token=1000):
    """Degrees 1 and 2; half of `linear_s` saves what `bytes_per_token / (2 * bandwidth)` costs."""
    return profile(
        2,
        compute={"quadratic_s": quadratic_s, "linear_s": linear_s, "fixed_s": 0.0},
        all_to_all={
            "bytes_per_token": bytes_per_token,
            "bandwidth_bytes_per_s": {"2": bandwidth},
            "latency_s": {"2": latency_s},
        },
    )


@pytest.mark.parametrize(
    ("p", "expected"),
    [
        (costing(linear_s=1e-3), 1),  # always: it saves on every token
        (costing(linear_s=1e-4), None),  # never: it loses on every token
        (costing(linear_s=2.5e-4), None),  # as soon as the lower degree
        (costing(linear_s=2.5e-4, latency_s=1e-6), None),
        (costing(linear_s=1e-3, latency_s=0.375), 1001),  # 3.75e-4 s saved on each token; equal at 1000
        (costing(quadratic_s=1e-9, bytes_per_token=0), 1),
        (costing(quadratic_s=1e-8), 25_001),  # 5e-9 s saves what 1.25e-4 costs at 25,000
        (costing(), None),
    ],
)
def test_always_and_never(p, expected):
    assert pays(p) == [1, expected]


def between(quadratic_s, dearer_s, later_s):
    """Degrees 2 and 4: 4 saves quadratic_s / 4 * s^2 - dearer_s * s + later_s seconds on s tokens."""
    return profile(
        sp_degrees=[2, 4],
        compute={"quadratic_s": quadratic_s, "linear_s": 0.0, "fixed_s": 0.0},
        all_to_all={
            "bytes_per_token": 1.0,
            "bandwidth_bytes_per_s": {"2": 1e20, "4": 1 / (4 * dearer_s)},
            "latency_s": {"2": later_s},
        },
    )


@pytest.mark.parametrize(
    ("p", "at", "expected"),
    [
        (between(1e-7, 2.5e-4, 0.01), [(10, True), (1000, False), (20_000, True)], 9960),  # equal at 40.2 and 9959.8
        (between(4e-3, 0.0218, 0.11872), [(10, True), (11, False), (12, True)], 12),  # equal at 10.6 and 11.2
        (between(4e-3, 0.0218, 0.12), [(10, True), (11, True), (12, True)], 1),  # always more than nothing
        (between(0.0, 1e-4, 0.01), [(10, True), (1000, False), (10**9, False)], None),
    ],
)
def test_a_degree_that_is_sooner_at_first_and_then_not_pays_only_after_that(p, at, expected):
    assert [(tokens, p.group_s(4, [tokens]) < p.group_s(2, [tokens])) for tokens, _ in at] == at
    assert pays(p) == [1, expected]


def test_degrees_that_rounding_alone_tells_apart_do_not_cross():
    p = profile(
        3,
        sp_degrees=[1, 3],
        compute={"quadratic_s": 0.0, "linear_s": 2e-4, "fixed_s": 0.0},
        all_to_all={"bytes_per_token": 1000, "bandwidth_bytes_per_s": {"3": 1000 / 4e-4}, "latency_s": {}},
    )
    assert {p.group_s(3, [tokens]) < p.group_s(1, [tokens]) for tokens in range(1, 1000)} == {False, True}
    assert pays(p) == [1, None]


def test_a_degree_that_holds_no_more_than_a_lower_one_is_never_needed():
    p = profile(2, memory={"memory_bytes": 4, "model_state_bytes": 0, "activation_bytes_per_token": 10})
    assert [(found.capacity_tokens, found.needed_from_tokens) for found in crossovers(p)] == [(0, None), (0, None)]
    assert powers_of_four(p) == (1024,)


def test_default_lengths_are_powers_of_four_that_fit():
    assert powers_of_four(profile(capacity=5000)) == (1024, 4096, 16384)
    assert powers_of_four(profile(capacity=100)) == (1, 4, 16, 64, 256)


# ---- crossovers against brute force

seconds = st.sampled_from([0.0, 1e-6, 1e-5, 3e-5, 1e-4, 1e-3])


@st.composite
def generated(draw):
    """Profiles whose degrees cross anywhere: each has a bandwidth and a latency of its own."""
    degrees = tuple(sorted(draw(st.sets(st.sampled_from([1, 2, 3, 4, 6, 8]), min_size=1))))
    above_one = [d for d in degrees if d > 1]
    room = draw(st.sampled_from([0.4, 4, 33.3]))
    return Profile(
        name="generated",
        num_devices=8,
        devices_per_node=4,
        sp_degrees=degrees,
        compute=Compute(
            quadratic_s=draw(st.sampled_from([0.0, 1e-8, 1e-7, 1e-6])), linear_s=draw(seconds), fixed_s=0.1
        ),
        all_to_all=AllToAll(
            bytes_per_token=draw(st.sampled_from([0.0, 1.0])),
            bandwidth_bytes_per_s={d: 1 / (d * draw(st.sampled_from([1e-6, 1e-5, 2.5e-5, 1e-4]))) for d in above_one},
            latency_s={d: draw(st.sampled_from([0.0, 1e-4, 0.002, 0.01, 0.05])) for d in above_one},
        ),
        memory=Memory(
            memory_bytes=10 + room,
            model_state_bytes=10,
            activation_bytes_per_token=1,
            policies={"recompute": Policy(activation_bytes_per_token=0.25, compute_factor=1.4)},
        ),
    )


@settings(derandomize=True, deadline=None)
@given(p=generated(), policy=st.sampled_from([None, "recompute"]))
def test_crossovers_equal_brute_force(p, policy):
    longest = 1500

    def sooner(degree, tokens):
        lower_s = [p.group_s(d, [tokens], policy) for d in p.sp_degrees if d < degree]
        return all(p.group_s(degree, [tokens], policy) < s * (1 - LEAST_SAVING) for s in lower_s)

    for found in crossovers(p, policy):
        degree, first = found.sp_degree, found.pays_from_tokens
        if first is not None and first <= longest:
            late = [tokens for tokens in range(1, longest + 1) if not sooner(degree, tokens)]
            assert first == max(late, default=0) + 1
        elif first is not None:
            assert not sooner(degree, first - 1)
            assert all(sooner(degree, first + more) for more in (0, 1, 10, first, 10 * first))
        else:
            assert not sooner(degree, MOST_TOKENS)


@settings(derandomize=True, deadline=None)
@given(p=generated(), policy=st.sampled_from([None, "recompute"]))
def test_needed_lengths_equal_brute_force(p, policy):
    for found in crossovers(p, policy):
        lower = [d for d in p.sp_degrees if d < found.sp_degree]
        needed = [
            tokens
            for tokens in range(1, 2000)
            if p.fits(found.sp_degree, tokens, policy) and not any(p.fits(d, tokens, policy) for d in lower)
        ]
        assert found.needed_from_tokens == min(needed, default=None)


# ---- the picture


def test_the_picture_is_a_png_of_a_size_to_read(tmp_path):
    save_figure(with_policies(name="costs $a$ [b]"), tmp_path / "new" / "p.PNG")
    data = (tmp_path / "new" / "p.PNG").read_bytes()
    assert data.startswith(b"\x89PNG")
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    assert 1000 <= width <= 2500
    assert 500 <= height <= 1500
    assert 20_000 < len(data) < 1_000_000


@pytest.mark.parametrize(("suffix", "begin"), [(".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_the_suffix_names_the_kind(tmp_path, suffix, begin):
    save_figure(profile(), tmp_path / f"p{suffix}")
    assert (tmp_path / f"p{suffix}").read_bytes().startswith(begin)


def test_lines_end_where_the_degree_ends_and_crossovers_are_marked():
    p = with_policies()
    figure = draw(p)
    left, right, held = figure.axes
    drawn = [line for line in left.lines if len(line.get_xdata()) > 1]
    ends = sorted(max(line.get_xdata()) for line in drawn)
    assert ends == [100, 200, 400, 500, 1000, 2000]
    rings = [line for line in left.lines if line.get_markersize() == 14 and line.get_marker() == "o"]
    assert sorted(float(line.get_xdata()[0]) for line in rings) == [13, 15]
    assert all(0 <= share <= 1 for line in right.lines for share in line.get_ydata())
    assert figure.get_suptitle() == "test (estimated)"
    styles = {(line.get_linestyle(), line.get_marker()) for line in drawn if line.get_marker() != "None"}
    assert len(styles) == 3  # to be told apart in grey
    by_policy = {line.get_label(): [int(tokens) for tokens in line.get_ydata()] for line in held.lines}
    assert by_policy == {"no policy": [100, 200, 400], "recompute": [500, 1000, 2000]}
    assert [label.get_text() for label in held.get_xticklabels()] == ["1", "2", "4"]


def test_measured_tables_are_crosses_beside_the_formulas_lines():
    left = draw(profile(tables=TABLES)).axes[0]
    crosses = [line for line in left.lines if line.get_marker() == "x"]
    assert [line.get_xdata().tolist() for line in crosses] == [[8, 64], [8, 64]]
    assert [line.get_ydata().tolist() for line in crosses] == [[0.00324, 0.00164], [0.0015, 0.0014]]
    assert not [line for line in draw(profile()).axes[0].lines if line.get_marker() == "x"]


@pytest.mark.parametrize(
    "p",
    [
        costing(),
        profile(capacity=2),
        profile(1, capacity=3),
        profile(capacity=1e12),
        profile(capacity=1e25),  # more tokens than 64 bits count
        profile(64, capacity=1),
        profile(2, sp_degrees=[2]),
        with_policies({"none held": {"activation_bytes_per_token": 1e4}}),
    ],
)
def test_extreme_profiles_are_drawn_without_a_warning(p, tmp_path):
    save_figure(p, tmp_path / "p.svg")


def test_what_holds_nothing_is_not_drawn(tmp_path):
    p = profile(2, memory={"memory_bytes": 4, "model_state_bytes": 0, "activation_bytes_per_token": 10})
    with pytest.raises(ValueError, match=r"test: memory holds no sequence of 2 tokens"):
        save_figure(p, tmp_path / "p.png")


def test_without_matplotlib_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"matplotlib.*pip install 'flexsp\[plot\]'"):
        save_figure(profile(), tmp_path / "p.png")
    assert not (tmp_path / "p.png").exists()


# ---- the command


@pytest.fixture
def shown(tmp_path, capsys):
    """`shown(document, *arguments)`: exit status, standard output and standard error of `flexsp show`."""

    def show(document, *arguments):
        (tmp_path / "p.json").write_text(json.dumps(document), encoding="utf-8")
        status = main(["show", str(tmp_path / "p.json"), *map(str, arguments)])
        return (status, *capsys.readouterr())

    return show


def rows(text):
    """The cells of the rows that begin with a degree, table by table."""
    tables = [[]]
    for line in text.splitlines():
        cells = line.split()
        if cells and cells[0].isdigit() and line.startswith(" "):
            tables[-1].append(cells)
        elif tables[-1]:
            tables.append([])
    return tables[:-1]


def test_the_tables_show_the_figures(shown):
    status, out, err = shown(profile_json(), "--lengths", "300,50,50")
    assert (status, err) == (0, "")
    assert out.startswith("test\n4 devices on 1 node; source: estimated\n")
    crossing, time, price = rows(out)
    # at 50 tokens, degree 2: 16.5 ms of 54 ms are exchange; degree 4: 12.5 + 8 ms of 39.25 ms
    assert crossing[0] == ["1", "100", "0%", "-"]
    assert crossing[1] == ["2", "200", "13", "101", "31%", "-"]
    assert crossing[2][:5] == ["4", "400", "15", "201", "52%"]
    assert [row[1:] for row in time] == [["1,500", "-"], ["1,080", "-"], ["785", "1,277"]]
    assert [row[1] for row in price] == ["1,500", "2,160", "3,140"]
    assert "assumed" not in out
    assert "fit:" not in out


def test_always_never_and_lengths_beyond_memory_are_said(shown):
    assert rows(shown(costing(linear_s=1e-3).to_json())[1])[0][1][2] == "always"
    assert rows(shown(costing(linear_s=1e-4).to_json())[1])[0][1][2] == "never"
    out = shown(costing(linear_s=1e-3, latency_s=0.375).to_json())[1]
    assert rows(out)[0][1][2] == "(1,001)"
    assert "(n): longer than the degree holds" in out


def test_policies_have_a_table_each_and_a_letter_where_they_are_used(shown):
    _, out, _ = shown(with_policies().to_json(), "--lengths", "50,400,4K")
    plain, recompute, time, _ = rows(out)
    assert [row[1] for row in plain] == ["100", "200", "400"]
    assert [row[1] for row in recompute] == ["500", "1,000", "2,000"]
    assert "under recompute (compute x 1.5)" in out
    assert time[0] == ["1", "1,500", "7,500", "a", "-"]
    assert "-: does not fit under any policy; a: under recompute" in out


def test_measured_tables_are_shown_and_how_far_the_formula_is_off(shown):
    _, out, _ = shown(profile_json(tables={**TABLES, "8": TABLES["1"]}), "--lengths", "8,64,200")
    crossing, time, price = rows(out)
    assert crossing[1][2] == "13"
    assert time == [["1", "3,240*", "1,640*", "-"], ["2", "1,500*", "1,400*", "2,080*"], ["4", "1,520", "785", "1,040"]]
    assert [row[1] for row in price] == ["3,240*", "3,000*", "6,080"]
    assert "*: by the measured table of the degree; the others by the formula" in out
    assert "all of it by the formula, though measured tables are there" in out
    assert "  degree 1: x0.33 at 8, x1.00 at 64\n  degree 2: x0.57 at 8, x0.81 at 64\n" in out
    assert "degree 8" not in out
    assert "table" not in shown(profile_json())[1]


def test_the_exchange_is_shown_at_lengths_that_some_degree_holds_under_the_policy(shown):
    _, out, _ = shown(with_policies().to_json(), "--lengths", "50,300,1000,2000")
    plain, recompute, *_ = rows(out)
    assert plain[2][4:] == ["52%", "22%"]  # of 50 and 300: a group of 4 holds 400 without a policy
    assert recompute[2][4:] == ["42%", "6%", "3%"]


def test_a_learned_profile_says_so(shown):
    told = {"correction": {"attention": 0.5833, "exchange 2": 1}, "started_from_sha256": "563dce"}
    out = shown(profile_json(provenance=told))[1]
    assert "corrected while training: attention x0.58, exchange 2 x1.00\n" in out
    assert "learned from another profile, of sha256 563dce\n" in out


def test_provenance_is_shown_as_it_is(shown):
    told = {
        "source": "measured",
        "date": "2026-01-02",
        "device": "2 x [bold]",
        "fit": {"held_out_median": 0.04123456, "points": 20},
        "fields": {"compute.linear_s": "from a data sheet [page 3]"},
        "assumptions": ["all layers are alike", {"share": 0.5}],
    }
    _, out, _ = shown(profile_json(provenance=told))
    assert "source: measured; 2026-01-02\n2 x [bold]\n" in out
    assert "fit: held_out_median 0.04123, points 20\n" in out
    assert "compute.linear_s  from a data sheet [page 3]" in out
    assert 'assumed: all layers are alike\nassumed: {"share": 0.5}\n' in out


@pytest.mark.parametrize(
    "odd",
    [
        {"fit": 1, "fields": "all", "assumptions": "none", "correction": "much", "started_from_sha256": 7},
        {"fit": [1], "fields": [2], "correction": {"attention": None}},
        {},
    ],
)
def test_provenance_of_any_shape_is_no_error(shown, odd):
    status, out, err = shown(profile_json(provenance=odd))
    assert (status, err) == (0, "")
    assert "source not stated" in out


def test_tables_stay_within_the_width_of_a_pipe(shown, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    document = with_policies(num_devices=64, capacity=50_000).to_json()
    many = ",".join(f"{k}K" for k in range(1, 20))
    for arguments in ([], ["--lengths", many]):
        _, out, _ = shown(document, *arguments)
        assert max(map(len, out.splitlines())) <= 80
        assert "…" not in out
    assert len(rows(out)[2:]) == 2 * 3  # 19 lengths in tables of 7, times and prices


@pytest.mark.parametrize(
    ("document", "arguments", "message"),
    [
        ({"format": "x"}, [], "must be 'flexsp-profile/1'"),
        (profile_json(), ["--lengths", "4K,x"], "--lengths='x' must be a positive number of tokens"),
        (profile_json(), ["--plot", "p.jpg"], "p.jpg: suffix='.jpg' must be one of .png, .svg, .pdf"),
        (profile_json(), ["--plot", f"{__file__}/p.png"], "p.png: cannot be written"),
    ],
)
def test_bad_input_exits_with_2_and_one_line(shown, document, arguments, message):
    status, out, err = shown(document, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("flexsp show: ")
    assert message in err
    assert err.count("\n") == 1


def test_neither_torch_nor_matplotlib_is_imported_without_a_picture(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps(profile_json()), encoding="utf-8")
    code = (
        "import sys, flexsp.simulate, flexsp.simulate.pictures.profile; from flexsp.cli.main import main; "
        "assert main(['show', sys.argv[1]]) == 0; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path / "p.json")], capture_output=True, check=False)
    assert (ran.returncode, ran.stderr) == (0, b"")
