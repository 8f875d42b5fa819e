"""The flags of every command: missing, twice, of the wrong type, huge, and paths of anything but the file wanted."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any
from unittest.mock import patch

import flexsp
from flexsp.profile import Profile
from flexsp.train.profiling import profile_model
from flexsp.train.verify import verify_model
from fuzzing import mutate
from fuzzing.attempt import Tried, command, written
from fuzzing.kinds_documents import LENGTHS, rich_profile
from fuzzing.kinds_settings import LLAMA, run_flags

HOSTILE_NUMBERS = (
    "0", "-1", "1", "2", "3", "0.5", "nan", "inf", "-inf", "1e400", "1e300", "9" * 18, "9" * 40, "9" * 5000, "x", "",
    " ", "\uff11", "1_0", "0x10", "1,2", "4K", "-0", "+1", "None", "999999999999999999999K", "K", "1,,2", "1,1", ",",
)  # fmt: skip
TEXTS = tuple(text.replace("\x00", "").replace("\ud800", "") for text in mutate.TEXTS)
NUMBERS = {
    "plan": ("--sp-degree", "--max-length", "--num-devices", "--explain"),
    "lengths": ("--max-length", "--count", "--seed"),
    "estimate": ("--num-devices", "--sp-degrees", "--zero-stage", "--memory-fraction"),
    "show": ("--lengths",),
    "simulate": ("--max-length", "--num-devices", "--sp-degree", "--seed", "--workers", "--batch-size", "--iterations"),
    "check": (),
    "train": (),
    "profile": ("--sp-degrees", "--probe-tokens", "--memory-fraction", "--max-tokens-per-rank", "--num-devices"),
    "verify": ("--layers", "--tolerance"),
}  # fmt: skip
WORDS = {
    "plan": ("--planner", "--column", "--time-limit-s"),
    "lengths": ("--column",),
    "estimate": ("--dtype", "--cluster"),
    "show": (),
    "simulate": ("--overlong", "--policy", "--planners", "--column"),
    "check": ("--column",),
    "train": (),
    "profile": ("--dtype", "--weights", "--policies", "--cluster"),
    "verify": ("--dtype",),
}
SWITCHES = {
    "plan": ("--groups",), "lengths": ("--list",), "simulate": ("--timeline",), "profile": ("--no-shard-layers",),
}  # fmt: skip


class FlagsKind:
    """Every command in this process; what `train`, `profile` and `verify` do with ranks is left out."""

    name = "flags"

    def __init__(self, folder: Path) -> None:
        profile = rich_profile(4)
        del profile["memory"]["policies"]
        self.lengths = str(written(folder / "lengths.txt", "\n".join(map(str, LENGTHS)).encode()))
        self.profile = str(written(folder / "profile.json", json.dumps(profile).encode()))
        self.model = str(written(folder / "config.json", json.dumps(LLAMA).encode()))
        plan = flexsp.plan(LENGTHS, Profile.from_json(profile)).to_json()
        self.plan = str(written(folder / "plan.json", json.dumps(plan).encode()))
        self.config = str(written(folder / "run.toml", b'[model]\nconfig = {model_type = "llama"}\n'))
        self.folder = folder
        (folder / "dir").mkdir(exist_ok=True)
        out = str(folder / "out.json")
        self.bases = {
            "plan": [self.lengths, "--profile", self.profile, "--output", out],
            "check": [self.lengths, self.profile, self.plan],
            "lengths": [self.lengths, "--json", out],
            "estimate": ["--model", self.model, "--cluster", "a100-40", "--output", out],
            "show": [self.profile],
            "simulate": [self.lengths, "--profile", self.profile, "--batch-size", "8", "--iterations", "1"],
            "train": [self.config],
            "profile": [self.model, "--output", out],
            "verify": [self.model],
        }

    def try_one(self, random: Random) -> Tried:
        name = random.choice([*self.bases, "plan", "lengths", "estimate", "show"])
        argv = list(self.bases[name])
        for _ in range(random.choice((1, 1, 2, 3))):
            self._change(name, argv, random)
        argv = [name, *argv]
        if random.random() < 0.02:
            argv = random.choice(([], [""], ["x"], ["-x"], ["PLAN"], ["--version", "x"], [*argv, "--help"]))
        if any(each.startswith("/dev/") for each in argv) and "--output" in argv and name == "simulate":
            argv = [name]  # a folder beside it would be made in /dev
        with (
            patch("flexsp.train.run.train", lambda config, display, guard: None),
            patch("flexsp.train.profiling.profile_model", _checked_profile),
            patch("flexsp.train.verify.verify_model", _checked_verify),
        ):
            said = command(
                argv, (*argv, *(word.lstrip("-") for word in argv), *map(shlex.quote, argv), *ALWAYS), b"5\n7\n"
            )
        return Tried(said.status != 2, " ".join(argv)[:200])

    def _change(self, name: str, argv: list[str], random: Random) -> None:
        """Changes `argv` in place."""
        how = random.choice(("number", "number", "word", "path", "path", "drop", "twice", "unknown", "switch", "text"))
        if how == "number" and NUMBERS[name]:
            flag = random.choice(NUMBERS[name])
            # more work is what the flag asks for, no fault: few batches
            few = ("0", "-1", "1", "2", "nan", "x", "9" * 18, "9" * 5000, "")
            value = random.choice(few if flag in ("--iterations", "--batch-size") else HOSTILE_NUMBERS)
            argv += random.choice(([f"{flag}={value}"], [flag, value]))
        elif how == "word" and name == "train":
            argv += run_flags(random)[0]
        elif how == "word" and WORDS[name]:
            flag = random.choice(WORDS[name])
            words = (*TEXTS, "static", "0.01", "nan", "-1", "milp:x", "os:getcwd", "json:loads", "flexsp.plans:Plan")
            if flag == "--time-limit-s":
                words = ("0.01", "nan", "-1", "0", "x", "")
            argv += [f"{flag}={random.choice(words)}"]
        elif how == "path" and argv:
            paths = [i for i, each in enumerate(argv) if each.startswith("/")]
            if paths:
                argv[random.choice(paths)] = self._path(random)
        elif how == "drop" and argv:
            del argv[random.randrange(len(argv))]
        elif how == "twice" and argv:
            argv.append(random.choice(argv))
        elif how == "unknown":
            argv.insert(random.randrange(len(argv) + 1), random.choice(("--x", "-h5", "--pro", "--", "-", "-1", "--=")))
        elif how == "switch" and name in SWITCHES:
            argv += SWITCHES[name]
        elif how == "text" and argv:
            argv[random.randrange(len(argv))] = random.choice(TEXTS)

    def _path(self, random: Random) -> str:
        folder = str(self.folder)
        return random.choice(
            (
                folder, f"{folder}/dir", f"{folder}/none", f"{folder}/none.npy", f"{folder}/none.jsonl", "/dev/null",
                f"{folder}/none.parquet", "/dev/zero", f"{folder}/{'x' * 300}", f"{folder}/lengths.txt/x", "",
                self.lengths, self.profile, self.plan, self.model, self.config, f"{folder}/é\u202e", f"{folder}/dir/",
                f"{folder}/dir.json", f"{folder}/a\nb", "~", f"{folder}/../{self.folder.name}/lengths.txt", "wikipedia",
                "/proc/self/mem",
                "/" + "/".join(["d"] * 3000),
            )
        )  # fmt: skip


QUOTED = ("''", "' '")
ALWAYS = (
    "required",
    "COMMAND",
    "invalid choice",
    "expected",
    "LENGTHS",
    "infeasible",
    "standard input",
    "workers",
    "''",
    "' '",
)
"""What argparse says of an argument that is not there, and what is said of numbers in files that are right."""


def _checked_profile(request: Any, say: Any) -> int:
    """`profile_model` up to where it joins the ranks."""
    with patch("flexsp.train.profiling.Guard", _reached):
        return _status(lambda asked: profile_model(asked, say), request)


def _checked_verify(request: Any, say: Any, say_end: Any) -> int:
    """`verify_model` up to where it joins the ranks."""
    with patch("flexsp.train.verify.Guard", _reached):
        return _status(lambda asked: verify_model(asked, say, say_end), request)


class _Reached(Exception):
    pass


def _reached(*_: Any, **__: Any) -> None:
    raise _Reached


def _status(call: Callable[[Any], int], request: Any) -> int:
    try:
        return call(request)
    except _Reached:
        return 0
