"""Checkpoints: whole or not there, the same on any number of ranks, and read as data."""

from __future__ import annotations

import ctypes
import hashlib
import importlib
import io
import json
import logging
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata

import checkpoint_ranks as do
from flexsp.train import safe_load
from flexsp.train.checkpoint import FOLDER, PART, ids_sha256, saved_checkpoints
from flexsp.train.digests import STATE, SUFFIX, check_digests
from flexsp.train.records import NAMES, SEQUENCES
from flexsp.train.resume import find_start
from flexsp.train.resume_checks import check_order, say_missing_rows, say_passed_over, say_versions
from flexsp.train.run_dir import write_began
from rank_pool import RanksFailed

pytestmark = pytest.mark.alone


@pytest.mark.parametrize(
    ("asynchronous", "loading", "decay"),
    [(True, 4, "all"), (True, 2, "matrices"), (True, 4, "matrices"), (False, 2, "all")],
)
def test_what_is_saved_on_four_ranks_is_what_was_there_then(ranks, tmp_path, asynchronous, loading, decay):
    """Weights, optimizer, learning rate and random numbers, while the run went on before the writing ended."""
    ranks(4).run(do.save_then_go_on, str(tmp_path), asynchronous, decay)
    assert ranks(loading).run(do.load_and_compare, str(tmp_path), decay) == [""] * loading


def test_norms_and_biases_do_not_decay_where_matrices_alone_do(ranks):
    """Though each rank has a shard of them, of which FSDP2 decides the shape."""
    for options in ({}, {"fused": True}, {"foreach": True}):
        whole, matrices = (ranks(2).run(do.decayed, decay, options)[0] for decay in ("all", "matrices"))
        norms = {name for name in whole if name.endswith("norm.weight")}
        assert len(norms) == 5 and whole - matrices == norms
        assert "model.embed_tokens.weight" in matrices


def test_the_last_few_are_kept_and_what_a_kill_left_is_removed(ranks, tmp_path):
    (tmp_path / FOLDER / f"step-00000009{PART}").mkdir(parents=True)
    ranks(2).run(do.save_many, str(tmp_path), 5)
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["step-00000004", "step-00000005"]


def test_half_a_checkpoint_is_never_taken(ranks, tmp_path):
    ranks(2).run(do.save_many, str(tmp_path), 2)
    last = saved_checkpoints(tmp_path)[-1]
    last.rename(last.with_name(last.name + PART))  # as a kill while writing leaves it
    assert find_start(do.config_of(str(tmp_path))).steps == 1


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc's malloc is what keeps freed pages")
def test_once_it_is_written_freed_memory_goes_back_to_the_system(ranks, tmp_path):
    """All ranks do so, though nothing is saved in the step in which the writing is found to have ended."""
    cut_up_bytes = 128 * 2**20
    for before, after in ranks(2).run(do.resident_around_a_checkpoint, str(tmp_path), cut_up_bytes):
        assert before - after > cut_up_bytes / 2


@pytest.mark.parametrize("full_rank", [0, 1])
def test_a_full_disk_is_one_error_on_all_ranks(broken_ranks, tmp_path, full_rank):
    errors = broken_ranks(2).run(do.save_on_a_full_disk, str(tmp_path), full_rank)
    assert len(set(errors)) == 1, errors
    assert errors[0].startswith(f"step 1: rank {full_rank} could not write the checkpoint: "), errors
    assert "File too large" in errors[0] and "\n" not in errors[0]
    assert not saved_checkpoints(tmp_path)


def test_what_a_name_promises_lies_on_the_disk_before_the_name(ranks, tmp_path):
    order = ranks(2).run(do.synced, str(tmp_path))[0]
    renamed = order.index(f"step-00000001{PART} -> step-00000001")
    for name in (*NAMES, tmp_path.name):  # the logs, which prove what it was trained on
        assert name in order[:renamed], (name, order)
    for name in ("__0_0.distcp", f"__0{SUFFIX}", ".metadata.tmp", STATE, f"state{SUFFIX}", f"step-00000001{PART}"):
        assert name in order[:renamed], (name, order)
    assert FOLDER in order[renamed:]


# ---- going on


TRAINS = {
    "constant": {"lr": 0.5, "lr_schedule": "constant", "weight_decay": 0.3, "optimizer_options": {"betas": [0.8, 0.9]}},
    "linear": {"lr": 0.2, "lr_schedule": "linear", "warmup_steps": 6},
    "cosine": {"lr": 0.4, "lr_schedule": "cosine"},
    "matrices": {"lr": 0.5, "lr_schedule": "constant", "weight_decay": 0.3, "decay": "matrices"},
    "min": {"lr": 0.4, "lr_schedule": "cosine_with_min_lr", "lr_schedule_options": {"min_lr_rate": 0.2}},
}


