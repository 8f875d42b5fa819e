"""A run that is killed again and again at random moments, and what must hold after each kill."""

from __future__ import annotations

import json
import random
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kills_proof import begins_at, read_log, trained_once, worst_difference
from kills_ranks import ByTorchrun, Nursery, Started, kill, seconds_until_ended, seconds_until_no_orphans
from processes import alive

STEPS, BATCH, EVERY, SEQUENCES = 200, 16, 3, 600
"""Of a run: five epochs of 37.5 steps and a bit, so that epochs end inside a step."""
TIMEOUT_S = 45.0
"""`run.timeout_s`: after which a collective that does not come about is an error."""
END_S = TIMEOUT_S + 45.0
"""In which the ranks that were not killed must have ended by themselves: once a collective has failed, Python's own end
takes each rank over a second of a core, and they may have to end one after another."""
ORPHANS_S = 10.0
"""In which nothing may be left of a start after its ranks have ended: the planner's process ends by itself."""
LOST_STEPS = 2 * EVERY
"""The most that a kill may cost: a checkpoint is whole before the next but one begins."""
WHOLE_S = 900.0
"""For an undisturbed run to its end."""
LOSS_TOLERANCE = 1e-5
CONFIG = f"""
[model]
config = {{ model_type = "llama", vocab_size = 256, hidden_size = 48, intermediate_size = 96, num_hidden_layers = 2, num_attention_heads = 12, num_key_value_heads = 12, max_position_embeddings = 512 }}
[data]
source = "rows.jsonl"
cache_dir = "data"
max_length = 512
[planner]
max_tokens_per_rank = 300
correct = false
timeout_s = {TIMEOUT_S - 5}
[train]
batch_size = {BATCH}
lr = 1e-3
[checkpoint]
every = {EVERY}
[run]
save_model = false
timeout_s = {TIMEOUT_S}
"""  # noqa: E501
AIMS = {"start-up": 30, "measuring": 10, "training": 40, "saving": 20}
"""What a kill waits for, by weight; which phase it hits is seen when it falls."""
PHASES = ("joining", "preparing", "measuring", "resuming", "step", "saving", "ending")


@dataclass(frozen=True, slots=True, kw_only=True)
class Kill:
    """One start that was killed, and what came of it."""

    run: int
    launcher: str
    world_size: int
    killed: list[int]
    """Ranks."""
    phase: str
    trained: int
    """Steps that the start wrote down."""
    lost: int
    """Steps that it wrote down and no checkpoint holds."""
    went_on_after: int | None
    """The steps of the checkpoint that it loaded; None where it was killed before."""
    torn_row: bool
    """Whether the last line of a log was cut."""
    part_left: bool
    """Whether a checkpoint was left half written."""
    ended_s: float
    """From the kill until all other ranks had ended by themselves."""
    orphans_s: float
    """From then until nothing of the start was left."""
    exits: list[int]
    """Of ranks that were not killed, as far as they are known; of torchrun, where that started them."""


