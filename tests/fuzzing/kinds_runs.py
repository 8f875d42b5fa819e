"""What a run reads again: its corpus, its checkpoints, and what it learned and wrote down in its folder."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import Metadata

import checkpoint_ranks as do
from flexsp.batches import Overlong
from flexsp.data import DataOptions, apply_context_limit, open_corpus
from flexsp.profile import Profile
from flexsp.train.checkpoint import FOLDER, Checkpoints, load_checkpoint
from flexsp.train.digests import STATE, SUFFIX, write_digests
from flexsp.train.learn import FILE, STARTED_FROM, go_on, profile_sha256
from flexsp.train.resume import find_start
from flexsp.watch.rows import last_rows
from fuzzing import mutate, schema
from fuzzing.attempt import Broken, Refused, Tried, expect, library, written
from fuzzing.kinds_documents import fault_of, json_input, rich_profile
from fuzzing.kinds_lengths import corpus_rows


class CorpusKind:
    """A .jsonl or .parquet file of token ids and labels."""

    name = "corpus"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def try_one(self, random: Random) -> Tried:
        suffix, data, expected, what = corpus_rows(random)
        if random.random() < 0.3:
            data, more = mutate.raw(data, random)
            what, expected = f"{what}; {more}", None
        path, cache = written(self.folder / f"rows{suffix}", data), self.folder / "cache"
        found = library(lambda: _all_of(str(path), cache), (str(path),))
        shutil.rmtree(cache, ignore_errors=True)
        refused = isinstance(found, Refused)
        if expected == "refuse" and not refused:
            raise Broken(f"accepted: {what}")
        if isinstance(expected, list) and found != expected:
            raise Broken(f"read as {getattr(found, 'text', found)} instead of {expected}: {what}")
        return Tried(not refused, what)


def _all_of(path: str, cache: Path) -> list[list[int]]:
    """The tokens of each document."""
    corpus = open_corpus(path, DataOptions(cache_dir=str(cache)))
    sequences, _ = apply_context_limit(corpus, 1 << 20, Overlong.ERROR)
    found = []
    for document, length in enumerate(sequences.corpus.lengths):
        tokens, labels = corpus.read(document, 0, int(length))
        if len(tokens) != length or len(labels) != length or (len(tokens) and tokens.max() > corpus.largest.max()):
            raise Broken(f"document {document} of {length} tokens is read as {len(tokens)} with {len(labels)} labels")
        found.append([int(token) for token in tokens])
    return found


class RunFolderKind:
    """profile.json as it was learned, logs, and the state.json of a checkpoint."""

    name = "run folder"

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "run"
        self.started_from = Profile.from_json(rich_profile(4))
        learned = self.started_from.to_json()
        learned["provenance"] = {**learned["provenance"], STARTED_FROM: profile_sha256(self.started_from)}
        self.learned = learned
        self.config = replace(do.config_of(str(self.folder)))
        self.state = {
            "format": "flexsp-checkpoint/1", "step": 3, "world_size": 1, "versions": {},
            "config": _config_json(self.config), "schedule": {"last_epoch": 3, "_step_count": 4, "_last_lr": [0.06]},
            "profile": learned,
        }  # fmt: skip

    def try_one(self, random: Random) -> Tried:
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        return random.choice((self._learned, self._state, self._log))(random)

    def _learned(self, random: Random) -> Tried:
        data, what = json_input(self.learned, random)
        path = written(self.folder / FILE, data)
        fault = fault_of(data, schema.PROFILE)
        found = library(lambda: go_on(self.started_from, self.folder, random.random() < 0.5), (str(path),))
        expect(isinstance(found, Refused), fault, what)
        return Tried(not isinstance(found, Refused), what)

    def _state(self, random: Random) -> Tried:
        data, what = json_input(self.state, random)
        names = ["step-00000003"] * 6 + ["step-3", "step-00000004", "step-x", "step--1", "step-", "step-00000003.part"]
        name = random.choice(names)
        (self.folder / FOLDER / name).mkdir(parents=True)
        path = written(self.folder / FOLDER / name / STATE, data)
        fault = fault_of(data, schema.STATE)
        found = library(lambda: _start(self.config), (str(path.parent), "train.", "model.", "data."))
        refused = isinstance(found, Refused)
        if name in names[:7]:
            expect(refused, fault, what)
        return Tried(not refused, f"{name}: {what}")

    def _log(self, random: Random) -> Tried:
        rows = [{"step": step, "loss": 2.5, "ids": [1, 2]} for step in range(4)]
        lines = [json.dumps(row).encode() for row in rows]
        at = random.randrange(4)
        lines[at], what = mutate.raw(lines[at], random) if random.random() < 0.5 else json_input(rows[at], random)
        path = written(self.folder / "metrics.jsonl", b"\n".join(lines) + b"\n")
        found = library(lambda: last_rows(path), (str(path),))
        return Tried(not isinstance(found, Refused), what)


def _start(config: Any) -> Any:
    start = find_start(config)
    return start and (start, start.profile)


def _config_json(config: Any) -> Any:
    from dataclasses import asdict

    return json.loads(json.dumps(asdict(config)))


class CheckpointKind:
    """A checkpoint's folder: its files cut, flipped, exchanged, taken away, and pickles that would do harm."""

    name = "checkpoint"

    def __init__(self, folder: Path) -> None:
        self.run = folder / "run"
        self.keep = folder / "keep"
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        self.config = do.config_of(str(self.keep))
        self.state = do.built(self.config, 0)
        checkpoints = Checkpoints(self.config, do.control())
        for step in range(2):
            do.step(*self.state, step)
        checkpoints.save(2, *self.state, Profile.from_json(rich_profile(4)))
        checkpoints.finish()
        self.saved = self.keep / FOLDER / "step-00000002"
        self.path = self.run / FOLDER / "step-00000002"
        self.config = do.config_of(str(self.run))
        self.made = folder / "made"

    def try_one(self, random: Random) -> Tried:
        shutil.rmtree(self.run, ignore_errors=True)
        shutil.copytree(self.saved, self.path)
        what, must = self._change(random)
        names = (str(self.path), "checkpoint", "train.", "data.", "model.")
        found = library(self._load, names)
        refused = isinstance(found, Refused)
        if self.made.exists():
            self.made.unlink()
            raise Broken(f"something in it was executed: {what}")
        if must and not refused:
            raise Broken(f"accepted: {what}")
        return Tried(not refused, what)

    def _load(self) -> None:
        start = find_start(self.config)
        if start is None:
            raise ValueError(f"{self.path}: is not taken for a checkpoint")
        load_checkpoint(start.path, start.state, *self.state)

    def _change(self, random: Random) -> tuple[str, bool]:
        """Changes the copy; what, and whether it must be refused."""
        file = random.choice(sorted(self.path.iterdir()))
        how = random.choice(
            ("raw", "raw", "raw", "remove", "empty", "exchange", "pickle", "metadata", "extra", "folder")
        )
        what, must = f"{how} {file.name}", True
        if how == "raw":
            data, more = mutate.raw(file.read_bytes(), random)
            must = data != file.read_bytes()
            file.write_bytes(data)
            what = f"{what} {more}"
        elif how == "remove":
            file.unlink()
        elif how == "empty":
            file.write_bytes(b"")
        elif how == "folder":
            file.unlink()
            file.mkdir()
        elif how == "exchange":
            other = random.choice(sorted(self.path.iterdir()))
            must = other != file and {file.suffix, other.suffix} != {SUFFIX}  # lists of digests are read together
            one, two = file.read_bytes(), other.read_bytes()
            file.write_bytes(two)
            other.write_bytes(one)
        elif how == "pickle":
            (self.path / ".metadata").write_bytes(_evil(self.made, random))
        elif how == "metadata":
            what, must = f"metadata {self._metadata(random)}", False
        else:
            must = False
            written(self.path / random.choice(("x", "__9_0.distcp", "step-00000003", ".metadata.tmp")), b"\x80\x04.")
        if how in ("raw", "pickle", "metadata", "empty") and file.name != STATE and random.random() < 0.5:
            what, must = f"{what}, with digests made anew", how == "pickle"
            listed = {each.name for each in self.path.iterdir() if each.suffix != SUFFIX}
            for old in self.path.glob(f"*{SUFFIX}"):
                old.unlink()
            write_digests(self.path, listed, "all")
        return what, must

    def _metadata(self, random: Random) -> str:
        """A list of tensors that is one, with other values."""
        path = self.path / ".metadata"
        with open(path, "rb") as stream:
            metadata: Metadata = pickle.load(stream)
        storage, entries = metadata.storage_data, metadata.state_dict_metadata
        key = random.choice(list(storage))
        how = random.choice(("path", "offset", "length", "size", "dtype", "lost", "none"))
        if how == "path":
            outside = random.choice(("/etc/passwd", "../../../../keep/x", "/dev/zero", "nothing", "", str(self.made)))
            storage[key] = replace(storage[key], relative_path=outside)
        elif how in ("offset", "length"):
            storage[key] = replace(storage[key], **{how: random.choice((-1, 0, 10**18, 2**70, None, "x"))})
        elif how == "lost":
            del storage[key]
        else:
            name = random.choice(list(entries))
            entry = entries[name]
            if how == "none" or not hasattr(entry, "size"):
                entries[name] = None
            elif how == "size":
                entry.size = torch.Size([10**6, 10**6, 10**3])
            else:
                entry.properties.dtype = torch.float64
        path.write_bytes(pickle.dumps(metadata))
        return f"{how} of {key.fqn}"


class _Evil:
    """Its pickle calls something when it is read."""

    def __init__(self, call: Any, arguments: tuple[Any, ...]) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> Any:
        return self.call, self.arguments


def _evil(made: Path, random: Random) -> bytes:
    touch = f"touch {made}"
    calls = (
        (os.system, (touch,)), (open, (str(made), "w")), (eval, (f"open({str(made)!r}, 'w')",)),
        (exec, (f"open({str(made)!r}, 'w')",)), (shutil.copy, ("/etc/hostname", str(made))),
        (torch.load, ("/etc/passwd",)), (np.save, (str(made), 1)), (getattr, (dict, "fromkeys")),
    )  # fmt: skip
    if random.random() < 0.2:
        return f"cposix\nsystem\n(S'{touch}'\ntR.".encode()
    return pickle.dumps(_Evil(*random.choice(calls)), protocol=random.choice((0, 2, 4, 5)))
