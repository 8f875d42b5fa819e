"""A step as a picture, as a trace and as text."""

from __future__ import annotations

import base64
import gzip
import io
import json
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import planner_cases
from flexsp.planner import plan
from flexsp.simulate import trace
from flexsp.simulate.pictures import drawing, gantt, gantt_text
from flexsp.simulate.pictures.gantt import Box
from flexsp.simulate.timeline import MicroBatchSpan, Span, Timeline, replay
from profiles import profile


def micro_batch(begin_s, fixed_s, groups, num_devices, index=0, policy=None):
    """`groups`: (first rank, degree, compute seconds, exchange seconds, sequences) each."""
    slowest_s = max(compute_s + exchange_s for _, _, compute_s, exchange_s, _ in groups)
    spans = [
        Span(
            micro_batch=index,
            ranks=tuple(range(first, first + degree)),
            sequences=tuple(sequences),
            tokens=10 * len(sequences),
            longest_tokens=10,
            begin_s=begin_s + fixed_s,
            seconds=compute_s + exchange_s,
            exchange_s=exchange_s,
            idle_s=slowest_s - (compute_s + exchange_s),
            memory_bytes=1000.0,
        )
        for first, degree, compute_s, exchange_s, sequences in groups
    ]
    used = {rank for span in spans for rank in span.ranks}
    return MicroBatchSpan(
        begin_s=begin_s,
        fixed_s=fixed_s,
        slowest_s=slowest_s,
        policy=policy,
        groups=tuple(spans),
        idle_ranks=tuple(rank for rank in range(num_devices) if rank not in used),
    )


def by_hand():
    """Ten seconds of two nodes of two ranks.

    First 1 s of fixed cost, then for 4 s: ranks 0 and 1 together (3 s + 1 s of exchange), rank 2 alone for 2 s, rank 3
    idle. Then 1 s of fixed cost, and 2 s + 2 s of exchange on all four.
    """
    first = micro_batch(0.0, 1.0, [(0, 2, 3.0, 1.0, [4, 1]), (2, 1, 2.0, 0.0, [0])], 4)
    second = micro_batch(5.0, 1.0, [(0, 4, 2.0, 2.0, [2, 3])], 4, index=1, policy="recompute")
    return Timeline(num_devices=4, devices_per_node=2, micro_batches=(first, second))


def many(num_devices, micro_batches=3, devices_per_node=8):
    """Each micro-batch halves the degree; no two groups of it take as long."""
    built, begin_s = [], 0.0
    for index in range(micro_batches):
        degree = max(1, num_devices >> (index % 11))
        groups = [
            (first, degree, 1.0 + 0.5 * first / num_devices, 0.2 if degree > 1 else 0.0, [first])
            for first in range(0, num_devices, degree)
        ]
        built.append(micro_batch(begin_s, 0.25, groups, num_devices, index))
        begin_s = built[-1].end_s
    per_node = min(devices_per_node, num_devices)
    return Timeline(num_devices=num_devices, devices_per_node=per_node, micro_batches=tuple(built))


@st.composite
def planned(draw):
    """(lengths, timeline) of a legal plan; None where there is none."""
    p = draw(planner_cases.profiles())
    lengths = np.array(draw(planner_cases.lengths(12)), dtype=np.int64)
    found = plan(lengths, p, "flex")
    return (lengths, replay(found, lengths, p)) if found.has_plan else None


# ---- the picture


def test_the_boxes_of_the_step_by_hand():
    assert gantt.boxes(by_hand()) == {
        "fixed": [Box(0, 4, 0.0, 1.0), Box(0, 4, 5.0, 1.0)],
        "compute": [Box(0, 2, 1.0, 3.0), Box(2, 3, 1.0, 2.0), Box(0, 4, 6.0, 2.0)],
        "exchange": [Box(0, 2, 4.0, 1.0), Box(0, 4, 8.0, 2.0)],
        "idle": [Box(2, 3, 3.0, 2.0), Box(3, 4, 1.0, 4.0)],
    }


