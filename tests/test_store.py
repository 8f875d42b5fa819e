"""The token store: built once, by one process, and gone on with after a kill; never other tokens than the source's."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import data_ranks
import small_tokenizers
from flexsp.data import DataOptions, TokenStore, build_lock, formats, indexing, open_corpus, shards, sources

pytestmark = pytest.mark.alone

DRAW = random.Random(0)
ROWS = [[DRAW.randrange(1000) for _ in range(DRAW.randrange(1, 40))] for _ in range(300)]


def write_rows(path: Path, rows: list[list[int]] = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"input_ids": row}) + "\n" for row in rows]
    path.write_text("\n".join(["".join(lines[:20]), "".join(lines[20:])]))  # with a blank line, which is no row
    return path


@pytest.fixture
def small_parts(monkeypatch):
    monkeypatch.setattr(formats, "PART_BYTES", data_ranks.PART_BYTES)
    monkeypatch.setattr(sources, "PART_BYTES", data_ranks.PART_BYTES)


@pytest.fixture
def opened(tmp_path, small_parts):
    def open_it(source: str | Path, cache: str = "cache", **options) -> TokenStore:
        return open_corpus(str(source), DataOptions(cache_dir=str(tmp_path / cache), **options))

    return open_it


def documents(corpus: TokenStore) -> list[list[int]]:
    return [corpus.read(i, 0, int(n))[0].tolist() for i, n in enumerate(corpus.lengths)]


def shards_of(corpus: TokenStore) -> list[Path]:
    return [shard.folder for shard in corpus._shards]


def contents(corpus: TokenStore) -> list[dict[str, bytes]]:
    """Of all shards, but when they were written."""
    return [
        {file.name: file.read_bytes() for file in folder.iterdir() if file.name != shards.CHECKED}
        for folder in shards_of(corpus)
    ]


def test_a_large_file_is_many_shards_and_is_built_once(tmp_path, opened):
    path = write_rows(tmp_path / "rows.jsonl")
    first = opened(path)
    assert first.num_made == len(shards_of(first)) > 10
    assert documents(first) == ROWS
    again = opened(path)
    assert again.num_made == 0 and documents(again) == ROWS and again.fingerprint == first.fingerprint
    assert [again.describe(i) for i in (0, 150, 299)] == [f"{path} row {i}" for i in (0, 150, 299)]
    moved = opened(shutil.copy(path, tmp_path / "moved.jsonl"))  # keyed by content
    assert moved.num_made == 0 and moved.fingerprint == first.fingerprint


def test_a_row_beyond_a_part_is_whole(tmp_path, opened):
    rows = [[1] * 5, list(range(3000)), [2] * 5]
    assert documents(opened(write_rows(tmp_path / "rows.jsonl", rows))) == rows


def test_what_has_changed_alone_is_made_anew(tmp_path, opened):
    folder = tmp_path / "folder"
    parts = [ROWS[i : i + 10] for i in range(0, 60, 10)]
    for index, rows in enumerate(parts):
        write_rows(folder / f"{index}.jsonl", rows)
    before = opened(folder)
    assert documents(before) == ROWS[:60]
    stat = (folder / "3.jsonl").stat()
    parts[3] = [[*row[:-1], (row[-1] + 1) % 10 + row[-1] // 10 * 10] for row in parts[3]]  # as many digits
    write_rows(folder / "3.jsonl", parts[3])
    os.utime(folder / "3.jsonl", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert (folder / "3.jsonl").stat().st_size == stat.st_size
    after = opened(folder)
    assert after.num_made == 1 and after.fingerprint != before.fingerprint
    assert documents(after) == [row for rows in parts for row in rows]
    path = write_rows(tmp_path / "rows.jsonl")
    opened(path)
    write_rows(path, [*ROWS, [7, 8]])
    assert opened(path).num_made == 1  # the last part, which has grown
    write_rows(folder / "0.jsonl", [])
    assert documents(opened(folder)) == [row for rows in parts[1:] for row in rows]


def test_many_files_share_a_shard_and_a_change_leaves_the_others(tmp_path, opened, monkeypatch):
    monkeypatch.setattr(sources, "MOST_FILES", 8)
    texts = {f"{i:03}.txt": f"text {i} " * (i % 9 + 1) for i in range(200)}
    for name, text in texts.items():
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / name).write_text(text)
    corpus = opened(tmp_path / "texts", tokenizer="bytes")
    assert documents(corpus) == [list(text.encode()) for text in texts.values()]
    assert 10 < len(shards_of(corpus)) < 60
    assert corpus.describe(123) == f"{tmp_path}/texts/123.txt"
    texts["100.txt"] = "another"
    (tmp_path / "texts" / "100.txt").write_text("another")
    changed = opened(tmp_path / "texts", tokenizer="bytes")
    assert 1 <= changed.num_made <= 2
    assert documents(changed) == [list(text.encode()) for text in texts.values()]
    (tmp_path / "texts" / "050.txt").unlink()
    assert opened(tmp_path / "texts", tokenizer="bytes").num_made <= 1


def test_settings_and_tokenizers_have_stores_of_their_own(tmp_path, opened):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in small_tokenizers.LINES))
    small_tokenizers.byte_pairs(tmp_path / "one")
    small_tokenizers.byte_pairs(tmp_path / "same")
    small_tokenizers.byte_pairs(tmp_path / "other", first=True)
    one = opened(path, tokenizer=str(tmp_path / "one"))
    same = opened(path, tokenizer=str(tmp_path / "same"))
    assert same.num_made == 0 and same.fingerprint == one.fingerprint
    for options in ({"tokenizer": str(tmp_path / "other")}, {"tokenizer": str(tmp_path / "one"), "eos": False}):
        corpus = opened(path, **options)
        assert corpus.num_made == len(shards_of(corpus)) and corpus.fingerprint != one.fingerprint


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 0x40
    path.write_bytes(content)


MASKED = [{"input_ids": row, "labels": [-100, *row[1:]]} for row in ROWS if len(row) > 1]


@pytest.mark.parametrize("name", ["tokens.bin", "labels.bin", "offsets.npy", "largest.npy", "rows.npy"])
@pytest.mark.parametrize("where", [9, -3])
def test_a_flipped_bit_is_noticed_and_mended(tmp_path, opened, caplog, name, where):
    """In a header of .npy, too, of which numpy raises what it likes."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [{"input_ids": []}, *MASKED]))
    before = opened(path)
    files = contents(before)
    flip(shards_of(before)[0] / name, where)
    after = opened(path)
    assert after.num_made == 1 and contents(after) == files
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"data: {shards_of(before)[0]} is damaged and is made anew"
    ]


