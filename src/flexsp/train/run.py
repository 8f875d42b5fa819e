"""A training run, from a configuration file to a saved model."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch.distributed as dist
from transformers.utils import logging as transformers_logging

from flexsp import jsonfields
from flexsp.data import PlannedLoader, Sequences
from flexsp.parallel import GroupPool, save_pretrained
from flexsp.parallel.control import from_first_rank
from flexsp.planner import find_planner
from flexsp.planner.policies import policy_for
from flexsp.planner.replay import read_plan_log
from flexsp.plans import Plan
from flexsp.profile import Profile
from flexsp.train import alike, run_data, run_model, run_profile
from flexsp.train.again import same_command
from flexsp.train.compare import compare_planners, summary_line
from flexsp.train.config import Config, load_config
from flexsp.train.display import Display
from flexsp.train.evaluate import Evaluation, held_out_sequences
from flexsp.train.failures import Guard, Say
from flexsp.train.learn import FILE, Learner, go_on
from flexsp.train.loop import Loop
from flexsp.train.optimizers import check_optimizer
from flexsp.train.ranks import joined_ranks
from flexsp.train.resume import Start, resume_point
from flexsp.train.resume_checks import check_data, say_passed_over
from flexsp.train.run_dir import held_folder
from flexsp.train.sinks import check_sinks
from flexsp.train.watch import Watch

log = logging.getLogger(__name__)


def run_from_config(path: str, overrides: Sequence[str], say: Say) -> int:
    """What `flexsp train` does; returns the exit status.

    Args:
        path: of the TOML file.
        overrides: dotted flags.
        say: is given what goes wrong once the ranks are there, in one line and on one of them.

    Raises:
        ValueError: bad configuration; the message is one line.
        SystemExit: with the status, where something did.
    """
    config = load_config(path, overrides)
    with Guard(Path(config.run.dir), config.run.timeout_s, say) as guard, ExitStack() as held, guard.explaining():
        guard.place.at("joining the other ranks")
        with joined_ranks(config.run.timeout_s), guard.explaining(), Display() as display:
            train(config, display, guard, held)
    return 0


def train(config: Config, display: Display, guard: Guard, held: ExitStack) -> None:
    """One run.

    The run's folder goes to `held`, which is closed once all is over: a rank that fails holds it until it has ended,
    for meanwhile a checkpoint may still be written.

    1. Compare what the ranks were started with. Hold the run's folder; find the checkpoint to go on from, if any.
    2. Open the corpus, and what it is evaluated on; build the model, join it to the ranks.
    3. Load or measure the profile; go on from what an earlier run in the same folder learned.
    4. Train on planned batches; one line of metrics a step. Measured times and memory correct the profile. Evaluations,
       checkpoints.
    5. Save the model and its tokenizer.
    6. Compare the planners on further batches, weights untouched.

    SIGTERM or SIGHUP ends it after a step and a checkpoint; before the first step and after the last, at once.
    """
    transformers_logging.disable_progress_bar()
    alike.check_alike(config)
    find_planner(config.planner.name)  # a wrong name is an error before anything slow
    timeout = datetime.timedelta(seconds=config.run.timeout_s)
    groups = GroupPool(timeout=timeout, transport=config.run.transport or None)
    check_optimizer(config, groups.device)
    from_first_rank(lambda: check_sinks(config), groups)
    guard.place.at("waiting for run.dir")
    held.enter_context(held_folder(Path(config.run.dir), groups, config.run.timeout_s))
    guard.place.at("looking for a checkpoint")
    start = resume_point(config, groups)
    first_step = 0 if start is None else start.steps
    guard.again = lambda: same_command(config, start, saved=False)
    with Watch(config, display, groups, first_step, append=start is not None) as watch:
        _train(config, groups, start, guard, watch)
        watch.summarize()


def _train(config: Config, groups: GroupPool, start: Start | None, guard: Guard, watch: Watch) -> None:
    first_step, folder = 0 if start is None else start.steps, Path(config.run.dir)
    replay = from_first_rank(lambda: read_plan_log(config.planner.replay) if config.planner.replay else {}, groups)
    guard.place.at("opening the data")
    corpus = run_data.open_on_all_ranks(config, watch.display.tell)
    check_data(config, start, corpus)
    sequences = run_data.build_sequences(config, corpus)
    guard.place.at("building the model")
    model = run_model.build_on_first_rank(config.model, config.train.seed)
    sequences = run_data.check_fit(model, sequences, config.data)
    if dist.get_rank() == 0:
        say_passed_over(config, start, corpus.fingerprint, len(sequences.lengths))
    held_out = held_out_sequences(config, model, corpus, watch.display.tell)
    num_parameters = sum(p.numel() for p in model.parameters())
    log.info(
        "model: %s, %s parameters, on %d ranks (%s)",
        type(model).__name__, f"{num_parameters:,}", dist.get_world_size(), dist.get_backend(),
    )  # fmt: skip
    if groups.device.type == "cuda" and config.model.dtype == "float32":
        log.warning(
            "model.dtype='float32': on CUDA the fast attention kernels take bfloat16, and others are slower by far; "
            "set model.dtype='bfloat16' unless float32 is meant"
        )
    alike.check_model(model, config, groups.control)
    model = run_model.prepare(model, config.model)
    guard.place.at("measuring the profile")
    measured = run_profile.build_profile(config, model, groups, watch.display)
    if config.planner.profile:
        alike.check_profile(measured.to_json(), groups.control)
    saved = None if start is None else start.profile
    profile = from_first_rank(lambda: go_on(measured, folder, config.planner.correct, saved), groups)
    run_profile.check_profile(profile, config, None if profile == measured else folder / FILE)
    guard.place.at("preparing the first step")
    device = next(model.parameters()).device
    learner = Learner(measured, profile, groups, device, folder, config.planner.correct, first_step)

    evaluation = Evaluation(config, model, held_out, measured, groups, append=start is not None)
    with _loader(config, sequences, profile, groups, first_step, replay) as loader:
        loop = Loop(
            config=config, model=model, groups=groups, loader=loader, learner=learner, evaluation=evaluation,
            guard=guard, watch=watch, start=start, data=corpus.identity(),
        )  # fmt: skip
        if not loop.run():
            return
        guard.place.at("saving the model")  # before anything else that may fail
        if config.run.save_model:
            save_pretrained(model, folder / "model", run_model.tokenizer_of(config))
        guard.place.at("comparing planners")
        compared = [loader.unplanned(config.train.steps + i) for i in range(config.run.compare_batches)]
    if compared and policy_for(learner.profile, config.data.max_length):
        log.info("comparison: left out: one degree for all holds the context limit under no policy, and chooses none")
        compared = []
    if compared:
        report = compare_planners(model, compared, learner.profile, groups, config.data.max_length, watch.display)
        if dist.get_rank() == 0:
            jsonfields.write_object(folder / "comparison.json", report)
        log.info("%s", summary_line(report))


def _loader(
    config: Config,
    sequences: Sequences,
    profile: Profile,
    groups: GroupPool,
    first_step: int,
    replay: Mapping[int, Plan],
) -> PlannedLoader:
    return PlannedLoader(
        sequences,
        profile,
        groups.control,
        batch_size=config.train.batch_size,
        steps=config.train.steps,
        first_step=first_step,
        seed=config.train.seed,
        planner=config.planner.name,
        options=run_profile.planner_options(config),
        plan_ahead=config.planner.plan_ahead,
        plan_timeout_s=config.planner.timeout_s,
        replay=replay,
        fallback=config.planner.fallback,
        read_timeout_s=0.8 * config.run.timeout_s,  # before the others, in a collective, give up
    )