@settings(derandomize=True, deadline=None, max_examples=50)
@given(case=planned())
def test_boxes_cover_the_step_once(case):
    if case is None:
        return
    _, timeline = case
    found = [box for some in gantt.boxes(timeline).values() for box in some]
    for rank in range(timeline.num_devices):
        mine = sorted((box.begin_s, box.seconds) for box in found if box.top <= rank < box.bottom)
        assert mine[0][0] == 0
        for (begin_s, seconds), (next_s, _) in zip(mine, [*mine[1:], (timeline.step_s, 0)], strict=True):
            assert begin_s + seconds == pytest.approx(next_s, rel=1e-9, abs=1e-12)


def collections_of(axes):
    return {found.get_label(): found for found in axes.collections}


@pytest.mark.parametrize("num_devices", [2, 4, 8, 64, 1024])
def test_a_panel_has_a_block_for_each_group_in_the_colour_of_its_degree(num_devices):
    timeline = many(num_devices, micro_batches=11)
    figure = gantt.draw({"flex": timeline})
    drawn = collections_of(figure.axes[0])
    assert len(drawn["compute"].get_paths()) == len(timeline.spans)
    assert len(drawn["exchange"].get_paths()) == sum(span.sp_degree > 1 for span in timeline.spans)
    (idle,) = drawn["idle"].get_paths()
    assert np.count_nonzero(idle.codes == idle.MOVETO) == sum(span.idle_s > 0 for span in timeline.spans)
    assert len(drawn["fixed"].get_paths()) == 11
    colours = defaultdict(set)
    for span, colour in zip(timeline.spans, drawn["compute"].get_facecolors(), strict=True):
        colours[span.sp_degree].add(tuple(colour))
    assert all(len(some) == 1 for some in colours.values())
    assert len(set.union(*colours.values())) == len(colours) == min(11, num_devices.bit_length())


def test_the_picture_of_many_ranks_is_a_png_of_a_size_to_read():
    uri = drawing.as_data_uri(gantt.draw({"static": many(1024), "flex": many(1024)}))
    assert uri.startswith("data:image/png;base64,")
    data = base64.b64decode(uri.split(",")[1])
    assert data.startswith(b"\x89PNG")
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    assert width == 1560
    assert 800 <= height <= 1500


def test_panels_share_time_and_colours():
    long, short = many(4, micro_batches=2), by_hand()
    figure = gantt.draw({"a $x$": long, "b": short})
    above, below = figure.axes
    assert above.get_xlim() == below.get_xlim()
    assert above.get_xlim()[1] == pytest.approx(short.step_s, rel=0.01)
    assert "seconds" in below.get_xlabel()
    of_four = [
        collections_of(above)["compute"].get_facecolors()[0],
        collections_of(below)["compute"].get_facecolors()[2],
    ]
    assert tuple(of_four[0]) == tuple(of_four[1])
    # device-seconds: 6 of 40 idle, 2 + 8 exchange
    assert below.get_title(loc="left") == "b: step 10 s, idle 15.0%, exchange 25.0%, 2 micro-batches"
    ends = [collections_of(axes)["end"].get_segments()[0][0][0] for axes in figure.axes]
    assert ends == [long.step_s, 10]


def test_titles_and_legends_lie_inside_the_picture_and_do_not_overlap():
    figure = gantt.draw({"a very long name of a planner " * 5: many(1024, 11), "flex": many(1024, 11)})
    figure.draw_without_rendering()
    titles = figure.findobj(lambda artist: ": step" in getattr(artist, "get_text", str)())
    assert len(titles) == 2
    boxes = [found.get_window_extent() for found in (*titles, *figure.legends)]
    assert all(0 <= box.x0 and box.x1 <= figure.bbox.x1 and 0 <= box.y0 and box.y1 <= figure.bbox.y1 for box in boxes)
    assert not any(one.overlaps(other) for place, one in enumerate(boxes) for other in boxes[:place])


def test_rank_0_is_on_top_and_nodes_are_marked():
    axes = gantt.draw({"flex": by_hand()}).axes[0]
    assert axes.get_ylim() == (4, 0)
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["0", "1", "2", "3"]
    assert [line[0][1] for line in collections_of(axes)["nodes"].get_segments()] == [2]
    assert "nodes" not in collections_of(gantt.draw({"flex": many(1024)}).axes[0])


