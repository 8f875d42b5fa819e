from __future__ import annotations

import pytest
import torch

from flexsp.train.config import Config, load_config
from flexsp.train.optimizers import build_optimizer, check_optimizer

BASE = '[model]\nconfig = { model_type = "llama" }\n'


MIN_LR = ["--train.lr_schedule", "cosine_with_min_lr", "--train.lr_schedule_options.min_lr_rate", "0.1"]
WSD = ["--train.lr_schedule", "warmup_stable_decay", "--train.lr_schedule_options.num_decay_steps", "2"]


@pytest.fixture
def path(tmp_path):
    (tmp_path / "c.toml").write_text(BASE + '[data]\nmax_length = "16K"\n[train]\nsteps = 5\n')
    return tmp_path / "c.toml"


def test_flags_override_keys(path):
    flags = ["--train.steps", "20", "--train.lr=1e-4", "--run.dir", "007", "--model.config.hidden_size", "64"]
    config = load_config(path, [*flags, "--model.exact", "false", "--planner.sp_degrees", "[1, 2]"])
    assert (config.train.steps, config.train.lr, config.run.dir) == (20, 1e-4, "007")
    assert config.model.config == {"model_type": "llama", "hidden_size": 64}
    assert (config.data.max_length, config.model.exact, config.planner.sp_degrees) == (16384, False, [1, 2])
    assert load_config(path).train.steps == 5


def test_a_folder_s_config_may_be_changed(path):
    config = load_config(path, ["--model.path", "x", "--model.config", "{}", "--model.config.rope_parameters.factor=4"])
    assert (config.model.path, config.model.config) == ("x", {"rope_parameters": {"factor": 4}})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train.step", "3"], r"train.step is unknown; the keys of \[train\] are steps, batch_size"),
        (["--trian.steps", "3"], r"section \[trian\] is unknown; the sections are model, data"),
        (["--train.steps", "many"], r"train.steps='many' must be of type int"),
        (["--train.steps", "true"], r"train.steps=True must be of type int"),
        (["--train.steps", "-1"], r"train.steps=-1 must be at least 0"),
        (["--train.steps"], r"flag '--train.steps' has no value"),
        (["steps", "3"], r"flag 'steps' is unknown"),
        (["--data.max_length", "4M"], r"data.max_length='4M' must be a positive number of tokens"),
        (["--data.overlong", "cut"], r"data.overlong='cut' must be one of drop, split, error"),
        (["--planner.sp_degrees", "[1.5]"], r"planner.sp_degrees=\[1.5\] must be a list of integers"),
        (["--planner.memory_fraction", "2"], r"planner.memory_fraction=2.0 must be at most 1"),
        (["--model.config", "{}"], r"model.path='' and model.config={}: there is no model; give a directory to start"),
        (["--train.steps.x", "1"], r"steps is no section"),
        (
            ["--train.warmup_steps", "5"],
            r"train.warmup_steps=5 must be below train.steps=5, or the learning rate",
        ),
        (["--train.decay", "norms"], r"train.decay='norms' must be one of all, matrices"),
        (["--planner.timeout_s", "700"], r"planner.timeout_s=700 must be less than run.timeout_s=600, for which the"),
    ],
)
def test_wrong_flags_are_named(path, flags, message):
    with pytest.raises(ValueError, match=message) as raised:
        load_config(path, flags)
    assert "\n" not in str(raised.value)


def test_a_planner_has_less_time_than_the_ranks_that_wait_for_it(path):
    """Else they gave up first, and rank 0 was said to be at fault."""
    assert load_config(path).planner.timeout_s == 300
    assert load_config(path, ["--run.timeout_s", "15"]).planner.timeout_s == 7.5
    assert load_config(path, ["--run.timeout_s", "15", "--planner.timeout_s", "14"]).planner.timeout_s == 14


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(ValueError, match=r"none.toml: cannot be read"):
        load_config(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[model")
    with pytest.raises(ValueError, match=r"bad.toml: is not TOML"):
        load_config(tmp_path / "bad.toml")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train.lr", "nan"], r"train.lr=nan must be a finite number"),
        (["--train.lr", "inf"], r"train.lr=inf must be a finite number"),
        (["--train.grad_clip", "1e300"], r"train.grad_clip=1e\+300 must be a finite number, up to 1e\+30"),
        (["--train.steps", str(2**70)], r"train.steps=1180591620717411303424 must be a number of 64 bits"),
        (["--planner.sp_degrees", "[1, 0]"], r"planner.sp_degrees=0 must be at least 1"),
        (["--run.timeout_s", "1e20"], r"run.timeout_s=1e\+20 must be at most 10000000.0"),
        (["--model.config.rope", "{ theta = nan }"], r"model.config.rope.theta=nan must be a finite number"),
        (["--train.optimizer_options.x", "2026-01-31"], r"optimizer_options.x=2026-01-31 must be text, a number"),
        (["--planner.name", "x" * 5000, "--x.y", "1"], r"section \[x\] is unknown"),
        (["--data.overlong", "x" * 5000], r"data.overlong='x{56}\.\.\. must be one of"),
    ],
)
def test_what_a_checkpoint_could_not_say_is_refused_at_the_start(path, flags, message):
    """Found by tests/fuzzing: each was taken, or ended in a traceback, some of them hours later."""
    with pytest.raises(ValueError, match=message):
        load_config(path, flags)


