"""Faults put into a run from outside, by name; each is called in every rank before `flexsp train` begins."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch

from flexsp.data import Sequences
from flexsp.parallel import step
from flexsp.train import board, failures, run_model, traceback_file

RANK, STEP = 1, 2
"""Where a fault strikes."""


def here() -> bool:
    return os.environ["RANK"] == str(RANK)


def at_forward(strike: Callable[[Any], Any], everywhere: bool = False) -> None:
    """`strike(loss)` in the first micro-batch of the step, on the rank."""
    honest, ran = step._loss_sum, step.forward_backward
    now: list[int] = [-1]

    def noting(model, batch, groups):
        now[0] = batch.step
        return ran(model, batch, groups)

    def struck(model, micro_batch, context):
        loss = honest(model, micro_batch, context)
        if (here() or everywhere) and now[0] == STEP:
            now[0] = -1
            strike(loss)
        return loss

    from flexsp.train import loop

    step._loss_sum, loop.forward_backward = struck, noting


def none() -> None:
    pass


def slow() -> None:
    """Each step takes half a second more, on all ranks."""
    from flexsp.train import loop

    honest = loop.forward_backward

    def struck(*arguments):
        time.sleep(0.5)
        return honest(*arguments)

    loop.forward_backward = struck


def sigterm_in_step() -> None:
    at_forward(lambda loss: os.kill(os.getpid(), signal.SIGTERM))


def sighup_in_step() -> None:
    at_forward(lambda loss: os.kill(os.getpid(), signal.SIGHUP))


def killed_saving_model() -> None:
    """Rank 0, which has written a part of it."""
    from transformers import PreTrainedModel

    honest = PreTrainedModel.save_pretrained

    def struck(self, folder, **options):
        honest(self, folder, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    PreTrainedModel.save_pretrained = struck


def asked_saving_model() -> None:
    from transformers import PreTrainedModel

    def struck(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    PreTrainedModel.save_pretrained = struck


def tokenizer_cannot_be_saved() -> None:
    """Once a part of it is written."""
    from transformers import PreTrainedTokenizerFast

    honest = PreTrainedTokenizerFast.save_pretrained

    def struck(self, folder, **options):
        honest(self, folder, **options)
        raise OSError(28, "No space left\non device")

    PreTrainedTokenizerFast.save_pretrained = struck


def raises_in_comparison() -> None:
    from flexsp.train import run

    def struck(*_):
        raise RuntimeError("nothing compares")

    run.compare_planners = struck


def no_locks() -> None:
    """As on a file system that has none."""
    import errno

    from flexsp.train import run_dir

    def struck(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    run_dir.fcntl.flock = struck


def raises_in_forward() -> None:
    def strike(loss):
        raise RuntimeError("the fan\nhas stopped")

    at_forward(strike)


def raises_where_the_folder_hangs() -> None:
    """Whoever opens a pipe that nobody reads waits, as on storage that does not answer. The others are busy."""
    traceback_file.WRITE_S = 1.0

    def strike(loss):
        os.mkfifo(f"out-raises_where_the_folder_hangs/error-rank-{os.environ['RANK']}.txt")
        if here():
            raise RuntimeError("the fan has stopped")
        time.sleep(1000)

    at_forward(strike, everywhere=True)


def raises_value_error_in_forward() -> None:
    def strike(loss):
        raise ValueError("an odd shape")

    at_forward(strike)


def raises_in_backward() -> None:
    def strike(loss):
        def late(gradient):
            raise ArithmeticError("no gradient today")

        loss.register_hook(late)

    at_forward(strike)


def raises_in_optimizer() -> None:
    honest = torch.optim.AdamW.step
    done = [-1]  # the trial step at the start does not count

    def struck(self, *arguments):
        done[0] += 1
        if here() and done[0] > STEP:
            raise RuntimeError("no step today")
        return honest(self, *arguments)

    torch.optim.AdamW.step = struck


def profile_on_a_full_disk() -> None:
    """From the step on, run.dir/profile.json is on one."""
    at_forward(lambda loss: _fill("out-profile_on_a_full_disk/profile.json"))


def _fill(path: str) -> None:
    os.symlink("/dev/full", path + ".full")
    os.replace(path + ".full", path)


def killed() -> None:
    """The others are in a collective."""
    at_forward(lambda loss: os.kill(os.getpid(), signal.SIGKILL))


def killed_while_another_computes() -> None:
    at_forward(lambda loss: os.kill(os.getpid(), signal.SIGKILL) if here() else time.sleep(100), everywhere=True)


def exits_with_0() -> None:
    """The launcher sees no failure."""
    at_forward(lambda loss: os._exit(0))


def stopped() -> None:
    at_forward(lambda loss: os.kill(os.getpid(), signal.SIGSTOP))


def store_of_first_node(sent: signal.Signals, then: signal.Signals, ranks: int) -> None:
    """The process that serves torchrun's store, and the first `ranks`, are sent these signals in the step."""
    board.ANSWER_S = failures.PATIENCE_S = 2.0

    def strike(loss):
        if int(os.environ["RANK"]) < ranks:
            os.kill(int(os.environ["FLEXSP_TEST_STORE"]), sent)
            os.kill(os.getpid(), then)

    at_forward(strike, everywhere=True)


