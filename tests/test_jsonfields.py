"""Reading and writing JSON: what is refused, whatever the format. Most of these were found by tests/fuzzing."""

from __future__ import annotations

import errno
import json
import os
import stat
import threading
from pathlib import Path

import pytest

from flexsp import jsonfields as jf


def read(path, text):
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return jf.read_object(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": 1, "a": 2}', r"f.json: is not JSON \(the field 'a' is there twice\)"),
        ('{"a": {"b": 1, "b": 1}}', r"the field 'b' is there twice"),
        ('{"a": NaN}', r"NaN is no number of JSON"),
        ('{"a": -Infinity}', r"-Infinity is no number of JSON"),
        ('{"a": ' + "9" * 5000 + "}", r"f.json: is not JSON \(Exceeds the limit"),
        ('{"a": ' + "[" * 100 + "]" * 100 + "}", r"f.json: is nested more than 64 deep"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", r"f.json: is nested more than 64 deep"),
        ("\ufeff{}", r"f.json: is not JSON \(Unexpected UTF-8 BOM"),
        (b"{\xff}", r"f.json: is not text"),
        ("[]", r"f.json=\[\] must be a JSON object"),
        ("", r"f.json: is not JSON"),
    ],
)
def test_what_is_no_plain_json_object_is_refused(tmp_path, text, message):
    with pytest.raises(ValueError, match=message) as raised:
        read(tmp_path / "f.json", text)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_a_file_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(jf, "MOST_BYTES", 1 << 20)
    with pytest.raises(ValueError, match=r"/dev/zero: must be at most 1 MiB; give a JSON file"):
        jf.read_object("/dev/zero")
    assert read(tmp_path / "f.json", '{"a": [[1]]}') == {"a": [[1]]}


@pytest.mark.parametrize("path", ["", "x\0y", "/" + "d/" * 3000, "/dev/null/x"])
def test_paths_that_cannot_be(path):
    with pytest.raises(ValueError, match=r"(cannot be read|embedded null byte).*; give a JSON file"):
        jf.read_object(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 10**400, 1e31, -1, True, "1", None])
def test_what_is_no_number_of_a_quantity(value):
    with pytest.raises(ValueError, match=r"^x=.* must be "):
        jf.as_number(value, "x")


def test_numbers_and_integers_have_bounds():
    assert jf.as_number(10**30, "x") == 10**30 and jf.as_number(0, "x") == 0
    assert jf.as_integer(2**63 - 1, "x") == 2**63 - 1
    with pytest.raises(ValueError, match=r"x=1e-31 must be at least 1e-30"):
        jf.as_number(1e-31, "x", positive=True)
    for value in (2**63, -(2**63), 10**4000):
        with pytest.raises(ValueError, match=r"^x=.{,61} must be at most 9,223,372,036,854,775,807; correct it"):
            jf.as_integer(value, "x")


def test_a_device_stays_a_device(tmp_path):
    """Renaming a file onto /dev/null would replace it; here a pipe stands for it."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    reader = os.open(path, os.O_RDWR)
    jf.write_object(path, {"a": 1})
    assert stat.S_ISFIFO(os.stat(path).st_mode) and json.loads(os.read(reader, 100)) == {"a": 1}
    os.close(reader)


def test_two_who_write_one_file_do_not_meet(tmp_path):
    """Runs that are started together may save one profile."""
    path, documents = tmp_path / "one.json", [{"who": index, "rest": [index] * 50 * (index + 1)} for index in range(3)]
    wrong: list[Exception] = []

    def write(document: dict) -> None:
        try:
            for _ in range(100):
                jf.write_object(path, document)
                assert jf.read_object(path) in documents
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=write, args=(document,)) for document in documents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert [each.name for each in tmp_path.iterdir()] == ["one.json"]


def test_what_is_to_outlive_a_loss_of_power_lies_on_the_disk_before_its_name_and_the_name_after(tmp_path, monkeypatch):
    seen: list[str] = []
    fsync, rename = os.fsync, os.replace

    def noting(file: int) -> None:
        seen.append(Path(os.readlink(f"/proc/self/fd/{file}")).name)
        fsync(file)

    def renaming(old: Path, new: Path) -> None:
        seen.append(Path(new).name)
        rename(old, new)

    monkeypatch.setattr(os, "fsync", noting)
    monkeypatch.setattr(os, "replace", renaming)
    jf.write_object(tmp_path / "in" / "p.json", {"a": 1})
    assert seen == ["p.json"]
    jf.write_object(tmp_path / "in" / "p.json", {"a": 1}, synced=True)
    aside, *rest = seen[1:]
    assert aside.startswith(".p.json.") and rest == ["p.json", "in"]


def test_what_a_file_system_cannot_sync_is_written_all_the_same(tmp_path, monkeypatch):
    def refuse(code: int) -> None:
        def fsync(_: int) -> None:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "fsync", fsync)

    refuse(errno.EINVAL)
    jf.write_object(tmp_path / "p.json", {"a": 1}, synced=True)
    assert jf.read_object(tmp_path / "p.json") == {"a": 1}
    refuse(errno.EIO)
    with pytest.raises(ValueError, match=r"p\.json: cannot be written \(Input/output error\)"):
        jf.write_object(tmp_path / "p.json", {"a": 2}, synced=True)


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"folder: cannot be written"):
        jf.write_object(tmp_path / "folder", {})
    with pytest.raises(ValueError, match=r"f.json: a number is infinite"):
        jf.write_object(tmp_path / "f.json", {"a": float("inf")})
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