def test_offsets_of_another_shard_are_noticed(tmp_path, opened):
    path = write_rows(tmp_path / "rows.jsonl")
    before = opened(path)
    target = shards_of(before)[3] / "offsets.npy"
    offsets = np.load(target)
    offsets[1] = -5
    np.save(target, offsets)
    after = opened(path)
    assert after.num_made == 1 and documents(after) == ROWS


def test_tokens_are_read_for_their_digests_once(tmp_path, opened, monkeypatch, caplog):
    path = write_rows(tmp_path / "rows.jsonl")
    total = len(shards_of(opened(path)))
    read: list[str] = []
    honest = shards._digest
    monkeypatch.setattr(shards, "_digest", lambda path: (read.append(path.name), honest(path))[1])

    def read_by_a_start() -> int:
        read.clear()
        assert documents(opened(path)) == ROWS
        return read.count("tokens.bin")

    assert read_by_a_start() == 0  # the build knows what it wrote
    shutil.move(tmp_path / "cache", tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "cache")
    caplog.set_level("INFO")
    assert read_by_a_start() == total and f"comparing {total} shards with their digests" in caplog.text
    assert read_by_a_start() == 0
    copied = contents(opened(path))
    monkeypatch.setattr(os, "access", lambda *_: False)
    for checked in (tmp_path / "cache").rglob(shards.CHECKED):
        checked.unlink()
    assert read_by_a_start() == 0 and "cannot be written: its tokens are not compared" in caplog.text
    assert contents(opened(path)) == copied