def first_node_is_lost() -> None:
    store_of_first_node(signal.SIGKILL, signal.SIGKILL, 2)


def first_node_is_frozen() -> None:
    store_of_first_node(signal.SIGSTOP, signal.SIGSTOP, 2)


def first_rank_dies_and_the_store_is_frozen() -> None:
    store_of_first_node(signal.SIGSTOP, signal.SIGKILL, 1)


def loops() -> None:
    def strike(loss):
        while True:
            time.sleep(0.05)

    at_forward(strike)


def build_of(strike: Callable[[], Any]) -> None:
    honest = run_model.build_model

    def struck(*arguments, **options):
        if here():
            strike()
        return honest(*arguments, **options)

    run_model.build_model = struck


def raises_early() -> None:
    def strike():
        raise OSError("the shelf is empty")

    build_of(strike)


def killed_early() -> None:
    build_of(lambda: os.kill(os.getpid(), signal.SIGKILL))


def asked_early() -> None:
    """One rank is sent SIGTERM, and another is busy."""
    build_of(lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(60)))


def all_asked_early() -> None:
    honest = run_model.build_model

    def struck(*arguments, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2 if here() else 60)
        return honest(*arguments, **options)

    run_model.build_model = struck


def read_of(strike: Callable[[], Any]) -> None:
    """`strike` at the rank's fifteenth reading, ahead of the step that it is for."""
    honest = Sequences.read
    count = [0]

    def struck(self, *arguments):
        count[0] += 1
        if here() and count[0] == 15:
            strike()
        return honest(self, *arguments)

    Sequences.read = struck


def reader_raises() -> None:
    def strike():
        raise OSError(5, "Input/output error", "shard-7.parquet")

    read_of(strike)


def reader_dies() -> None:
    def strike():
        raise SystemExit("no more")

    read_of(strike)


def reader_stalls() -> None:
    read_of(lambda: time.sleep(10_000))


def first_killed_while_planning() -> None:
    """Rank 0, whose planner is in the midst of a plan that never ends."""
    if os.environ["RANK"] != "0":
        return
    from flexsp.train import loop

    honest = loop.forward_backward

    def struck(model, batch, groups):
        if batch.step == 1:
            time.sleep(1.0)  # the planner has come to the third batch
            os.kill(os.getpid(), signal.SIGKILL)
        return honest(model, batch, groups)

    loop.forward_backward = struck


def configured(*flags: str) -> None:
    """As if the TOML of this rank's node were another one."""
    from flexsp.train import run

    honest = run.load_config
    run.load_config = lambda path, overrides: honest(path, [*overrides, *(flags if here() else [])])


def other_lr() -> None:
    configured("--train.lr", "1.0")


def other_every() -> None:
    configured("--checkpoint.every", "3", "--data.cache_dir", "data-of-another-node")