def test_another_run_s_checkpoint_goes_on_at_its_step_with_the_new_rates(ranks, tmp_path):
    ranks(2).run(do.save_then_go_on, str(tmp_path), False)
    for train in TRAINS.values():
        for found, expected, rest in ranks(2).run(do.load_with_other_rates, str(tmp_path), train):
            assert found == expected and len(set(found)) == (1 if train["lr_schedule"] == "constant" else 5)
            assert rest["weight_decay"] == train.get("weight_decay", 0.0) and rest["initial_lr"] == train["lr"]
            assert list(rest["betas"]) == train.get("optimizer_options", {}).get("betas", [0.9, 0.999])


def test_another_optimizer_cannot_go_on_and_is_named(saved, tmp_path):
    config = config_with(tmp_path, "train", optimizer="sgd")
    config = replace(config, run=replace(config.run, dir=str(tmp_path / "other")))
    config = replace(config, checkpoint=replace(config.checkpoint, resume=str(saved)))
    with pytest.raises(
        ValueError, match=r"train.optimizer='sgd' is not 'adamw', with which .*; restore it, or give an"
    ):
        find_start(config)


@pytest.mark.parametrize("damage", ["flipped bit", "empty state", "no state", "cut digests"])
def test_a_damaged_last_checkpoint_is_set_aside_and_the_one_before_taken(ranks, tmp_path, damage):
    ranks(2).run(do.save_many, str(tmp_path), 2)
    last = saved_checkpoints(tmp_path)[-1]
    if damage == "flipped bit":
        data = bytearray((last / "__1_0.distcp").read_bytes())
        data[len(data) // 2] ^= 1
        (last / "__1_0.distcp").write_bytes(data)
    elif damage == "empty state":  # as a loss of power leaves what was not synced
        (last / STATE).write_bytes(b"")
    elif damage == "no state":
        (last / STATE).unlink()
    else:
        (last / f"__1{SUFFIX}").write_bytes(b"")
    assert ranks(2).run(do.resumed, str(tmp_path)) == [(1, "")] * 2
    names = ["step-00000001", "step-00000002.damaged"]
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == names
    assert ranks(2).run(do.resumed, str(tmp_path)) == [(1, "")] * 2


def test_where_no_checkpoint_is_whole_or_the_one_that_is_named_is_not_nothing_is_set_aside(ranks, tmp_path):
    ranks(2).run(do.save_many, str(tmp_path), 2)
    before, last = saved_checkpoints(tmp_path)
    (last / ".metadata").write_bytes(b"")
    for steps, error in ranks(2).run(do.resumed, str(tmp_path), str(last)):
        assert steps == -1 and f"{last}: the checkpoint is damaged (.metadata: EOFError" in error
    (before / "__0_0.distcp").unlink()
    for steps, error in ranks(2).run(do.resumed, str(tmp_path)):
        assert steps == -1 and f"{last}: the checkpoint is damaged (" in error and "nor are the 1 before it" in error
    assert saved_checkpoints(tmp_path) == [before, last]


def test_another_order_of_the_data_is_an_error_and_other_versions_are_a_warning(saved, tmp_path, caplog):
    config = do.config_of(str(tmp_path))
    start = find_start(config)
    ids = np.arange(8)
    check_order(config, start, ids)  # this checkpoint was saved without a loader
    foreseen = replace(start, state={**start.state, "next_ids_sha256": ids_sha256(ids)})
    check_order(config, foreseen, ids)
    where = r"train.seed=0 gives step 1 other sequences than .*step-00000001 foresaw, "
    with pytest.raises(ValueError, match=where + r"as flexsp .*, which saved it, left out other documents; go on with"):
        check_order(config, foreseen, ids[::-1])
    foreseen.state["versions"] = {**foreseen.state["versions"], "numpy": "1.0"}
    with pytest.raises(ValueError, match=where + r"with numpy .* instead of 1.0; install that one, or give another"):
        check_order(config, foreseen, ids[::-1])
    logging.getLogger("flexsp").propagate = True
    say_versions(start)
    assert not caplog.records
    say_versions(replace(start, state={**start.state, "versions": {**start.state["versions"], "numpy": "1.0"}}))
    assert f"numpy '1.0' -> {np.__version__}" in caplog.text and "torch" not in caplog.text


def test_rows_that_are_missing_below_the_checkpoint_are_said(saved, tmp_path, caplog):
    logging.getLogger("flexsp").propagate = True
    start = replace(find_start(do.config_of(str(tmp_path))), steps=6)

    def said(*steps: int, torn: str = "", **changes: object) -> str:
        caplog.clear()
        rows = [json.dumps({"step": step, "ids": [step]}) + "\n" for step in steps]
        (tmp_path / SEQUENCES).write_text("".join(rows) + torn)
        say_missing_rows(replace(start, **changes))
        return caplog.text

    assert said(0, 1, 2, 3, 4, 5) == said(0, 1, 2, 3, 4, 5, 6, 4, 5) == ""
    torn = '{"step": 4, "ids": [1\n' + "\0" * 40
    assert "has no row of 2 of the 6 steps before 6, the first is step 4; what they" in said(0, 1, 2, 3, torn=torn)
    assert "has no row of 1 of the 6 steps before 6, the first is step 2" in said(0, 1, 3, 4, 5)
    assert said(3, 4, 5, origin="/other/checkpoints/step-00000003") == ""  # another run's log has those before
    assert "1 of the 3 steps before 6, the first is step 3" in said(4, 5, origin="/other/checkpoints/step-00000003")
    assert said(own=False) == ""
    (tmp_path / SEQUENCES).unlink()
    say_missing_rows(start)
    assert "sequences.jsonl: cannot be read (No such file or directory)" in caplog.text


def test_data_that_another_run_s_step_passes_over_is_said(saved, tmp_path, caplog):
    logging.getLogger("flexsp").propagate = True
    config = config_with(tmp_path, "checkpoint", resume=str(saved))
    own = replace(find_start(config), state={**find_start(config).state, "data": {"fingerprint": "a"}}, steps=20)
    other = replace(own, own=False)
    say_passed_over(config, None, "a", 5000)
    say_passed_over(config, own, "b", 5000)  # an error of its own
    say_passed_over(config, other, "a", 5000)  # the same order, which goes on
    say_passed_over(config, replace(other, steps=0), "b", 5000)
    say_passed_over(config, replace(other, state={**other.state, "data": {}}), "b", 5000)  # nobody knows
    assert not caplog.records
    say_passed_over(config, other, "b", 5000)
    (said,) = caplog.messages
    assert (
        "in another order (now other data); its step 20 is taken over, so that the first 640 sequences of the new"
        in said
    )
    assert (
        "of 5,000 in a pass, are passed over; to begin the data at 0, give the model that the run saved as model."
        in said
    )
    for section, changes, shown in (
        ("train", {"seed": 3}, "(now train.seed=3 instead of 0)"),
        ("train", {"batch_size": 50}, "(now train.batch_size=50 instead of 32)"),
        ("data", {"max_length": 128}, "(now data.max_length=128 instead of 256)"),
        ("data", {"held_out": 5}, "(now data.held_out=5 instead of 0)"),
    ):
        caplog.clear()
        say_passed_over(config_with(tmp_path, section, **changes), other, "a", 5000)
        assert shown in caplog.text and "\n" not in caplog.messages[0]
        assert f"the first {1000 if 'batch_size' in changes else 640:,} sequences" in caplog.text


# ---- reading


@pytest.fixture
def saved(ranks, tmp_path) -> Path:
    ranks(2).run(do.save_many, str(tmp_path), 1)
    return saved_checkpoints(tmp_path)[-1]


class Evil:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


DAMAGES = ("evil list", "evil class", "no list", "cut list", "cut tensors", "no tensors", "flipped bit", "no digests")


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_evil_checkpoint_is_one_line_and_runs_nothing(ranks, saved, tmp_path, damage):
    listed, (tensors, *_) = saved / ".metadata", sorted(saved.glob("*.distcp"))
    made = tmp_path / "made"
    if damage == "evil list":
        listed.write_bytes(pickle.dumps(Evil(made)))
    elif damage == "evil class":
        listed.write_bytes(b"cposix\nsystem\n(S'touch " + str(made).encode() + b"'\ntR.")
    elif damage == "no list":
        listed.unlink()
    elif damage == "cut list":
        listed.write_bytes(listed.read_bytes()[:100])
    elif damage == "flipped bit":  # within a tensor: torch compares no checksum, and would train other weights
        data = bytearray(tensors.read_bytes())
        data[len(data) // 2] ^= 1
        tensors.write_bytes(data)
    elif damage == "no digests":
        (saved / "__1.sha256").unlink()
    elif damage == "cut tensors":
        tensors.write_bytes(tensors.read_bytes()[: tensors.stat().st_size // 2])
    else:
        tensors.unlink()
    errors = ranks(2).run(do.load_error, str(tmp_path))
    assert not made.exists()
    for error in errors:
        assert "the checkpoint cannot be loaded (" in error and "\n" not in error
        if damage in DAMAGES[-2:]:
            assert tensors.name in error or "'__1_0.distcp' has no digest" in error


def test_the_digests_are_those_of_sha256sum(saved):
    listed = "".join(path.read_text() for path in sorted(saved.glob(f"*{SUFFIX}")))
    names = {path.name for path in saved.iterdir() if path.suffix != SUFFIX}
    assert {row.split("  ")[1] for row in listed.splitlines()} == names
    assert names == {STATE, ".metadata", "__0_0.distcp", "__1_0.distcp"}
    for row in listed.splitlines():
        digest, name = row.split("  ")
        assert hashlib.sha256((saved / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("row", ["x", f"{'0' * 64}  ../../etc/passwd", f"{'0' * 64} state.json", f"{'0' * 64}  none"])
def test_a_wrong_list_of_digests_opens_nothing_else(saved, row):
    (saved / f"more{SUFFIX}").write_text(row + "\n")
    with pytest.raises(
        (ValueError, FileNotFoundError), match=r"more.sha256 is not a list of digests|step-00000001/none"
    ):
        check_digests(saved, [STATE])


def test_a_rank_that_dies_while_a_checkpoint_loads_is_not_the_checkpoint_s_fault(broken_ranks, saved, tmp_path):
    with pytest.raises(RanksFailed) as failed:
        broken_ranks(2).run(do.die_while_loading, str(tmp_path), 1)
    assert "rank 1 died" in str(failed.value) and "rank 0: Traceback" in str(failed.value)
    assert "RuntimeError: " in str(failed.value) and "cannot be loaded" not in str(failed.value)


@pytest.mark.parametrize(("kind", "said"), [("memory", "MemoryError: no room"), ("device", "RuntimeError: CUDA error")])
def test_a_rank_that_cannot_load_for_a_reason_of_its_own_is_named_on_all(ranks, saved, tmp_path, kind, said):
    for error in ranks(2).run(do.error_of_one_that_fails, str(tmp_path), kind):
        assert error.startswith(f"CheckpointError: rank 1 could not load {saved}: {said}")


def config_with(folder: Path, section: str, **changes):
    config = do.config_of(str(folder))
    return replace(config, **{section: replace(getattr(config, section), **changes)})


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("train", {"lr": 0.2}, r"train.lr=0.2 is not 0.1, with which .*step-00000001 was made; restore it, or"),
        ("train", {"seed": 7}, r"train.seed=7 is not 0"),
        (
            "train",
            {"decay": "matrices"},
            r"train.decay='matrices' is not 'all', with which .* was made; restore it",
        ),
        ("train", {"lr_schedule_options": {"num_cycles": 2}}, r"train.lr_schedule_options.num_cycles=2 is not None"),
        ("data", {"max_length": 128}, r"data.max_length=128 is not 256"),
        ("model", {"config": {**do.MODEL, "hidden_size": 32}}, r"model.config.hidden_size=32 is not 16"),
        ("model", {"config": {**do.MODEL, "more": 1}}, r"model.config.more=1 is not None"),
        ("model", {"path": "x"}, r"model.path='x' is not '', with which"),
        ("checkpoint", {"resume": "never"}, r"resume='never', but run.dir=.* holds checkpoints, the last of step 1"),
        ("checkpoint", {"resume": "nowhere"}, r"resume='nowhere' must be 'auto', 'never' or the path of a checkpoint"),
    ],
)
def test_a_start_that_cannot_go_on_says_what_differs(saved, tmp_path, section, changes, message):
    with pytest.raises(ValueError, match=message):
        find_start(config_with(tmp_path, section, **changes))


def test_what_does_not_decide_the_weights_may_change(saved, tmp_path):
    others = (("planner", {"name": "static"}), ("run", {"compare_batches": 3}), ("model", {"replicate": 2}))
    for section, changes in others:
        assert find_start(config_with(tmp_path, section, **changes)).steps == 1


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format", "flexsp-checkpoint/2", r"format='flexsp-checkpoint/2' must be 'flexsp-checkpoint/1'"),
        ("step", "one", r"step='one' must be an integer"),
        ("step", None, r"the field 'step' is missing"),
        ("config", [], r"config=\[\] must be a JSON object"),
        ("step", 2, r"step=2 is not the 1 of its folder's name"),
    ],
)
def test_a_wrong_state_file_names_the_field(saved, tmp_path, key, value, message):
    path = saved / "state.json"
    state = json.loads(path.read_text())
    state[key] = value
    if value is None:
        del state[key]
    path.write_text(json.dumps(state))
    with pytest.raises(ValueError, match=message):
        find_start(do.config_of(str(tmp_path)))


def test_an_older_checkpoint_is_not_forked_below_a_newer_one(ranks, tmp_path):
    ranks(2).run(do.save_many, str(tmp_path), 2)
    older, newer = saved_checkpoints(tmp_path)
    config = config_with(tmp_path, "checkpoint", resume=str(older))
    with pytest.raises(ValueError, match=r"holds .*step-00000002, which the next start would take; remove it or"):
        find_start(config)
    shutil.rmtree(newer)
    assert find_start(config).steps == 1


def test_a_run_that_began_from_a_checkpoint_goes_on_from_its_own_by_the_same_command(saved, tmp_path):
    own = tmp_path / "own"
    config = config_with(tmp_path, "checkpoint", resume=str(saved))
    config = replace(config, run=replace(config.run, dir=str(own)))
    start = find_start(config)
    assert (start.steps, start.own, start.origin) == (1, False, str(saved.resolve()))
    later = own / FOLDER / "step-00000002"
    shutil.copytree(saved, later)
    state = json.loads((saved / STATE).read_text())
    (later / STATE).write_text(json.dumps({**state, "step": 2, "origin": start.origin}))
    found = find_start(config)
    assert (found.path, found.own, found.origin) == (later, True, start.origin)
    shutil.copytree(saved, tmp_path / "elsewhere" / saved.name)
    other = replace(config, checkpoint=replace(config.checkpoint, resume=str(tmp_path / "elsewhere" / saved.name)))
    with pytest.raises(ValueError, match=r"holds .*step-00000002, of a run that began from .*step-00000001; set it to"):
        find_start(other)


def test_logs_of_another_configuration_without_a_checkpoint_are_not_overwritten(saved, tmp_path):
    config = config_with(tmp_path, "train", lr=0.2)
    config = replace(config, run=replace(config.run, dir=str(tmp_path / "own")))
    (tmp_path / "own").mkdir()
    assert find_start(config) is None
    write_began(config, "")
    assert find_start(config) is None  # which begins anew
    assert find_start(replace(config, planner=replace(config.planner, name="static"))) is None
    with pytest.raises(ValueError, match=r"train.lr=0.3 is not 0.2, with which the run in .*own began, of which no ch"):
        find_start(replace(config, train=replace(config.train, lr=0.3)))
    with pytest.raises(ValueError, match=r"checkpoint.resume='.*step-00000001' is not 'auto', with which the run in"):
        find_start(replace(config, checkpoint=replace(config.checkpoint, resume=str(saved))))


def test_the_list_of_tensors_may_name_its_own_classes_and_no_other_of_their_modules():
    for module in ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"):
        for name in vars(importlib.import_module(module)):
            if (module, name) in safe_load.NAMES:
                continue
            with pytest.raises(pickle.UnpicklingError, match=rf"{module}.{name} has no place in a checkpoint's list"):
                safe_load._Unpickler(io.BytesIO(f"c{module}\n{name}\n.".encode())).load()


class _ByGetattr:
    """Pickles as an early Python 3.11 pickles a member of an enumeration."""

    def __init__(self, owner: type, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def test_a_list_of_an_early_python_3_11_is_read_and_getattr_of_anything_else_is_not():
    found = safe_load._Unpickler(io.BytesIO(pickle.dumps(_ByGetattr(_MEM_FORMAT_ENCODING, "TORCH_CONTIGUOUS_FORMAT"))))
    assert found.load() is _MEM_FORMAT_ENCODING.TORCH_CONTIGUOUS_FORMAT
    for owner, name in ((_MEM_FORMAT_ENCODING, "mro"), (Metadata, "__init__")):
        evil = safe_load._Unpickler(io.BytesIO(pickle.dumps(_ByGetattr(owner, name))))
        with pytest.raises(pickle.UnpicklingError, match=r"getattr of .* has no place in a checkpoint"):
            evil.load()