@pytest.mark.parametrize("fault", ["tokens", "head", "offsets", "catalog", "gone"])
def test_damage_is_noticed_and_mended(tmp_path, opened, fault):
    path = write_rows(tmp_path / "rows.jsonl")
    before = opened(path)
    folder = shards_of(before)[5]
    if fault == "tokens":
        os.truncate(folder / "tokens.bin", (folder / "tokens.bin").stat().st_size - 2)
    elif fault == "head":
        (folder / "shard.json").write_text((folder / "shard.json").read_text().replace('"tokens": ', '"tokens": 1'))
    elif fault == "offsets":
        (folder / "offsets.npy").unlink()
    elif fault == "catalog":
        (catalog,) = (tmp_path / "cache/sources").iterdir()
        catalog.write_text(catalog.read_text().replace(", 0, ", ", 1, ", 1))
    else:
        shutil.rmtree(folder)
    after = opened(path)
    assert after.num_made == (fault != "catalog")
    assert documents(after) == ROWS and after.fingerprint == before.fingerprint


def test_a_file_that_changes_while_it_is_read_is_named(tmp_path, opened, monkeypatch):
    path = write_rows(tmp_path / "rows.jsonl")
    read = formats.JsonLines.read

    def changing(self, *rest):
        write_rows(path, ROWS[::-1])
        return read(self, *rest)

    monkeypatch.setattr(formats.JsonLines, "read", changing)
    with pytest.raises(ValueError, match=r"rows.jsonl: the file has changed while it was read; start again"):
        opened(path)
    monkeypatch.undo()
    assert documents(opened(path)) == ROWS[::-1]


def test_a_full_disk_and_a_folder_that_cannot_be_written_are_one_line(tmp_path, opened):
    path = write_rows(tmp_path / "rows.jsonl", [list(range(5000))] * 2)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, hard))
    try:
        with pytest.raises(
            ValueError, match=r"data.cache_dir='.*cache': cannot be written \(File too large\); free some"
        ):
            opened(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert documents(opened(path)) == [list(range(5000))] * 2
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"data.cache_dir='.*file/x': cannot be written \(Not a directory\)"):
        opened(path, cache="file/x")


@pytest.mark.slow
def test_workers_make_the_same_files_and_find_the_same_wrong(tmp_path, opened):
    small_tokenizers.byte_pairs(tmp_path / "bpe")
    path = tmp_path / "text.jsonl"
    lines = [json.dumps({"text": text * 3}) for text in small_tokenizers.LINES * 5]
    path.write_text("\n".join([*lines, "{", *lines[:2], "}"]))
    alone = opened(path, "alone", tokenizer=str(tmp_path / "bpe"), on_broken="skip")
    assert alone.num_made > 2 and alone.left_out == {"malformed JSON": (2, f"{path} row {len(lines)}")}
    with pytest.raises(ValueError, match=rf"row {len(lines)}: malformed JSON"):  # in the last part
        opened(path, "two", tokenizer=str(tmp_path / "bpe"), workers=2)
    by_two = opened(path, "two", tokenizer=str(tmp_path / "bpe"), on_broken="skip")
    assert by_two.num_made == 0 and contents(by_two) == contents(alone)