def other_options() -> None:
    """The same ones, written in another order; and one more."""
    if here():
        configured("--train.optimizer_options.eps", "1e-8", "--train.optimizer_options.amsgrad", "true")
    else:
        from flexsp.train import run

        honest = run.load_config
        run.load_config = lambda path, overrides: honest(path, [*overrides, "--train.optimizer_options.eps", "1e-8"])


def other_places() -> None:
    configured("--data.cache_dir", "data-of-another-node", "--data.workers", "1", "--data.source", "./rows.jsonl")


def other_kind_of_place() -> None:
    """The others would measure, and wait for this one."""
    configured("--planner.profile", "")


def other_version() -> None:
    import numpy

    if here():
        numpy.__version__ = "1.0.7"


def other_profile() -> None:
    configured("--planner.profile", "profile-of-another-node.json")


def other_model() -> None:
    """Its files are others: a layer computes something else with rank 0's weights."""
    configured("--model.path", "model-of-another-node")


def other_architecture() -> None:
    honest = run_model.AutoModelForCausalLM.from_config

    def struck(config, **options):
        config.num_hidden_layers += 1
        model = honest(config, **options)
        config.num_hidden_layers -= 1
        return model

    if here():
        run_model.AutoModelForCausalLM.from_config = struck


def full(stream: int) -> None:
    """This rank's standard output or error is a file on a full disk."""
    os.dup2(os.open("/dev/full", os.O_WRONLY), stream)


def first_has_a_full_output() -> None:
    raises_in_forward()
    if os.environ["RANK"] == "0":
        full(1)


def has_a_full_error() -> None:
    raises_in_forward()
    if here():
        full(2)


def out_of_memory_in_building() -> None:
    honest = run_model.AutoConfig.for_model

    def struck(*arguments, **fields):
        if here():
            raise MemoryError("Unable to allocate 4.00 GiB")
        return honest(*arguments, **fields)

    run_model.AutoConfig.for_model = struck


def out_of_memory_on_a_full_disk() -> None:
    def strike(loss):
        _fill("out-out_of_memory_on_a_full_disk/profile.json")
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    at_forward(strike)


def out_of_memory_in_evaluation() -> None:
    from flexsp.train import evaluate

    honest = evaluate.forward_only

    def struck(*arguments):
        if here():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return honest(*arguments)

    evaluate.forward_only = struck


def raises_value_error_early() -> None:
    honest = run_model.prepare

    def struck(*arguments):
        if here():
            raise ValueError("a tensor of this rank is odd")
        return honest(*arguments)

    run_model.prepare = struck


def finds_bad_input_late() -> None:
    build_of(lambda: time.sleep(2))


def has_no_config() -> None:
    from flexsp.train import run

    honest = run.load_config
    run.load_config = lambda path, overrides: honest("none.toml" if here() else path, overrides)


def verifying(strike: Callable[[], Any], everywhere: bool = False) -> None:
    from flexsp.train import verify

    honest = verify.difference

    def struck(*arguments):
        if here() or everywhere:
            strike()
        return honest(*arguments)

    verify.difference = struck


def raises_in_verify() -> None:
    def strike():
        raise RuntimeError("the fan has stopped")

    verifying(strike)


def asked_in_verify() -> None:
    verifying(lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(60)), everywhere=True)


def writer_stalls() -> None:
    from flexsp.train import safe_load

    honest = safe_load.write_digests

    def struck(*arguments):
        if here():
            time.sleep(1000)
        return honest(*arguments)

    safe_load.write_digests = struck


def has_no_finite_gradient() -> None:
    at_forward(lambda loss: loss.register_hook(lambda gradient: gradient * float("nan")))


def never_has_a_finite_gradient() -> None:
    from flexsp.train import loop

    honest = loop.forward_backward

    def struck(model, batch, groups):
        result = honest(model, batch, groups)
        if here():
            next(model.parameters()).grad.mul_(float("inf"))
        return result

    loop.forward_backward = struck


def sees_another_folder() -> None:
    """As a node does on which run.dir is a folder of its own."""
    from flexsp.train import run

    honest = run.held_folder

    def struck(*arguments):
        if here():
            os.makedirs("another-node", exist_ok=True)
            os.chdir("another-node")
        return honest(*arguments)

    run.held_folder = struck
