"""`fit`: a method under a lightning Trainer with the placement, precision and data order of a run."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable
from itertools import islice
from typing import Any

import lightning
import torch.distributed as dist
from lightning.pytorch.plugins.environments import LightningEnvironment

from distill.config.schema import Engine
from distill.data.base import concatenate
from distill.data.iteration import rank_and_world
from distill.errors import BadInput, LostProcess, suggest
from distill.methods.placement import Placement, Replicas
from distill.training.launch import process_layout
from distill.training.placement.blocks import recompute, root
from distill.training.placement.choose import Processes, build_placement

# What torch says of a process that is gone.
LOST = (
    "Timed out waiting",
    "Connection closed by peer",
    "Connection reset by peer",
    "DataLoader worker",
    "DataLoader timed",
)


class Batches:
    """Batches of this rank from the method's current step to `steps`; each `iter` starts at the current step."""

    def __init__(self, data: Any, method: lightning.LightningModule, steps: int):
        self.data, self.method, self.steps = data, method, steps

    def __iter__(self):
        rank, world = rank_and_world()
        n = self.method.placement.accumulate
        parts = iter(self.data.loader(rank, world, n * (self.method.step + self.method.extra_batches)))
        return (next(parts) if n == 1 else concatenate(list(islice(parts, n))) for _ in range(len(self)))

    def __len__(self):
        return max(self.steps - self.method.step, 0)


def fit(
    method: lightning.LightningModule,
    data: Any,
    steps: int,
    callbacks: Iterable[lightning.Callback] = (),
    *,
    engine: Any = None,
    resume: dict[str, Any] | None = None,
) -> None:
    """Train until `method.step == steps`. `data.loader(rank, world, start)` yields its batches from batch `start` on.

    Args:
        engine: the config's section: strategy, accelerator, precision and the rest; none for its defaults.

    Raises:
        BadInput: this machine lacks the accelerator, or that the precision; settings that do not go together.
        LostProcess: another rank or a data worker has ended or does not answer.
        KeyboardInterrupt: the run was interrupted a second time, or before its first step.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.*")
    method.total_steps, engine = steps, engine or Engine()
    callbacks = [*callbacks, *([_Restore(resume)] if resume else [])]
    equip(method, engine)
    trainer = _trainer(engine, method.placement, steps, callbacks)
    try:
        trainer.fit(method, train_dataloaders=Batches(data, method, steps))
    except SystemExit as error:  # Lightning turns KeyboardInterrupt into this, with exit code 1
        raise KeyboardInterrupt from error
    except RuntimeError as error:
        if any(sign in str(error) for sign in LOST):
            raise LostProcess(
                f"At step {method.step} another rank or a data worker has ended or does not answer "
                f"({str(error).splitlines()[0]}); its own message says why, --resume continues from the last checkpoint."
            ) from error
        raise


def equip(method: lightning.LightningModule, engine: Any) -> None:
    """Set a method's placement, activation checkpointing and compilation from the config."""
    alone = not (dist.is_available() and dist.is_initialized())
    method.placement = build_placement(engine, 1 if alone else dist.get_world_size())
    if method.placement.sharded and (why := method.unsharded):
        raise BadInput(
            f"engine.strategy: {engine.strategy} cuts networks to shards, and {type(method).__name__} needs them whole: "
            f"{why}; use ddp, zero1 or zero2."
        )
    if not method.placement.forward_mode and method.jvp == "forward":
        raise BadInput(
            f"method.jvp: {engine.strategy} has no forward-mode derivative; set method.jvp=difference, or use fsdp."
        )
    for role in engine.compile:
        if role not in (*method.trainable, *method.frozen, *method._averages):
            raise BadInput(
                f"engine.compile: there is no role '{role}'.{suggest(role, method.trainable + method.frozen)}"
            )
    for role in method.trainable if engine.checkpoint_activations else ():
        recompute(getattr(method, role))
    for role in engine.compile:
        root(getattr(method, role)).compile()


def _trainer(engine: Any, placement: Placement, steps: int, callbacks: list[lightning.Callback]) -> lightning.Trainer:
    local_world, machines = process_layout()
    alone = not isinstance(placement, Replicas)
    ours = LightningEnvironment()  # else lightning itself finds a SLURM job, and ranks that nobody started
    spread = {"strategy": Processes(placement, cluster_environment=ours), "num_nodes": machines}
    try:
        return lightning.Trainer(
            accelerator=engine.accelerator,
            devices=1 if alone else local_world,
            precision={"16": "16-mixed", "bf16": "bf16-mixed"}.get(engine.precision, engine.precision),
            max_epochs=2,  # the second epoch repeats the steps that a rollback has undone
            max_steps=steps,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            **({"plugins": [ours]} if alone else spread),
        )
    except Exception as error:  # ValueError, RuntimeError and lightning's own MisconfigurationException
        text = " ".join(str(error).split())
        raise BadInput(
            f"engine.accelerator={engine.accelerator} with engine.precision={engine.precision} does not work here: {text}"
        ) from error


class _Restore(lightning.Callback):
    """Restore a checkpoint of ours once the optimizers exist, before any other callback runs."""

    def __init__(self, state: dict[str, Any]):
        self.state = state

    def on_fit_start(self, trainer, method):
        method.restore(self.state)
        progress = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.total.ready = progress.total.completed = method.step  # so that global_step is the step of the run