@pytest.mark.parametrize("timeline", [by_hand(), many(8, 8), many(64, 7), many(64, 60), many(1024, 11)])
def test_numbers_in_blocks_do_not_overlap_and_lie_in_a_block_of_their_degree(timeline):
    figure = gantt.draw({"flex": timeline})
    axes = figure.axes[0]
    figure.draw_without_rendering()
    inside = axes.transData.inverted()
    blocks = list(zip(timeline.spans, gantt.boxes(timeline)["compute"], strict=True))
    taken = []
    assert axes.texts
    for text in axes.texts:
        (left, low), (right, high) = inside.transform(text.get_window_extent())
        degree, _, count = text.get_text().partition("x")
        under = [
            span
            for span, box in blocks
            if box.begin_s <= left and right <= box.begin_s + box.seconds and box.top < low and high < box.bottom
        ]
        if not count:
            assert [span.sp_degree for span in under] == [int(degree)]
        assert not any(left < r and l < right and high < b and t < low for l, r, t, b in taken)  # noqa: E741
        taken.append((left, right, high, low))


def test_what_no_block_has_room_for_is_counted_over_neighbours():
    axes = gantt.draw({"flex": many(64, 7)}).axes[0]
    texts = Counter(text.get_text() for text in axes.texts)
    assert texts["64"] == 1
    assert texts["8"] == 8
    assert texts["1x64"] == 1


def test_lower_degrees_are_darker_in_grey_and_an_exchange_is_darker_than_its_compute():
    colours = drawing.degree_colours([1, 2, 4, 8, 16, 32, 64])
    grey = [0.299 * red + 0.587 * green + 0.114 * blue for red, green, blue, _ in colours.values()]
    assert all(low + 0.04 < high for low, high in pairwise(grey))
    assert all(max(gantt.shaded(colour)[:3]) < max(colour[:3]) for colour in colours.values())


def test_no_timeline_is_an_error():
    with pytest.raises(ValueError, match=r"timelines=\{\} is empty; give at least one"):
        gantt.draw({})


def test_without_matplotlib_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"matplotlib.*pip install 'flexsp\[plot\]'"):
        gantt.draw({"flex": by_hand()})