def test_files_that_are_no_toml(tmp_path):
    for text in ("a = " + "9" * 5000, "a = " + "[" * 50_000):
        (tmp_path / "bad.toml").write_text(text)
        with pytest.raises(ValueError, match=r"bad.toml: is (not TOML|nested too deeply)"):
            load_config(tmp_path / "bad.toml")
    with pytest.raises(ValueError, match=r"/dev/zero: (must be at most|is not TOML)"):
        load_config("/dev/zero")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train.lr_schedule", "reduce_lr_on_plateau"], r"reduce_lr_on_plateau' needs a metric at each step, which"),
        (["--train.lr_schedule", "greedy"], r"train.lr_schedule='greedy' needs a metric at each step, which it is not"),
        (["--train.lr_schedule", "warmup_stable_decay"], r"lr_schedule='warmup_stable_decay': .*'num_decay_steps'; ch"),
        (["--train.lr_schedule", "piecewise"], r"train.lr_schedule='piecewise': .*; choose another"),
        (
            ["--train.lr_schedule", "cosine_with_min_lr"],
            r"One of min_lr or min_lr_rate .*; choose another, or give",
        ),
        (
            [*MIN_LR[:2], "--train.lr_schedule_options.min_lr", "low"],
            r"min_lr', .*={'min_lr': 'low'}: .*; correct",
        ),
        ([*MIN_LR, "--train.lr_schedule_options.min_rate", "0"], r"options={.*}: .*argument 'min_rate'; correct them"),
        (
            [*MIN_LR, "--train.lr_schedule_options.num_cycles", "few"],
            r"options={.*'few'}: could not convert .*",
        ),
        ([*MIN_LR, "--train.lr_schedule_options.last_epoch", "3"], r"options={.*'last_epoch': 3}: .*; correct them"),
        (["--train.lr_schedule_options.num_decay_steps", "2"], r"lr_schedule='cosine', .*'num_decay_steps'; correct"),
        (
            [*WSD, "--train.lr_schedule_options.decay_type", "none"],
            r"options={.*}: Unknown decay type: none, .*",
        ),
        (
            [*WSD, "--train.lr_schedule_options.min_lr_ratio", "-1"],
            r"learning rate of step \d would be -0.*; correct",
        ),
        (
            ["--train.lr_schedule", "constant_with_warmup", "--train.lr_schedule_options.min_lr", "0.1"],
            r"lr_schedule_options={'min_lr': 0.1}: the schedule 'constant_with_warmup' takes none; leave them out, or",
        ),
        (["--train.optimizer_options.betas", "[0.9, 0.9, 0.9]"], r"optimizer_options=.*: adamw takes no step with .*"),
        (["--train.optimizer_options.capturable", "true"], r"optimizer_options={'capturable': True}: .*; correct them"),
        (["--train.optimizer_options.betas", "0.9"], r"train.optimizer_options={'betas': 0.9}: .*; correct them"),
        (
            ["--train.optimizer", "sgd", "--train.optimizer_options.momentum", "much"],
            r"optimizer_options={'momentum'.*",
        ),
    ],
)
def test_what_an_optimizer_or_schedule_does_not_take_is_found_before_anything_slow(path, flags, message):
    """Each was found in the first step, as the fault of a rank."""
    config = load_config(path, flags)
    with pytest.raises(ValueError, match=message) as raised:
        check_optimizer(config, torch.device("cpu"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--train.lr_schedule", "linear", "--train.warmup_steps", "3"],
        ["--train.optimizer", "sgd", "--train.optimizer_options.momentum", "0.9", "--model.weights", "bfloat16"],
        ["--train.optimizer", "adam", "--train.optimizer_options.fused", "true", "--train.lr_schedule", "inverse_sqrt"],
        ["--train.steps", "1000000", "--train.warmup_steps", "999999"],
        ["--train.decay", "matrices", "--train.weight_decay", "0.1", "--train.optimizer_options.foreach", "true"],
        MIN_LR,
        WSD,
    ],
)
def test_optimizers_and_schedules_that_run_are_taken(path, flags):
    check_optimizer(load_config(path, flags), torch.device("cpu"))


def rates(config: Config) -> list[float]:
    """The learning rate of each step."""
    optimizer, schedule = build_optimizer(torch.nn.Linear(2, 2), config.train)
    found = []
    for _ in range(config.train.steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_a_schedule_has_its_options(path):
    flags = ["--train.lr", "1.0", "--train.steps", "8", "--train.warmup_steps", "2"]
    assert rates(load_config(path, [*flags, *WSD])) == pytest.approx([0, 0.5, 1, 1, 1, 1, 1, 0.5])
    low = rates(load_config(path, [*flags, *MIN_LR, "--train.lr_schedule_options.min_lr_rate", "0.5"]))
    assert low[:3] == [0, 0.5, 1] and low[3:] == sorted(low[3:], reverse=True) and 0.5 < low[-1] < 0.6
