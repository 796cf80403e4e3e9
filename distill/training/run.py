"""Train a config into a run folder."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import config
from distill.config import DictConfig
from distill.metrics.shares import current_shares
from distill.models.copies import share_weights
from distill.training import (
    baseline,
    callbacks,
    checkpoints,
    launch,
    loggers,
    provenance,
    records,
    run_folder,
)
from distill.training.alarms import UpdateMonitor
from distill.training.cost import CostRecorder
from distill.training.experiment import Experiment, build_experiment, check_config
from distill.training.load import restore_experiment
from distill.training.lock import RunLock
from distill.training.rollback import Rollback
from distill.training.run_folder import CHECKPOINTS
from distill.training.signals import Signals
from distill.training.trainer import fit
from distill.training.validation import STOPPED, Validation, best, plateau


def train(
    cfg: DictConfig, folder: Path, resume: bool = False, allow: tuple[str, ...] = (), check: Any = None
) -> Experiment:
    """Train into `folder`. An existing run is refused without `resume`; `check(experiment, folder)` may refuse a new one.

    Of the result, `experiment.method.step` is the number of steps done, and `experiment.preempted` is true if the run
    should be started again. Nothing is written before all objects are built, and a new run that fails before its first
    step leaves no folder.
    """
    folder, cfg.allow = Path(folder), config.record(cfg, allow)
    check_config(cfg, allow)
    launch.join_processes(cfg.engine)
    callbacks.console.quiet = not run_folder.is_rank_zero()
    with Signals() as signals, RunLock(folder) as lock:
        state, before = run_folder.open_run_folder(folder, resume, lock)
        dry_run = check and state is None  # it trains a step, so every network needs weights of its own
        with nullcontext() if dry_run or cfg.engine.strategy not in ("fsdp", "zero3") else share_weights():
            experiment = build_experiment(cfg, allow)
        if resume:
            run_folder.check_same_recipe(cfg, run_folder.read_config(folder))
        if state and state["step"] >= cfg.train.steps and run_folder.is_validated(folder, state["step"]):
            restore_experiment(experiment, state, folder)
            callbacks.console.print(f"{folder} has its {state['step']} steps already; raise train.steps to continue.")
            return experiment
        tests = experiment.suite(folder)
        if dry_run:
            check(experiment, folder)
        if state and (why := plateau(records.history(folder, state["step"]), best(cfg, tests), cfg.train)):
            restore_experiment(experiment, state, folder)
            experiment.stopped = why
            callbacks.console.print(f"{folder} has stopped at step {state['step']}: {why}", highlight=False)
            return experiment
        first = "; the teacher is measured first" if experiment.method.role("teacher") else ""
        callbacks.console.print(f"{folder}: training for {cfg.train.steps} steps{first}.", highlight=False)
        with run_folder.prepare_run_folder(folder, cfg, experiment.method, lock) as opened:
            if run_folder.is_rank_zero():
                _open(opened, cfg, folder, state["step"] if state else -1)
            called = [signals, *_build_callbacks(experiment, folder, opened, tests, before)]
            fit(experiment.method, experiment.data, cfg.train.steps, called, engine=cfg.engine, resume=state)
            if run_folder.is_rank_zero():
                experiment.validation.upload_checkpoint()
    experiment.preempted, experiment.stopped = signals.preempted, experiment.validation.stopped
    return experiment


def _open(opened: list[Any], cfg: DictConfig, folder: Path, until: int) -> None:
    (folder / STOPPED).unlink(missing_ok=True)
    about, files = provenance.record_provenance(folder, max(until, 0))
    conditions = config.plain(cfg) | {"code": about}
    loggers.open_loggers(opened, folder, cfg.log, cfg.name, conditions, until, files)


def _build_callbacks(
    experiment: Experiment, folder: Path, opened: list[Any], tests: Any, before: dict[str, Any]
) -> list[Any]:
    cfg, train, facts = (
        experiment.cfg,
        experiment.cfg.train,
        lambda: run_folder.manifest_facts(experiment.cfg, experiment.data, folder),
    )
    record = callbacks.MetricLogger(opened, train.log_every)
    writer = (
        checkpoints.Writer(folder / CHECKPOINTS, train.keep, train.keep_best, run_folder.record_latest)
        if run_folder.is_rank_zero()
        else None
    )
    fixed = experiment.noise(cfg.eval.validation_samples, cfg.eval.seed)
    validation = Validation(
        cfg,
        folder,
        tests,
        fixed,
        record,
        writer,
        _baseline_name(experiment, fixed, tests),
        experiment.batch_rows,
        current_shares(cfg.engine.validation_timeout),
    )
    intervals = (train.save_every, train.validate_every if train.keep_best else 0)

    def undone(step):
        record.back(step)
        validation.reload_history()

    experiment.method.nonfinite.limit, experiment.validation = train.nonfinite_limit, validation
    saves = callbacks.CheckpointCallback(intervals, writer, facts)
    validation.save = saves.finish
    return [
        UpdateMonitor(train.log_every, validation.alarm),
        callbacks.ProgressBar(train.steps, train.log_every),
        record,
        run_folder.ResumeNotice(facts, before),
        CostRecorder(folder / "cost.json"),
        Rollback(folder / CHECKPOINTS, saves, undone, validation.due),
        validation,
        saves,  # last, so that a checkpoint implies that all rows of its step are written
    ]


def _baseline_name(experiment: Experiment, fixed: tuple[Tensor, dict[str, Tensor]], tests: Any) -> str:
    """The name under which the teacher baseline is saved."""
    cfg, method = experiment.cfg, experiment.method
    teacher = cfg.roles.get("teacher")
    recipe = config.plain({"eval": cfg.eval, "teacher": teacher})
    about = [recipe, method.guidance, method.grid.steps, cfg.engine.precision]
    return baseline.baseline_fingerprint(method.role("teacher") or torch.nn.Identity(), *fixed, tests, about)
