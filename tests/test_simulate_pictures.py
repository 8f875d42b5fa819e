from __future__ import annotations

import statistics
import subprocess
import sys
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from itertools import combinations

import numpy as np
import pytest

import flexsp
from flexsp.simulate.figures import CaseFigures, planner_figures, step_figures
from flexsp.simulate.page import html
from flexsp.simulate.pictures import case as pictures
from flexsp.simulate.pictures import drawing
from flexsp.simulate.pictures import sweep as pictures_sweep
from flexsp.simulate.pictures.gallery import case_pictures, sweep_pictures
from flexsp.simulate.pictures.style import looks
from flexsp.simulate.timeline import replay
from profiles import profile

PLANNERS = ("flex", "batch-adaptive", "static")
SIX = ("flex", "batch-adaptive", "static", "megatron-dcp", "flexible-cp", "package.module:plan")
HOSTILE = "<script>alert(1)</script> $x$ & \"q\" 'r' \udcff"


@cache
def batches(num_devices, steps):
    """`steps` global batches with their plans by planner, on devices that hold 100 tokens each."""
    p = profile(num_devices, capacity=100)
    random = np.random.default_rng(0)
    lengths = [np.minimum(random.lognormal(3, 1, 60).astype(int) + 2, 100 * num_devices) for _ in range(steps)]
    return p, [(each, {name: flexsp.plan(each, p, name) for name in PLANNERS}) for each in lengths]


def case(planners=PLANNERS, num_devices=8, steps=3, **changes):
    """A case of real plans. Names that are no planner's stand for static with other names."""
    p, made = batches(num_devices, steps)
    found = {
        name: [step_figures(s, plans.get(name, plans["static"]), lengths, p) for s, (lengths, plans) in enumerate(made)]
        for name in dict.fromkeys((*planners, "static"))
    }
    given = {
        "corpus": "wikipedia", "profile": p.name, "num_devices": num_devices, "devices_per_node": p.devices_per_node,
        "memory_bytes": p.memory.memory_bytes, "max_length": 4096, "batch_size": 60, "seed": 0, "static_sp_degree": 4,
        "refused": {}, "sentences": ("Sentence one.", "Sentence two."),
    }  # fmt: skip
    given["planners"] = {name: planner_figures(name, found[name], found["static"]) for name in planners}
    return CaseFigures(**{**given, **changes})


def timelines(num_devices=8):
    p, made = batches(num_devices, 3)
    lengths, plans = made[0]
    return {name: replay(plans[name], lengths, p) for name in ("flex", "static")}


def bars(axes):
    return [patch for container in axes.containers for patch in container.patches]


def texts(axes):
    return [text.get_text() for text in axes.texts]


# ---- pictures show the figures


def test_parts_of_a_bar_add_up_to_the_time_relative_to_static():
    c = case()
    (axes,) = pictures.shares(c).axes
    assert [text.get_text() for text in axes.get_yticklabels()] == list(PLANNERS)
    for row, each in enumerate(c.planners.values()):
        widths = [bar.get_width() for bar in bars(axes) if round(bar.get_y() + bar.get_height() / 2) == row]
        parts = (each.compute_share, each.exchange_share, each.fixed_share, each.idle_share)
        assert widths == pytest.approx([part / each.speedup for part in parts])
        assert sum(widths) == pytest.approx(each.total_s / c.planners["static"].total_s)
    assert f"{1 / c.planners['flex'].speedup:.0%} ({c.planners['flex'].speedup:.2f} x)" in texts(axes)
    assert "100%" in texts(axes)


def test_each_step_is_a_point_and_medians_are_marked():
    c = case()
    (axes,) = pictures.idle(c).axes
    steps, medians = axes.lines[::2], axes.lines[1::2]
    for each, points, median in zip(c.planners.values(), steps, medians, strict=True):
        assert list(points.get_xdata()) == [step.step_s for step in each.steps]
        assert list(points.get_ydata()) == [step.idle_share for step in each.steps]
        assert list(median.get_xdata()) == [each.median_step_s]
        assert list(median.get_ydata()) == [statistics.median(step.idle_share for step in each.steps)]
        assert median.get_markersize() > points.get_markersize()
        assert f"{each.planner}: {each.median_step_s:.3g} s" in median.get_label()
    low, high = axes.get_ylim()
    assert all(low < step.idle_share < high for each in c.planners.values() for step in each.steps)


