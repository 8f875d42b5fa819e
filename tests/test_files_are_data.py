"""Plans, profiles and checkpoints are data: nothing in them is executed, and no file but those named is opened."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import flexsp
from flexsp.profile import Profile
from fuzzing.kinds_documents import LENGTHS, rich_profile

WATCH = """
import json, os, sys
# compile alone runs nothing (exec would be seen): a traceback's own lines are parsed to be shown
seen, armed = [], False
HARMLESS = ("object.__", "sys._getframe", "array.", "pickle.find_class", "gc.", "code.__new__", "os.listdir",
            "os.scandir", "glob.", "compile", "pathlib.", "cpython.", "builtins.id", "sys.unraisablehook",
            "marshal.loads", "mmap.", "fcntl.")

def hook(event, arguments):
    if armed and not event.startswith(HARMLESS):
        seen.append((event, [str(each)[:300] for each in arguments[:2]]))

sys.addaudithook(hook)
"""
TEXTS = """
from flexsp.cli.main import main
import flexsp.simulate.runs
good, bad = sys.argv[1:3]
for folder in (good, bad):  # the first loads what is loaded late
    armed = folder == bad
    for argv in (["check", f"{good}/lengths.txt", f"{folder}/profile.json", f"{folder}/plan.json"],
                 ["show", f"{folder}/profile.json"]):
        try:
            main(argv)
        except SystemExit:
            pass
armed = False
print("SEEN", json.dumps({"events": seen}))
"""
CHECKPOINT = """
import shutil, torch, torch.distributed as dist
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
import checkpoint_ranks as do
from flexsp.train.checkpoint import Checkpoints, load_checkpoint
from flexsp.train.digests import write_digests
from flexsp.train.resume import find_start
from pathlib import Path
from profiles import profile
folder = sys.argv[1]
config = do.config_of(folder)
state = do.built(config, 0)
checkpoints = Checkpoints(config, do.control())
do.step(*state, 0)
checkpoints.save(1, *state, profile(4))
checkpoints.finish()
path = Path(folder, "checkpoints", "step-00000001")
shutil.copytree(path, "good")

def load():
    start = find_start(config)
    try:
        load_checkpoint(start.path, start.state, *state)
    except ValueError as error:
        return str(error)
    return "loaded"

assert load() == "loaded"
for file in sorted(Path("harms").glob("*.py")):
    shutil.rmtree(path)
    shutil.copytree("good", path)
    exec(file.read_text(), dict(globals()))
    for old in path.glob("*.sha256"):
        old.unlink()
    write_digests(path, [each.name for each in path.iterdir()], "all")
    load()  # what is imported to say an error is imported now
    seen.clear()
    armed = True
    said = load()
    armed = False
    print("SEEN", json.dumps({"name": file.stem, "said": said, "events": seen}))
"""
HOSTILE = {
    "planner": "os:system", "policy": "../../etc/passwd", "__class__": "os.system", "path": "/etc/passwd",
    "$ref": "file:///etc/passwd", "import": "antigravity", "!!python/object/apply:os.system": ["touch made"],
    "include": "plan.json", "{0.__class__}": "%(x)s",
    "reason": "[link=file:///etc/passwd]x[/link] $(touch made) `touch made`",
}  # fmt: skip


def watched(script: str, *arguments: object, folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """What a script prints, and what it says that it has seen: the audited events while it was armed."""
    source, tests = Path(flexsp.__file__).parent.parent, Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", WATCH + script, *map(str, arguments)], cwd=folder, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{tests}", "OMP_NUM_THREADS": "1"},
        timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    seen = [json.loads(line.removeprefix("SEEN ")) for line in done.stdout.splitlines() if line.startswith("SEEN ")]
    return done.stdout, seen


def opened(events: list[tuple[str, list[str]]]) -> set[str]:
    """The files that were opened; there must be no event of another kind."""
    others = [each for each in events if each[0] != "open"]
    assert not others, others
    return {arguments[0] for _, arguments in events}


def test_a_hostile_plan_and_profile_open_and_execute_nothing(tmp_path):
    good, bad = tmp_path / "good", tmp_path / "bad"
    profile = rich_profile(4)
    plan = flexsp.plan(LENGTHS, Profile.from_json(profile)).to_json()
    for folder, more in ((good, {}), (bad, HOSTILE)):
        folder.mkdir()
        (folder / "lengths.txt").write_text("\n".join(map(str, LENGTHS)))
        texts = {**profile, **{key: value for key, value in more.items() if key != "policy"}}
        texts["provenance"] = {**profile["provenance"], **more}
        texts["name"] = more.get("reason", "test")
        (folder / "profile.json").write_text(json.dumps(texts))
        (folder / "plan.json").write_text(json.dumps({**plan, **more}))
    out, (seen,) = watched(TEXTS, good, bad, folder=tmp_path)
    assert opened(seen["events"]) == {f"{good}/lengths.txt", f"{bad}/profile.json", f"{bad}/plan.json"}
    assert not list(tmp_path.rglob("made")) and "legal" in out


EVIL = "class Evil:\n    def __reduce__(self): return {call}\nimport pickle\n"
LIST = "(path / '.metadata').write_bytes(pickle.dumps(Evil()))\n"
NAMES = (
    "import pickle, dataclasses\nmetadata = pickle.loads((path / '.metadata').read_bytes())\n"
    "metadata.storage_data = {{k: dataclasses.replace(v, relative_path={name!r}) for k, v in "
    "metadata.storage_data.items()}}\n(path / '.metadata').write_bytes(pickle.dumps(metadata))\n"
)
VALUES = EVIL + (
    "import io\nsaved = sorted(path.glob('*.distcp'))[0]\nfile = io.BytesIO()\n"
    "torch.save({{'lr': Evil()}}, file)\nsaved.write_bytes(file.getvalue())\n"
    "import dataclasses\nmetadata = pickle.loads((path / '.metadata').read_bytes())\n"
    "metadata.storage_data = {{k: dataclasses.replace(v, offset=0, length=len(file.getvalue())) for k, v in "
    "metadata.storage_data.items()}}\n(path / '.metadata').write_bytes(pickle.dumps(metadata))\n"
)


HARMS = {
    "system": EVIL.format(call="os.system, ('touch made',)") + LIST,
    "open": EVIL.format(call="open, ('made', 'w')") + LIST,
    "eval": EVIL.format(call="eval, ('open(chr(109), chr(119))',)") + LIST,
    "import": EVIL.format(call="__import__('importlib').import_module, ('antigravity',)") + LIST,
    "absolute path": NAMES.format(name="/etc/passwd"),
    "path upwards": NAMES.format(name="../../../../../../../../etc/passwd"),
    "value": VALUES.format(call="os.system, ('touch made',)"),
}


def test_hostile_checkpoints_open_and_execute_nothing(tmp_path):
    (tmp_path / "harms").mkdir()
    for name, harm in HARMS.items():
        (tmp_path / "harms" / f"{name}.py").write_text(harm)
    _, found = watched(CHECKPOINT, tmp_path, folder=tmp_path)
    assert sorted(each["name"] for each in found) == sorted(HARMS)
    for each in found:
        assert "the checkpoint cannot be loaded (" in each["said"], each
        paths = opened(each["events"])
        folder = tmp_path / "checkpoints" / "step-00000001"
        assert paths and {str(Path(path).parent) for path in paths} == {str(folder)}, each
    assert not (tmp_path / "made").exists() and not (tmp_path / "m").exists()
