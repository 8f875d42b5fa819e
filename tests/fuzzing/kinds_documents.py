"""Profiles, plans and plan logs: JSON documents with a schema."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from random import Random
from typing import Any

import flexsp
from flexsp.planner.replay import read_plan_log
from flexsp.plans import Plan
from flexsp.profile import Profile
from fuzzing import mutate, oracle, schema
from fuzzing.attempt import Broken, Refused, Tried, command, expect, library, written
from profiles import profile_json

LENGTHS = [390, 90, 60, 30, 30, 20, 10, 5]


def rich_profile(num_devices: int) -> dict[str, Any]:
    """A profile with every field that there is."""
    document = profile_json(num_devices)
    document["memory"]["policies"] = {"full": {"activation_bytes_per_token": 4, "compute_factor": 1.33}}
    document["memory"]["unsharded_bytes"] = 400
    document["layouts"] = {"2": {"ulysses": 1, "ring": 2}}
    document["optimizer_s"] = 0.05
    document["tables"] = {"1": {"lengths": [8, 64, 512], "seconds_per_token": [2e-3, 3e-3, 5e-3]}}
    document["provenance"] = {"source": "estimated", "fit": {"r2": 0.99}, "assumptions": ["a"], "fields": {"x": "y"}}
    return document


def json_input(base: Any, random: Random) -> tuple[bytes, str]:
    """A wrong file of a well-formed document: by structure, and one in four by bytes too."""
    document, what = mutate.document(base, random)
    data, how = mutate.json_text(document, random)
    if random.random() < 0.25:
        data, more = mutate.raw(json.dumps(base).encode() if random.random() < 0.5 else data, random)
        how = f"{how}; {more}"
    return data, f"{what} ({how})"


def fault_of(data: bytes, kind: Any) -> str | None:
    """What is wrong with a file, by a careful reader and the schema."""
    try:
        return schema.fault(mutate.strict_json(data), kind)
    except ValueError as error:
        return str(error)


def fixed_point(value: Any, read: Any) -> None:
    """
    Raises:
        Broken: written and read again, it is another.
    """
    document = value.to_json()
    again = read(json.loads(json.dumps(document, allow_nan=False)))
    if again != value or again.to_json() != document:
        raise Broken("written and read again it is another")


class ProfileKind:
    """`flexsp show`, `plan`, `simulate` and the library with a wrong profile."""

    name = "profile"

    def __init__(self, folder: Path) -> None:
        self.path = folder / "profile.json"
        self.plan_path = folder / "plan.json"
        self.bases = [profile_json(4), rich_profile(4), rich_profile(16), profile_json(1)]
        for base in self.bases:  # the first plan compiles the planner, which takes longer than an input may
            flexsp.plan(LENGTHS, Profile.from_json(base))

    def try_one(self, random: Random) -> Tried:
        data, what = json_input(random.choice(self.bases), random)
        written(self.path, data)
        fault = fault_of(data, schema.PROFILE)
        names = (str(self.path),)
        found = library(lambda: Profile.load(self.path), names)
        refused = isinstance(found, Refused)
        expect(refused, fault, what)
        if not refused:
            fixed_point(found, Profile.from_json)
        how = random.choice(("show", "show", "plan", "plan", "simulate") if not refused else ("show", "plan"))
        if how == "show":
            said = command(["show", str(self.path)], names)
        elif how == "plan":
            said = self._plan(random, refused)
        else:
            lengths = "\n".join(map(str, LENGTHS * 3)).encode()
            argv = ["simulate", "-", "--profile", str(self.path), "--batch-size", "8", "--iterations", "2"]
            said = command([*argv, "--workers", "1"], (*names, "static", "length", "planner", "tokens"), lengths)
        if refused != (said.status == 2) and (how == "show" or refused):
            raise Broken(f"the library {'refuses' if refused else 'accepts'}, flexsp {how} ends with {said.status}")
        return Tried(not refused, what)

    def _plan(self, random: Random, refused: bool) -> Any:
        planner = random.choice(("flex", "flex", "static", "batch-adaptive"))
        self.plan_path.unlink(missing_ok=True)
        argv = ["plan", "-", "--profile", str(self.path), "--planner", planner, "--output", str(self.plan_path)]
        names = (str(self.path), "infeasible", "unknown", "lengths", "planner")
        said = command(argv, names, "\n".join(map(str, LENGTHS)).encode())
        if said.status == 0:
            document = json.loads(self.plan_path.read_bytes())
            if not oracle.legal(LENGTHS, json.loads(self.path.read_bytes()), document):
                raise Broken(f"{planner} made an illegal plan")
        return said


class PlanKind:
    """`flexsp check`, `simulate --plan` and the library with a wrong plan; legality against an independent check."""

    name = "plan"

    def __init__(self, folder: Path) -> None:
        self.path, self.profile_path = folder / "plan.json", folder / "profile.json"
        self.lengths_path = written(folder / "lengths.txt", "\n".join(map(str, LENGTHS)).encode())
        self.profile = rich_profile(4)
        written(self.profile_path, json.dumps(self.profile).encode())
        profile = Profile.from_json(self.profile)
        self.bases = [flexsp.plan(LENGTHS, profile, name).to_json() for name in ("flex", "batch-adaptive", "static")]
        by_hand = copy.deepcopy(self.bases[0])
        for key in ("predicted_s", "lengths_sha256", "status", "reason", "lower_bound_s", "solve_s", "planner"):
            del by_hand[key]
        self.bases += [by_hand, {**self.bases[0], "status": "unknown", "reason": "stopped", "micro_batches": []}]

    def try_one(self, random: Random) -> Tried:
        base = random.choice(self.bases)
        if random.random() < 0.4:
            document, what = _moved(base, random)
            data = json.dumps(document).encode()
        else:
            data, what = json_input(base, random)
        written(self.path, data)
        fault = fault_of(data, schema.PLAN)
        found = library(lambda: Plan.load(self.path), (str(self.path),))
        refused = isinstance(found, Refused)
        expect(refused, fault, what)
        if not refused:
            fixed_point(found, Plan.from_json)
        if random.random() < 0.15:
            argv = ["simulate", str(self.lengths_path), "--profile", str(self.profile_path), "--plan", str(self.path)]
            said = command([*argv, "--workers", "1"], (str(self.path), "--plan"))
            if said.status == 0 and not oracle.legal(LENGTHS, self.profile, json.loads(data)):
                raise Broken("an illegal plan was simulated")
            return Tried(not refused, what)
        said = command(["check", str(self.lengths_path), str(self.profile_path), str(self.path)], (str(self.path),))
        if refused or not found.has_plan:
            if said.status != 2:
                raise Broken(f"there is no plan, and flexsp check ends with {said.status}")
        elif (said.status == 0) != oracle.legal(LENGTHS, self.profile, mutate.strict_json(data)):
            raise Broken(f"flexsp check ends with {said.status}, the oracle says otherwise: {said.out[:300]}")
        return Tried(not refused, what)


def _moved(base: Any, random: Random) -> tuple[Any, str]:
    """A plan of the right form whose sequences, ranks, digest or predictions are others."""
    made = copy.deepcopy(base)
    groups = [group for micro_batch in made["micro_batches"] for group in micro_batch["groups"]]
    if not groups:
        return made, "nothing"
    group, other = random.choice(groups), random.choice(groups)
    what = random.choice(("drop", "repeat", "move", "ranks", "shift", "digest", "seconds", "devices", "policy", "join"))
    if what == "drop":
        group["sequences"] = group["sequences"][:-1]
    elif what == "repeat":
        group["sequences"] = [*group["sequences"], random.choice((0, 1, 7, 8, -1, 2**63 - 1))]
    elif what == "move" and group["sequences"]:
        other["sequences"] = [*other["sequences"], group["sequences"].pop()]
    elif what == "ranks":
        group["ranks"] = random.choice(([], [0], [0, 1], [1, 0], [1, 2], [2, 3], [0, 1, 2], [0, 2], [-1], [4], [0, 0]))
    elif what == "shift":
        group["ranks"] = [rank + random.choice((1, -1, 2, 4)) for rank in group["ranks"]]
    elif what == "digest":
        made["lengths_sha256"] = random.choice(("0" * 64, "", str(base.get("lengths_sha256")).upper(), None))
    elif what == "seconds":
        made["predicted_s"] = random.choice((0, 1e-9, 1, 1e300, (base.get("predicted_s") or 1) * 1.001))
    elif what == "devices":
        made["num_devices"] = random.choice((1, 3, 5, 8, 2**62))
    elif what == "policy":
        random.choice(made["micro_batches"])["policy"] = random.choice(("full", "none", "", "constructor", None))
    else:
        made["micro_batches"].append({"groups": random.choice(([], [group], made["micro_batches"][0]["groups"]))})
    return made, what


class PlanLogKind:
    """The plans.jsonl of a run, as `planner.replay` reads it."""

    name = "plan log"

    def __init__(self, folder: Path) -> None:
        self.path = folder / "plans.jsonl"
        plan = flexsp.plan(LENGTHS, Profile.from_json(rich_profile(4))).to_json()
        self.rows = [{"step": step, "plan": plan} for step in range(4)]

    def try_one(self, random: Random) -> Tried:
        rows = list(self.rows)
        number = random.randrange(len(rows))
        whole = True
        lines = [json.dumps(row).encode() for row in rows]
        if random.random() < 0.6:
            document, what = mutate.document(rows[number], random)
            lines[number] = json.dumps(document).encode()
        else:
            lines[number], what = mutate.raw(lines[number], random)
            whole = False  # a row that a kill tore is left out, by design
        end = random.choice((b"", b"\n", b"\n\n", b'\n{"step": 9, "pl'))
        whole = whole and (end != b"" or number < 3)  # without its line's end, the last row too
        written(self.path, b"\n".join(lines) + end)
        fault = fault_of(lines[number], schema.PLAN_ROW) if whole else None
        found = library(lambda: read_plan_log(random.choice((self.path, self.path.parent))), (str(self.path),))
        refused = isinstance(found, Refused)
        expect(refused, fault, what)
        if not refused and whole and set(found) - {mutate.strict_json(line)["step"] for line in lines}:
            raise Broken("steps that no row has")
        return Tried(not refused, what)
