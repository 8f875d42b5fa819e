"""What Linux says of processes: who lives, who descends from whom, what they hold. Reads /proc alone."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROC = Path("/proc")


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What one process holds."""

    rss_bytes: int
    """Resident memory, pages shared with others included."""
    pss_bytes: int
    """The same, each shared page divided by those who share it."""
    own_bytes: int
    """Pages that no other process has: what would be freed if it ended."""
    open_files: int
    threads: int


def alive(pid: int) -> bool:
    """Whether it runs, any thread of it; one that has ended and waits for its parent to ask does not."""
    try:
        ended = PROC.joinpath(str(pid), "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
        return not ended or len(os.listdir(PROC / str(pid) / "task")) > 1
    except OSError:
        return False


def descendants(pid: int) -> list[int]:
    """Those started by a process, by those, and so on."""
    found: list[int] = []
    rest = [pid]
    while rest:
        for task in PROC.joinpath(str(rest.pop())).glob("task/*/children"):
            try:
                children = [int(text) for text in task.read_text().split()]
            except OSError:  # it has ended meanwhile
                continue
            found += children
            rest += children
    return found


def command(pid: int) -> str:
    """Its command line; empty where it has ended."""
    try:
        return PROC.joinpath(str(pid), "cmdline").read_text(errors="replace").replace("\0", " ").strip()
    except OSError:
        return ""


def environment(pid: int) -> dict[str, str]:
    """What it was started with; empty where it has ended or is another user's."""
    try:
        text = PROC.joinpath(str(pid), "environ").read_text(errors="replace")
    except OSError:
        return {}
    return dict(entry.split("=", 1) for entry in text.split("\0") if "=" in entry)


def marked(key: str, value: str) -> list[int]:
    """All that run with this in their environment, whoever their parent is by now."""
    pids = [int(path.name) for path in PROC.iterdir() if path.name.isdigit()]
    return [pid for pid in pids if environment(pid).get(key) == value and alive(pid)]


def held(pid: int) -> Held | None:
    """What a process holds now; None where it has ended."""
    folder = PROC / str(pid)
    try:
        memory = _kilobytes((folder / "smaps_rollup").read_text())
        threads = len(os.listdir(folder / "task"))
        open_files = len(os.listdir(folder / "fd"))
    except OSError:
        return None
    return Held(
        rss_bytes=memory["Rss"] * 1024,
        pss_bytes=memory["Pss"] * 1024,
        own_bytes=(memory["Private_Clean"] + memory["Private_Dirty"]) * 1024,
        open_files=open_files,
        threads=threads,
    )


def _kilobytes(text: str) -> Mapping[str, int]:
    rows = (line.split() for line in text.splitlines())
    return {row[0].rstrip(":"): int(row[1]) for row in rows if len(row) == 3 and row[2] == "kB"}


def provenance(versions: Mapping[str, str]) -> dict[str, Any]:
    """Machine, date, versions and commit of a result."""
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {platform.system()}",
        "date": datetime.date.today().isoformat(),
        "versions": {**versions, "python": platform.python_version()},
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "src") else ""),
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip()