def test_lengths_are_assigned_to_degrees_as_in_the_plans():
    flex = case().planners["flex"]
    left, right = pictures.assigned(flex).axes
    _, made = batches(8, 3)
    expected = {}  # from the plans, by degree and band, in ways that the figures do not use
    for lengths, plans in made:
        for group in (group for micro_batch in plans["flex"].micro_batches for group in micro_batch.groups):
            for length in lengths[list(group.sequences)]:
                key = (len(group.ranks), int(np.floor(np.log2(length))))
                expected[key] = expected.get(key, 0) + 1
    degrees = sorted({degree for degree, _ in expected})
    assert len(degrees) > 1
    assert [text.get_text() for text in left.get_yticklabels()] == [f"degree {degree}" for degree in degrees]
    drawn = {
        (degrees[round(bar.get_y() - 0.4)], round(bar.get_x() + bar.get_width() / 2 - 0.5)): abs(bar.get_height())
        for bar in bars(left)
    }
    of_degree = {degree: sum(n for (d, _), n in expected.items() if d == degree) for degree in degrees}
    scale = max(drawn.values()) / max(n / of_degree[d] for (d, _), n in expected.items())
    assert drawn == pytest.approx({(d, band): scale * n / of_degree[d] for (d, band), n in expected.items()})
    assert sorted(texts(left)) == sorted(str(n) for n in expected.values())
    weights = [bar.get_width() for bar in bars(right)]
    assert weights[::2] == pytest.approx([of_degree[degree] / 180 for degree in degrees])
    assert weights[1::2] == pytest.approx(list(flex.tokens_by_degree.values()))


def test_speedups_have_a_bar_for_each_planner_a_group_for_each_limit_and_a_panel_for_each_corpus():
    cases = [case(corpus=corpus, max_length=limit) for corpus in ("wiki", "code") for limit in (4096, 2048)]
    del cases[3].planners["batch-adaptive"]
    left, right = pictures_sweep.speedup(cases).axes
    assert [axes.get_title() for axes in (left, right)] == ["wiki", "code"]
    assert [text.get_text() for text in left.get_xticklabels()] == ["2K", "4K"]
    gains = [cases[0].planners[name].speedup for name in ("flex", "batch-adaptive")]
    assert [bar.get_height() for bar in bars(left)] == gains * 2
    assert [bar.get_height() for bar in bars(right)] == [gains[0], 0, *gains]
    told = [f"{gain:.2f}" for gain in gains]
    assert texts(left) == told * 2
    assert texts(right) == [told[0], "no plan", *told]


def test_scaling_draws_throughput_of_a_device_and_speedup():
    cases = [case(num_devices=devices) for devices in (16, 4, 8)]
    left, right = pictures_sweep.scaling(cases).axes
    for index, name in enumerate(PLANNERS):
        found = {c.num_devices: c.planners[name] for c in cases}
        assert list(left.lines[index].get_xdata()) == [4, 8, 16]
        assert list(left.lines[index].get_ydata()) == [found[n].tokens_per_s / n for n in (4, 8, 16)]
        assert list(right.lines[index].get_ydata()) == [found[n].speedup for n in (4, 8, 16)]
    assert (left.get_xscale(), left.get_ylim()[0]) == ("log", 0)
    assert [text.get_text() for text in left.get_xticklabels()] == ["4", "8", "16"]


def test_panels_keep_devices_together_though_profiles_and_batches_change_with_them():
    cases = [case(num_devices=n, profile=f"7b on {n}", batch_size=64 * n) for n in (8, 4)]
    assert [c.num_devices for c in pictures_sweep.panels(cases, "num_devices")["wikipedia"]] == [4, 8]
    two = [replace(c, profile="13b") for c in cases] + cases
    assert sorted(pictures_sweep.panels([*two, replace(two[0], profile="30b")], "num_devices")) != ["wikipedia"]
    same = [case(profile="7b"), case(profile="13b")]
    assert list(pictures_sweep.panels(same, "max_length")) == ["wikipedia, 7b", "wikipedia, 13b"]