def test_a_worker_that_dies_is_an_error_and_a_start_goes_on(tmp_path, opened, monkeypatch):
    path = write_rows(tmp_path / "rows.jsonl")
    total = opened(path, "whole").num_made
    with monkeypatch.context() as patched:
        patched.setattr(indexing, "_begin_worker", data_ranks.begin_deadly_worker)
        with pytest.raises(ValueError, match=r"data.workers=1: a worker died \(killed, .*start again to go on there"):
            opened(path, workers=1)
    corpus = opened(path)
    assert corpus.num_made == total - 2
    assert documents(corpus) == ROWS


def children_of(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    found = [int(text) for task in tasks for text in task.read_text().split()]
    return [*found, *(inner for child in found for inner in children_of(child))]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_a_killed_build_is_gone_on_with_by_whoever_waits(tmp_path, opened):
    """SIGKILL to the builder in the middle: its workers end, the one that waits takes over, nothing is made twice."""
    rows = ROWS * 3
    for index, row in enumerate(rows):
        rows[index] = [*row, index]  # no two parts are equal
    path = write_rows(tmp_path / "rows.jsonl", rows)
    whole = opened(path, "whole")

    def start(name: str, workers: int) -> subprocess.Popen[bytes]:
        command = [sys.executable, data_ranks.__file__, str(path), str(tmp_path / "cache"), str(workers)]
        with open(tmp_path / name, "w") as said:
            return subprocess.Popen(command, stdout=said, stderr=said)

    def wait_until(reached: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 100
        while not reached() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert reached(), [
            (tmp_path / name).read_text() for name in ("builder", "waiter") if (tmp_path / name).exists()
        ]

    running = [start("builder", 1)]
    try:
        wait_until(lambda: sum(1 for _ in (tmp_path / "cache/shards").glob("*/*")) >= 2)
        running.append(start("waiter", 0))
        wait_until(lambda: "waiting for another process" in (tmp_path / "waiter").read_text())
        workers = children_of(running[0].pid)
        running[0].send_signal(signal.SIGKILL)
        assert running[1].wait(100) == 0, (tmp_path / "waiter").read_text()
    finally:
        for process in running:
            process.kill()
            process.wait()
    fingerprint, num_made = json.loads((tmp_path / "waiter").read_text().splitlines()[-1])
    assert 0 < num_made < whole.num_made and fingerprint == whole.fingerprint
    corpus = opened(path)
    assert corpus.num_made == 0 and contents(corpus) == contents(whole)
    assert not list((tmp_path / "cache/building").iterdir())
    wait_until(lambda: not any(map(alive, workers)))
    assert workers


def lock_of(path: Path, cache: Path) -> Path:
    recipe = indexing.Recipe(str(path), DataOptions(cache_dir=str(cache)))
    return recipe.cache / indexing.LOCKS / indexing.Catalog(recipe.source, recipe.cache).name


def wait_until(reached: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("on_broken", ["error", "skip"])
def test_who_waits_for_the_same_says_what_the_builder_found_wrong(tmp_path, opened, caplog, on_broken):
    """And whoever waits with other options tries it with those."""
    path = write_rows(tmp_path / "rows.jsonl")
    said: list[str] = []

    def wait() -> None:
        try:
            said.append(f"{opened(path, on_broken=on_broken).num_made > 0}")
        except ValueError as error:
            said.append(str(error))

    waiter = threading.Thread(target=wait)
    caplog.set_level("INFO")
    recipe = indexing.Recipe(str(path), DataOptions(cache_dir=str(tmp_path / "cache")))
    lock = lock_of(path, tmp_path / "cache")
    with pytest.raises(ValueError, match="row 3 is odd"), build_lock.build_lock(lock, recipe.key):
        waiter.start()
        wait_until(lambda: "waiting for another process" in caplog.text)
        raise ValueError("row 3 is odd")
    waiter.join(30)
    assert said == ["row 3 is odd" if on_broken == "error" else "True"]
    assert documents(opened(path)) == ROWS  # who comes later tries anew


HOLDER = """
import sys, time
from pathlib import Path
from flexsp.data.build_lock import build_lock
with build_lock(Path(sys.argv[1]), "key"):
    print("held", flush=True)
    time.sleep(1000)
"""


def test_a_builder_that_is_stopped_is_named_and_not_waited_for(tmp_path, opened, monkeypatch, caplog):
    monkeypatch.setattr(build_lock, "STOPPED_S", 4.0)
    monkeypatch.setattr(build_lock, "SAY_S", 0.5)
    path = write_rows(tmp_path / "rows.jsonl")
    lock = lock_of(path, tmp_path / "cache")
    caplog.set_level("INFO")
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(lock)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == b"held\n"
        holder.send_signal(signal.SIGSTOP)
        with pytest.raises(
            build_lock.BuilderStoppedError,
            match=rf"^data: process {holder.pid} on .*, which tokenizes the same source, has been stopped for 4 s",
        ):
            opened(path)
        assert f"waiting for process {holder.pid} on " in caplog.text
    finally:
        holder.kill()
        holder.communicate()
    assert documents(opened(path)) == ROWS


def test_a_builder_of_another_machine_or_that_runs_is_waited_for(tmp_path, monkeypatch):
    """Of another machine a process id says nothing, and it may be stopped a while."""
    monkeypatch.setattr(build_lock, "STOPPED_S", 0.0)
    states = iter(["here", *["there"] * 100])
    path = tmp_path / "lock"
    held: list[str] = []

    def wait() -> None:
        with build_lock.build_lock(path, "key"):
            held.append("held")

    with monkeypatch.context() as patched:
        patched.setattr(build_lock, "_stands_still", lambda pid: True)
        patched.setattr(build_lock, "_machine", lambda: next(states))
        waiter = threading.Thread(target=wait)
        with build_lock.build_lock(path, "key"):
            waiter.start()
            time.sleep(4 * build_lock.POLL_S)
            assert waiter.is_alive() and held == []
        waiter.join(30)
    assert held == ["held"]


@pytest.mark.slow
def test_a_worker_that_is_stopped_is_killed_and_the_build_ends(tmp_path, opened, monkeypatch):
    monkeypatch.setattr(build_lock, "STOPPED_S", 1.0)
    monkeypatch.setattr(indexing, "_begin_worker", data_ranks.begin_stopped_worker)
    path = write_rows(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match=r"data.workers=1: a worker died \(killed, .*start again to go on there"):
        opened(path, workers=1)
    assert documents(opened(path)) == ROWS


def test_one_rank_builds_and_all_see_the_same(ranks, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl")
    found = ranks(2).run(data_ranks.opened_by_rank, str(path), str(tmp_path / "cache"))
    fingerprints, made, errors = zip(*found, strict=True)
    assert len(set(fingerprints)) == 1 and errors == ("", "")
    assert min(made) == 0 and max(made) > 10  # rank 0 has a head start of a second, which a busy machine may take


def test_ranks_that_see_other_data_say_so_all_alike(ranks, tmp_path):
    for rank in range(2):
        write_rows(tmp_path / f"{rank}.jsonl", [*ROWS, [rank]])
    found = ranks(2).run(data_ranks.opened_by_rank, str(tmp_path), str(tmp_path / "caches"), True)
    said = {error.replace("0.jsonl", "R.jsonl").replace("1.jsonl", "R.jsonl") for _, _, error in found}
    assert said == {
        f"data.source='{tmp_path}/R.jsonl': ranks [1] see other tokens than rank 0; give all nodes the same files and "
        f"the same tokenizer"
    }
    (tmp_path / "1.jsonl").write_text("{\n")
    found = ranks(2).run(data_ranks.opened_by_rank, str(tmp_path), str(tmp_path / "caches"), True)
    assert [error for _, _, error in found] == [found[0][2]] * 2
    assert "1.jsonl row 0: malformed JSON" in found[0][2]