def test_a_picture_is_saved_as_its_suffix_says(tmp_path):
    figure = gantt.draw({"flex": by_hand()})
    for name, begin in (("a/p.PNG", b"\x89PNG"), ("p.svg", b"<?xml"), ("p.pdf", b"%PDF")):
        drawing.save(figure, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(begin)
    with pytest.raises(ValueError, match=r"p\.jpg: suffix='\.jpg' must be one of \.png, \.svg, \.pdf"):
        drawing.save(figure, tmp_path / "p.jpg")


def test_neither_torch_nor_matplotlib_is_imported_with_the_modules():
    code = (
        "import sys, flexsp.simulate.pictures.gantt, flexsp.simulate.pictures.gantt_text, flexsp.simulate.trace; "
        "sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- the trace

MEGA = 10**6


def events_by_thread(document):
    """(pid, tid) -> complete events, by begin."""
    found = defaultdict(list)
    for event in document["traceEvents"]:
        if event["ph"] == "X":
            found[event["pid"], event["tid"]].append(event)
    return {thread: sorted(some, key=lambda event: event["ts"]) for thread, some in found.items()}


def names(document, kind):
    return {(event["pid"], event["tid"]): event["args"] for event in document["traceEvents"] if event["name"] == kind}


def test_the_trace_of_the_step_by_hand():
    document = trace.chrome_trace(by_hand(), np.array([10, 20, 30, 40, 50]), "flex")
    threads = names(document, "thread_name")
    seen = {
        threads[thread]["name"]: [(event["name"], event["ts"] // MEGA, event["dur"] // MEGA) for event in some]
        for thread, some in events_by_thread(document).items()
    }
    second = [("fixed cost", 5, 1), ("compute sp 4 (c)", 6, 2), ("exchange sp 4 (c)", 8, 2)]
    both = [("fixed cost", 0, 1), ("compute sp 2 (b)", 1, 3), ("exchange sp 2 (b)", 4, 1), *second]
    assert seen == {
        "rank 0": both,
        "rank 1": both,
        "rank 2": [("fixed cost", 0, 1), ("compute sp 1 (a)", 1, 2), ("idle", 3, 2), *second],
        "rank 3": [("fixed cost", 0, 1), ("idle", 1, 4), *second],
    }
    assert sorted(args["name"] for args in names(document, "process_name").values()) == [
        "flex: node 0 (ranks 0-1)", "flex: node 1 (ranks 2-3)",
    ]  # fmt: skip
    assert [args["sort_index"] for args in names(document, "thread_sort_index").values()] == [0, 1, 2, 3]


def test_events_tell_what_their_group_holds():
    document = trace.chrome_trace(by_hand(), np.array([10, 20, 30, 40, 50]), "flex")
    first, other = (event["args"] for event in document["traceEvents"] if event["name"] == "compute sp 2 (b)")
    told = {
        "micro_batch": 0, "sp_degree": 2, "ranks": "0-1", "sequences": 2, "tokens": 20, "longest_tokens": 10,
        "memory_bytes": 1000, "policy": None,
    }  # fmt: skip
    assert other == told
    assert first == {**told, "tokens_of_sequence": {"4": 50, "1": 20}}
    assert {e["args"]["policy"] for e in document["traceEvents"] if e["name"] == "compute sp 4 (c)"} == {"recompute"}


def assert_partition(timeline, document):
    threads = events_by_thread(document)
    assert len(threads) == timeline.num_devices
    assert {args["name"] for args in names(document, "thread_name").values()} == {
        f"rank {rank}" for rank in range(timeline.num_devices)
    }
    for some in threads.values():
        assert some[0]["ts"] == 0
        for event, after in pairwise(some):
            assert event["ts"] + event["dur"] == after["ts"]
        assert all(isinstance(event["ts"], int) and event["dur"] >= 1 for event in some)
        assert some[-1]["ts"] + some[-1]["dur"] == round(timeline.step_s * 1e6)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(case=planned())
def test_events_partition_the_step_of_each_rank(case):
    if case is not None:
        lengths, timeline = case
        assert_partition(timeline, trace.chrome_trace(timeline, lengths, "flex"))


@pytest.mark.parametrize("scale", [1e-6, 3.3e-7, 7.77e-7])
def test_rounding_to_microseconds_makes_no_gap_and_no_overlap(scale):
    groups = [(0, 2, 1.3 * scale, 0.4 * scale, [0]), (2, 1, 3.7 * scale, 0.0, [1])]
    built, begin_s = [], 0.0
    for index in range(40):
        built.append(micro_batch(begin_s, 0.6 * scale, groups, 4, index))
        begin_s = built[-1].end_s
    timeline = Timeline(num_devices=4, devices_per_node=2, micro_batches=tuple(built))
    assert_partition(timeline, trace.chrome_trace(timeline, np.array([10, 10]), "flex"))


def test_what_ends_with_the_micro_batch_ends_at_its_microsecond():
    """Halves of microseconds, at which the last digit of a sum decides to which side it is rounded."""
    random = np.random.default_rng(0)
    for _ in range(200):
        halves = [0.5e-6 * int(n) for n in random.integers(1, 10**6, 4)]
        built = [micro_batch(halves[0], halves[1], [(0, 1, halves[2], 0.0, [0]), (1, 1, halves[3], 0.0, [1])], 2)]
        document = trace.chrome_trace(
            Timeline(num_devices=2, devices_per_node=2, micro_batches=tuple(built)), np.array([10, 10]), "flex"
        )
        ends = {some[-1]["ts"] + some[-1]["dur"] for some in events_by_thread(document).values()}
        assert ends == {round(built[0].end_s * 1e6)}
        assert sorted(len(some) for some in events_by_thread(document).values()) == [2, 3]


def test_several_plans_are_processes_of_their_own():
    timelines = {"static": many(64), "flex": many(64)}
    document = trace.chrome_traces(timelines, np.arange(1, 65))
    processes = names(document, "process_name")
    assert len(processes) == len({pid for pid, _ in processes}) == 16
    assert [args["name"] for args in processes.values()][7:9] == [
        "static: node 7 (ranks 56-63)", "flex: node 0 (ranks 0-7)",
    ]  # fmt: skip
    order = [args["sort_index"] for args in names(document, "process_sort_index").values()]
    assert order == sorted(order)
    threads = events_by_thread(document)
    assert len({tid for _, tid in threads}) == 128  # a number that two processes share would make one thread of two
    assert min(tid for _, tid in threads) > max(pid for pid, _ in threads)


def test_the_file_is_json_and_grows_with_ranks_and_sequences_but_not_with_both(tmp_path):
    lengths = np.full(2000, 10)
    groups = [(0, 1024, 1.0, 0.5, range(2000))]
    timeline = Timeline(num_devices=1024, devices_per_node=8, micro_batches=(micro_batch(0.0, 0.1, groups, 1024),))
    document = trace.chrome_trace(timeline, lengths, 'a "name"')
    trace.save(document, tmp_path / "new" / "t.json")
    trace.save(document, tmp_path / "t.JSON.gz")
    text = (tmp_path / "new" / "t.json").read_bytes()
    assert json.loads(text) == document
    assert gzip.decompress((tmp_path / "t.JSON.gz").read_bytes()) == text
    assert len(text) < 1_500_000


@pytest.mark.parametrize(
    ("name", "message"), [("t.txt", "must end in .json or .json.gz"), ("f/t.json", "cannot be written")]
)
def test_a_trace_that_cannot_be_saved_is_an_error(tmp_path, name, message):
    (tmp_path / "f").write_text("a file", encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        trace.save(trace.chrome_trace(by_hand(), np.arange(1, 6), "flex"), tmp_path / name)


# ---- text


def rows(text):
    """Label -> cells, from the lines between the heading and the axis."""
    lines = text.plain.splitlines()
    axis = next(index for index, line in enumerate(lines) if set(line.strip()) <= {"+", "-"} or "┴" in line)
    return dict(line.split() for line in lines[1:axis])


def ranks_of(label):
    first, _, last = label.partition("-")
    return range(int(first), int(last or first) + 1)


def test_the_text_of_the_step_by_hand():
    text = gantt_text.render(by_hand(), width=25, ascii_only=True)
    assert text.plain.splitlines() == [
        "rank step 10 s, 2 micro-batches"[:25],
        " 0-1 ##222222~~##4444~~~~",
        "   2 ##1111....##4444~~~~",
        "   3 ##........##4444~~~~",
        "     +---------+---------",
        "     0 s       5 s",
        "sp_degree 1 2 4, ~",
        "exchange 25%, # fixed",
        "20%, . idle 15%",
    ]
    wide = gantt_text.render(by_hand())
    assert rows(wide)["3"].count("·") == 30
    assert wide.plain.splitlines()[-1] == "sp_degree 1 2 4, ~ exchange 25%, ░ fixed 20%, · idle 15%"


@settings(derandomize=True, deadline=None, max_examples=50)
@given(case=planned(), width=st.sampled_from([40, 80, 200]))
def test_every_rank_has_one_row_and_every_kind_the_width_of_its_time(case, width):
    if case is None:
        return
    _, timeline = case
    found = rows(gantt_text.render(timeline, width, ascii_only=True))
    assert sorted(rank for label in found for rank in ranks_of(label)) == list(range(timeline.num_devices))
    (columns,) = {len(cells) for cells in found.values()}
    for label, cells in found.items():
        for rank in ranks_of(label):
            seconds = Counter({"#": sum(m.fixed_s for m in timeline.micro_batches)})
            for span in timeline.spans:
                if rank in span.ranks:
                    seconds[str(span.sp_degree)] += span.compute_s
                    seconds["~"] += span.exchange_s
                    seconds["."] += span.idle_s
            seconds["."] += sum(m.slowest_s for m in timeline.micro_batches if rank in m.idle_ranks)
            assert set(cells) <= set(seconds)
            for symbol, took_s in seconds.items():
                assert cells.count(symbol) == pytest.approx(took_s / timeline.step_s * columns, abs=2)


def test_what_is_shorter_than_a_character_is_saved_up():
    groups = [(0, 2, 0.6, 0.1, [0]), (2, 2, 0.3, 0.1, [1])]
    built = [micro_batch(0.8 * index, 0.1, groups, 4, index) for index in range(60)]
    timeline = Timeline(num_devices=4, devices_per_node=4, micro_batches=tuple(built))
    found = rows(gantt_text.render(timeline, width=5 + 48, ascii_only=True))
    # 60 times 0.8 s are 48 columns, one a second
    assert {symbol: found["0-1"].count(symbol) for symbol in "#2~."} == pytest.approx(
        {"#": 6, "2": 36, "~": 6, ".": 0}, abs=1
    )
    assert {symbol: found["2-3"].count(symbol) for symbol in "#2~."} == pytest.approx(
        {"#": 6, "2": 18, "~": 6, ".": 18}, abs=1
    )


def test_a_micro_batch_shows_only_degrees_that_it_has():
    found = rows(gantt_text.render(many(8, 4), width=41, ascii_only=True))
    for cells in found.values():
        assert [set(part) - set("~.") for part in cells.split("#") if part] == [{"8"}, {"4"}, {"2"}, {"1"}]


@pytest.mark.parametrize("num_devices", [2, 8, 64, 1024])
def test_rows_are_capped_and_lines_fit(num_devices):
    timeline = many(num_devices, 60)
    text = gantt_text.render(timeline, 80, ascii_only=True)
    lines = text.plain.splitlines()
    assert len(lines) <= gantt_text.MOST_ROWS + 5
    assert max(map(len, lines)) <= 80
    found = rows(text)
    assert sorted(rank for label in found for rank in ranks_of(label)) == list(range(num_devices))
    assert ("the mean of" in lines[0]) == (num_devices > 32)
    if num_devices == 1024:
        assert "the mean of 32 ranks" in lines[0]
        assert "a=16" in text.plain


def test_a_row_of_many_ranks_is_their_mean():
    """Each row has half of its ranks idle and half at work, for two micro-batches of very different lengths."""
    long = micro_batch(0.0, 1.0, [(rank, 1, 8.0 - rank / 1024, 0.0, [rank]) for rank in range(0, 1024, 2)], 1024)
    short = micro_batch(9.0, 1.0, [(rank, 1, 2.0 + rank / 1024, 0.0, [rank]) for rank in range(1, 1024, 2)], 1024, 1)
    timeline = Timeline(num_devices=1024, devices_per_node=8, micro_batches=(long, short))
    found = rows(gantt_text.render(timeline, width=10 + 65, ascii_only=True))
    assert 1 < len(found) <= 32
    scale = 65 / timeline.step_s
    for cells in found.values():
        first, second = (part for part in cells.split("#") if part)
        assert len(first) == pytest.approx(8 * scale, abs=1)
        assert first.count("1") == pytest.approx(4 * scale, abs=3)
        assert second.count("1") == pytest.approx(1.25 * scale, abs=3)


def shown(encoding, **options):
    """What a console whose output has this encoding gets of the step by hand."""
    output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    gantt_text.show(by_hand(), Console(file=output, width=80, **options))
    output.flush()
    return output.buffer.getvalue()


def test_other_encodings_than_utf_8_get_ascii_and_a_pipe_no_colours():
    assert shown("latin-1").isascii()
    assert "░" in shown("utf-8").decode()
    assert b"\x1b" not in shown("utf-8")
    assert b"\x1b[" in shown("utf-8", force_terminal=True, color_system="256")


def test_ticks_of_the_axis_stand_at_their_time():
    lines = gantt_text.render(by_hand(), width=5 + 60, ascii_only=True).plain.splitlines()
    axis, labels = lines[4][5:], lines[5][5:]
    assert [index for index, mark in enumerate(axis) if mark == "+"] == [0, 12, 24, 36, 48]
    assert [labels[at : at + 3] for at in (0, 12, 24, 36, 48)] == ["0 s", "2 s", "4 s", "6 s", "8 s"]


def test_plans_of_a_planner_have_all_three_views(tmp_path):
    p, lengths = profile(4), np.array([300, 90, 40, 40, 10])
    timelines = {name: replay(plan(lengths, p, name), lengths, p) for name in ("static", "flex")}
    drawing.save(gantt.draw(timelines), tmp_path / "g.svg")
    document = trace.chrome_traces(timelines, lengths)
    assert document["otherData"]["flex"]["step_s"] == timelines["flex"].step_s
    assert all(len(rows(gantt_text.render(timeline))) <= 4 for timeline in timelines.values())