# ---- pictures are legible


def test_planners_differ_without_colour_and_look_the_same_whoever_else_is_drawn():
    found = looks(SIX)
    assert len({(look.line, look.marker) for look in found.values()}) == len(SIX)
    light = [0.299 * look.colour[0] + 0.587 * look.colour[1] + 0.114 * look.colour[2] for look in found.values()]
    for (a, light_a), (b, light_b) in combinations(zip(found.values(), light, strict=True), 2):
        assert abs(light_a - light_b) > 0.05 or a.hatch != b.hatch
    drawn = pictures.idle(case(("static", "megatron-dcp")), SIX).axes[0].lines
    assert [line.get_marker() for line in drawn[::2]] == [found["static"].marker, found["megatron-dcp"].marker]


def shown_texts(figure):
    """All texts that are drawn, and where they are, in pixels."""
    from matplotlib.text import Text

    figure.draw_without_rendering()
    hidden = {text for axes in figure.axes if not axes.get_visible() for text in axes.findobj(Text)}
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        beyond = [tick for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high]
        hidden |= {text for tick in beyond for text in (tick.label1, tick.label2)}
    found = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text().strip()]
    return [(text.get_text(), text.get_window_extent()) for text in found if text not in hidden]


def all_figures(cases):
    """The pictures of the first case, and of all together."""
    return {each.name: each.figure for each in [*case_pictures(cases[0]), *sweep_pictures(cases)]}


@pytest.mark.parametrize("planners", [("flex", "static"), SIX], ids=len)
def test_no_text_overlaps_another_or_leaves_the_picture(planners):
    long = "a corpus of a rather long name/in/a/folder " * 3
    cases = [case(planners, n, corpus=c, max_length=k * 1024) for c in (long, "code") for n in (4, 16) for k in (1, 9)]
    del cases[5]
    drawn = all_figures(cases)
    assert list(drawn) == ["shares", "idle", "assigned", "speedup", "scaling"]
    for name, figure in drawn.items():
        found = shown_texts(figure)
        width, height = figure.bbox.size
        for text, box in found:
            assert min(box.x0, box.y0) >= -1 and box.x1 <= width + 1 and box.y1 <= height + 1, (name, text)
        for (text, box), (other, other_box) in combinations(found, 2):
            assert not box.padded(-1).overlaps(other_box.padded(-1)), (name, text, other)