@dataclass(kw_only=True)
class Campaign:
    """Kills, restarts and proofs in one folder."""

    folder: Path
    nursery: Nursery
    mark: str
    draw: random.Random
    max_ranks: int
    torchrun_share: float
    steps: int = STEPS
    kills: list[Kill] = field(default_factory=list)
    proofs: list[dict[str, Any]] = field(default_factory=list)
    starts: int = 0
    _usual_s: dict[tuple[str, int, bool], float] = field(default_factory=dict)

    def prepare(self) -> None:
        """The corpus, and a run that nothing disturbs."""
        draw = random.Random(0)
        lengths = [min(512, max(8, int(draw.lognormvariate(4.0, 1.1)))) for _ in range(SEQUENCES)]
        rows = ({"input_ids": [draw.choice(b"abcdefgh ") for _ in range(length)]} for length in lengths)
        (self.folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (self.folder / "config.toml").write_text(CONFIG)
        # with patience: an installation's first plan compiles the planner
        self.finish("unbroken", min(4, self.max_ranks), "--run.timeout_s", "600", "--planner.timeout_s", "500")

    def run(self, kills: int) -> None:
        """So many kills, in as many runs as they take; every run is ended and proven."""
        self.prepare()
        number = 0
        while True:
            name = f"run-{number}"
            while len(self.kills) < kills and (found := self.killed_start(name, number)) is not None:
                self.kills.append(found)
                print(f"kill {len(self.kills)}/{kills}: {said(found)}", flush=True)
            self.finish(name, self.draw.randint(1, self.max_ranks))
            self.proofs.append(self.prove(name))
            print(f"{name}: {self.proofs[-1]}", flush=True)
            if len(self.kills) >= kills:
                return
            number += 1

    def prove(self, name: str) -> dict[str, Any]:
        """What the logs of an ended run prove.

        Raises:
            AssertionError: they do not.
        """
        folder = self.folder / name
        log = read_log(folder / "sequences.jsonl")
        once = trained_once(log, self.steps, SEQUENCES)
        worst = worst_difference(read_log(folder / "metrics.jsonl"), read_log(self.folder / "unbroken/metrics.jsonl"))
        check(worst <= LOSS_TOLERANCE, f"{name}: losses differ by {worst} from the unbroken run's")
        check(whole_checkpoints(folder)[-1] == self.steps, f"{name}: its last checkpoint is not of the last step")
        left = strays(folder, self.folder / "unbroken")
        check(not left, f"{name}: an ended run left {left}")
        size = (folder / "sequences.jsonl").stat().st_size
        self.finish(name, self.draw.randint(1, self.max_ranks))  # loads the last checkpoint and trains nothing
        check((folder / "sequences.jsonl").stat().st_size == size, f"{name}: trained on after its end")
        return {
            "run": name,
            "kills": sum(each.run == len(self.proofs) for each in self.kills),
            "epochs_proven": once.epochs,
            "sequences_of_an_epoch": once.sequences,
            "sequences_beyond": once.beyond,
            "rows": len(log.steps),
            "steps": self.steps,
            "worst_loss_difference": worst,
        }

    def finish(self, name: str, world_size: int, *flags: str) -> None:
        """A start that nobody disturbs."""
        started, log = self.start(name, world_size, "fork", *flags)
        seconds = seconds_until_ended(started, WHOLE_S)
        exits = list(started.statuses().values())
        check(seconds is not None, f"{name}: an undisturbed start took more than {WHOLE_S} s", log)
        check(not any(exits), f"{name}: an undisturbed start exited with {exits}", log)
        self.no_orphans(name, log)

    def killed_start(self, name: str, number: int) -> Kill | None:
        """One start and one kill, and all that must hold then; None where the run came to its end before."""
        folder = self.folder / name
        world_size = self.draw.randint(1, self.max_ranks)
        launcher = "torchrun" if self.draw.random() < self.torchrun_share else "fork"
        (aim,) = self.draw.choices(list(AIMS), weights=list(AIMS.values()))
        if aim == "measuring":
            shutil.rmtree(self.folder / f"profiles-{world_size}", ignore_errors=True)
        watched = Watched(folder, self.folder / f"profiles-{world_size}", self.steps)
        started, log = self.start(name, world_size, launcher)
        if not self.wait_for_the_moment(aim, started, watched, log, (launcher, world_size, watched.measures)):
            exits = list(started.statuses().values())
            check(not any(exits) and watched.done() == self.steps, f"{name}: ended by itself with {exits}", log)
            self.no_orphans(name, log)
            return None
        ranks = started.ranks()
        chosen = sorted(ranks)
        if self.draw.random() < 0.5:
            chosen = sorted(self.draw.sample(chosen, self.draw.randint(1, len(chosen))))
        phase = watched.phase(log)
        kill([ranks[rank] for rank in chosen])
        ended_s = seconds_until_ended(started, END_S)
        check(ended_s is not None, f"{name}: ranks still live {END_S} s after a kill of {chosen}", log)
        orphans_s = self.no_orphans(name, log)
        statuses = started.statuses()
        exits = [status for pid, status in statuses.items() if pid not in {ranks[rank] for rank in chosen}]
        check(2 not in exits, f"{name}: a rank said that its input was bad after a kill of {chosen}", log)
        return Kill(
            run=number, launcher=launcher, world_size=world_size, killed=chosen, phase=phase, **watched.after(log),
            ended_s=round(ended_s or 0.0, 2), orphans_s=round(orphans_s, 2), exits=exits,
        )  # fmt: skip

    def start(self, name: str, world_size: int, launcher: str, *flags: str) -> tuple[Started, Path]:
        self.starts += 1
        arguments = ["train", "config.toml", "--train.steps", str(self.steps), "--run.dir", name]
        arguments += ["--planner.profile_dir", f"profiles-{world_size}"]
        if world_size == 1:  # one rank has to hold the longest sequence
            arguments += ["--planner.max_tokens_per_rank", "600"]
        if world_size == 3:
            arguments += ["--planner.sp_degrees", "[1, 2, 3]"]
        log = self.folder / f"start-{self.starts:04d}.log"
        log.touch()
        if launcher == "torchrun":
            return ByTorchrun(self.folder, world_size, [*arguments, *flags], log, self.mark), log
        return self.nursery.start(self.folder, world_size, [*arguments, *flags], log), log

    def wait_for_the_moment(
        self, aim: str, started: Started, watched: Watched, log: Path, kind: tuple[str, int, bool]
    ) -> bool:
        """Until the moment to kill, a random one; False where the run ended before, all ranks of it."""
        began = time.monotonic()
        usual_s = self._usual_s.get(kind, {"fork": 4.0, "torchrun": 14.0}[kind[0]] + 8.0 * kind[2])
        seconds = self.draw.uniform(0.0, 1.1 * usual_s)
        rows, then_s = self.draw.randint(1, 8), self.draw.uniform(0.0, 0.2)
        while any(map(alive, started.processes())):
            time.sleep(0.005)
            first_row_s = time.monotonic() - began
            complete = len(started.ranks()) == kind[1]
            if aim in ("start-up", "measuring"):
                if complete and first_row_s >= seconds:
                    return True
                continue
            if not watched.rows():
                continue
            self._usual_s[kind] = min(first_row_s, self._usual_s.get(kind, first_row_s))
            if aim == "training" and (watched.rows() >= rows or watched.done() == self.steps):
                time.sleep(then_s)
                return True
            if aim == "saving" and watched.rows() >= rows and watched.parts():
                time.sleep(then_s / 4)
                return True
        return False

    def no_orphans(self, name: str, log: Path) -> float:
        seconds, left = seconds_until_no_orphans(self.mark, self.nursery, ORPHANS_S)
        check(not left, f"{name}: processes {left} outlived their ranks by {ORPHANS_S} s", log)
        return seconds


class Watched:
    """A run's folder during one start."""

    def __init__(self, folder: Path, profiles: Path, steps: int) -> None:
        self._folder, self._profiles, self._steps = folder, profiles, steps
        self._sequences = folder / "sequences.jsonl"
        self.measures = not any(profiles.glob("*.json"))
        saved = whole_checkpoints(folder)
        self.before = saved[-1] if saved else 0
        """The steps of the checkpoint that this start must go on from; 0 for none, and then the logs begin anew."""
        self._changed_ns = self._now_ns()
        self._rows_before = self._count() if self.before else 0

    def rows(self) -> int:
        """That this start has written."""
        return max(0, self._count() - self._rows_before) if self._now_ns() != self._changed_ns else 0

    def done(self) -> int:
        """Steps, of the last row."""
        return max(read_log(self._sequences).lineage, default=-1) + 1 if self._sequences.exists() else 0

    def parts(self) -> list[Path]:
        return list(self._folder.glob("checkpoints/*.part"))

    def phase(self, log: Path) -> str:
        """What the start is at, by what it has written so far."""
        said = log.read_text(errors="replace")
        if self.rows():
            ending = self.before + self.rows() >= self._steps
            return "ending" if ending else "saving" if self.parts() else "step"
        if "data: " not in said:
            return "joining"
        if self.measures and "measuring" in said and not any(self._profiles.glob("*.json")):
            return "measuring"
        return "resuming" if self.before else "preparing"

    def after(self, log: Path) -> dict[str, Any]:
        """What a killed start leaves, once all of it has ended.

        Raises:
            AssertionError: it went on from another checkpoint than the last whole one, more is lost than may be, or
                there is something that neither a log, a whole checkpoint nor a `.part` is.
        """
        where, trained = self._folder.name, self.rows()
        said = log.read_text(errors="replace")
        went_on_after = None
        for line in said.splitlines():
            if "going on after step " in line:
                went_on_after = int(line.split("going on after step ")[1].split()[0])
        check(went_on_after in (None, self.before), f"{where}: went on after {went_on_after}, not {self.before}", log)
        if trained:
            first = begins_at(read_log(self._sequences), self._rows_before)
            check(first == self.before, f"{where}: its rows begin at step {first}, not {self.before}", log)
        saved = whole_checkpoints(self._folder)
        newest = saved[-1] if saved else 0
        check(newest >= self.before, f"{where}: step {newest} is the last checkpoint, it was {self.before}", log)
        lost = max(0, self.before + trained - newest)
        check(lost <= LOST_STEPS, f"{where}: {lost} steps are lost", log)
        left = strays(self._folder, self._folder.parent / "unbroken")
        check(not left, f"{where}: a kill left {left}", log)
        logs = [path.read_bytes() for path in self._folder.glob("*.jsonl")]
        return {
            "trained": trained,
            "lost": lost,
            "went_on_after": went_on_after,
            "torn_row": any(text and not text.endswith(b"\n") for text in logs),
            "part_left": bool(self.parts()),
        }

    def _now_ns(self) -> int:
        return self._sequences.stat().st_mtime_ns if self._sequences.exists() else 0

    def _count(self) -> int:
        return len(read_log(self._sequences).steps) if self._sequences.exists() else 0


def whole_checkpoints(folder: Path) -> list[int]:
    """Steps of those that have their name, in order.

    Raises:
        AssertionError: one has its name and lacks a file.
    """
    steps = []
    for path in sorted(folder.glob("checkpoints/step-*")):
        if path.suffix == ".part":
            continue
        files = {each.name for each in path.iterdir()}
        whole = {"state.json", ".metadata"} <= files and any(name.endswith(".distcp") for name in files)
        check(whole, f"{path} has its name and holds {sorted(files)} alone")
        steps.append(int(path.name.removeprefix("step-")))
    return steps


def strays(folder: Path, unbroken: Path) -> list[str]:
    """Names in a run's folder that are no `.part`, no checkpoint, no traceback, and not in an unbroken run's either."""
    usual = {path.name for path in unbroken.iterdir()} | {"checkpoints"}
    found = [path for path in folder.glob("*") if path.name not in usual and not path.match("error-rank-*.txt")]
    found += [path for path in folder.glob("checkpoints/*") if not path.name.startswith("step-")]
    return [str(path.relative_to(folder)) for path in found if path.suffix != ".part"]


def check(holds: bool, otherwise: str, log: Path | None = None) -> None:
    """Raises AssertionError, with the end of a start's log, where something does not hold."""
    if not holds:
        tail = "" if log is None else f"\n--- {log} ends:\n{log.read_text(errors='replace')[-3000:]}"
        raise AssertionError(otherwise + tail)


def said(kill: Kill) -> str:
    everyone = "all" if len(kill.killed) == kill.world_size else ", ".join(map(str, kill.killed))
    return (
        f"{kill.launcher}, {kill.world_size} ranks, {everyone} killed, {kill.phase}: trained {kill.trained}, lost "
        f"{kill.lost}; the rest ended after {kill.ended_s} s, exits {kill.exits}"
    )