@pytest.mark.parametrize(
    "cases",
    [
        [case(("static",), steps=1)],
        [case(("flex",), steps=1)],
        [case(("static",), n, steps=1) for n in (1, 2)],
    ],
    ids=["baseline alone", "no baseline", "one device"],
)
def test_extreme_cases_are_drawn_without_a_warning(cases, tmp_path):
    for name, figure in all_figures(cases).items():
        drawing.save(figure, tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_names_are_drawn_as_they_are(tmp_path):
    drawn = all_figures([case(("flex", "_mine:$a$"), corpus=HOSTILE, max_length=n) for n in (5, 1000)])
    for name, figure in drawn.items():
        drawing.save(figure, tmp_path / f"{name}.png")
        told = " ".join(" ".join(text for text, _ in shown_texts(figure)).split())
        assert HOSTILE.replace("\udcff", "?") in told
        assert name == "assigned" or r"_mine:\$a\$" in told  # the backslashes are not drawn


# ---- the page


class Page(HTMLParser):
    """Reads a page, and fails where elements are not nested or a void one has no place."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.told, self.rows = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        attributes = dict(attributes)
        assert not [key for key in attributes if key.startswith("on")]
        self.elements.append((name, attributes))
        if name == "tr":
            self.rows.append([])
        if name in ("td", "th"):
            self.rows[-1].append("")
        if name not in ("img", "meta"):
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if "style" not in self.open:
            self.told.append(data)
        if self.open[-1:] in (["td"], ["th"]) or self.open[-2:] == ["th", "a"]:
            self.rows[-1][-1] += data

    def of(self, name):
        return [attributes for element, attributes in self.elements if element == name]

    @property
    def text(self):
        return " ".join(self.told)


def test_the_page_is_whole_without_a_network():
    text = html.report([case(), case(max_length=1024)], [timelines(), timelines()])
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>")
    assert {name for name, _ in page.elements}.isdisjoint({"script", "link", "iframe", "object", "base", "form"})
    assert all(image["src"].startswith("data:image/png;base64,") for image in page.of("img"))
    assert all(len(image["alt"]) > 40 for image in page.of("img"))
    ids = {section["id"] for section in page.of("section")}
    assert {link["href"] for link in page.of("a")} == {f"#{name}" for name in ids} == {"#case-1", "#case-2"}
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style and "prefers-color-scheme: dark" in style
    assert len(page.of("img")) == 1 + 2 * 4
    assert f"Made by flexsp {flexsp.__version__}." in page.text
    assert "fixed_s" in page.text and "none was measured in training" in page.text


def test_every_planner_and_step_is_in_the_page():
    c = case(refused={"milp": "unknown: the solver stopped"})
    page = Page(html.report([c], notes=["The trace is in trace.json."]))
    assert page.text.index("Sentence one.") < page.text.index("Sentence two.") < page.text.index("planner")
    rows = {row[0]: row for row in page.rows if row[0] in ("milp", *PLANNERS)}
    for name, each in c.planners.items():
        assert rows[name][1:3] == [f"{each.median_step_s:.3g} s", f"{each.speedup:.2f}"]
        assert rows[name][8] == str(each.process_groups)
    assert rows["milp"] == ["milp", "no plan: unknown: the solver stopped"]
    steps = [row for row in page.rows if row[3:4] and row[3] in PLANNERS]
    assert [(row[0], row[3]) for row in steps] == [(str(s), name) for s in range(3) for name in PLANNERS]
    assert [row[11] for row in steps] == [c.planners[row[3]].steps[int(row[0])].layout for row in steps]
    assert [row[4] for row in steps] == [f"{c.planners[row[3]].steps[int(row[0])].step_s:.3g} s" for row in steps]
    assert "wikipedia, up to 4K tokens, 8 devices" in page.text
    assert "The trace is in trace.json." in page.text


def test_several_cases_have_an_overview_and_pictures_of_what_varies():
    cases = [case(num_devices=n) for n in (4, 8, 16)]
    page = Page(html.report(cases))
    overview = [row for row in page.rows if row[:2] == ["wikipedia", "4K"]]
    assert [row[2] for row in overview] == ["4", "8", "16"] * 2
    assert overview[1][4:] == [f"{cases[1].planners[name].speedup:.2f}" for name in ("flex", "batch-adaptive")]
    assert len(overview[3][4:]) == 3
    alternatives = [image["alt"] for image in page.of("img")]
    assert alternatives[0].startswith("From 4 to 16 devices flex is ")
    assert len(alternatives) == 1 + 3 * 3


def test_names_are_text_whatever_they_hold():
    c = case(("flex", "static"), corpus=HOSTILE, profile=HOSTILE, sentences=(HOSTILE,), refused={HOSTILE: HOSTILE})
    text = html.report([c, c], [{HOSTILE: timelines()["flex"]}], notes=[HOSTILE])
    assert "<script" not in text
    page = Page(text.encode("utf-8").decode())
    said = HOSTILE.replace("\udcff", "?")
    assert page.text.count(said) > 8
    assert all(said in image["alt"] for image in page.of("img"))


def test_without_matplotlib_all_tables_are_there_and_a_line_says_what_to_install(monkeypatch):
    cases = [case(), case(num_devices=4)]
    full = Page(html.report(cases))
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    page = Page(html.report(cases, [timelines()]))
    assert page.of("img") == [] and len(full.of("img")) == 7
    assert page.rows == full.rows
    assert page.text.count("pip install 'flexsp[plot]'") == 1
    assert "flexsp[plot]" not in full.text


def test_no_case_is_an_error():
    with pytest.raises(ValueError, match=r"cases=\[\] is empty; give the figures of at least one case"):
        html.report([])


def test_neither_torch_nor_matplotlib_is_imported_before_a_picture_is_drawn():
    code = "import sys, flexsp.simulate.page.html; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
