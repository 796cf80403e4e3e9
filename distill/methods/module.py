"""The LightningModule below every Method: one pass of turns per step, optimizers by role, averages, state.

It runs under any `lightning.Trainer`; `distill train` uses the same module with callbacks and placements of its own.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sized
from typing import Any

import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ProgressBar
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful

from distill.config.schema import Optim
from distill.errors import BadInput, suggest
from distill.methods.nonfinite import NonFiniteGuard
from distill.methods.optim import learning_rate
from distill.methods.placement import Placement, Replicas, batch_size, micro_batches
from distill.models.copies import copy_network

Turn = tuple[str, Callable[..., Tensor]]
STATE = "distill"  # the key of a Lightning checkpoint under which a method keeps what Lightning does not


class TurnModule(lightning.LightningModule):
    r"""Trains several networks in turns: one `training_step` is one pass of `turns`, with any number of optimizer steps.

    Optimization is manual: each role has its own optimizer, and `trainer.global_step` counts passes. A subclass names its
    roles and yields `(role, loss)` from `turns`; `placement` holds the networks on devices and steps the optimizers.
    """

    ema: nn.Module
    trainable: tuple[str, ...] = ()
    frozen: tuple[str, ...] = ()
    needs_total_steps = False  # True: the losses depend on the share of the steps that is done

    def __init__(self, warm_start: int = 0):
        super().__init__()
        self.automatic_optimization = False
        self.warm_start = warm_start
        self.step, self.total_steps = 0, 0  # passes of the turns; a rollback takes `step` back
        self.extra_batches = 0  # batches of steps that a rollback undid
        self.nonfinite = NonFiniteGuard(self.trainable)
        self.logs: dict[str, Tensor | float] = {}  # scalars of the last step
        self.captions: list[str] | None = None  # of the current micro-batch, for metrics that read them
        self.paired = False  # whether the current micro-batch brought its own noise
        self.placement = Placement()
        self.shared = torch.Generator().manual_seed(torch.initial_seed() % 2**63)  # the same draws on all ranks
        self.optim: dict[str, Optim] = {}
        self._prepared = self._logging = False
        self._resumed: dict[str, Any] | None = None

    # -- provided by a method --------------------------------------------------------------------------------------

    def turns(self, step: int) -> Iterator[Turn]:
        """Yield `(role, loss)` in the order of the paper's algorithm box."""
        raise NotImplementedError

    def imitation(self) -> Iterator[Turn]:
        """The turns of the warm start."""
        raise NotImplementedError

    def draw(self, x: Tensor | None, z: Tensor, cond: dict[str, Tensor]) -> tuple:
        """The arguments of the losses, computed without gradient and shared by all turns of a step.

        Called for each micro-batch. A turn passes values to a later one in a dictionary among them.
        """
        return x, z, cond

    def schedule_step(self) -> tuple[int, int]:
        """(step, total) for learning rates and averages; methods in rounds count from the start of the round."""
        return self.step, self.total_steps

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        raise NotImplementedError

    def role(self, name: str) -> nn.Module | None:
        """The network of that role or average; None where the method has none."""
        return self._modules.get(name)

    # -- one step --------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], batch_idx: int = 0) -> None:
        """One pass of the turns on a batch: tensors and lists by name, "x" (B, ...), "label" (B,), "caption", ...

        Raises:
            BadInput: the batch is not a mapping with a tensor in it.
        """
        self._check_batch(batch)
        if not self._prepared:
            self.configure_optimizers()
        self.logs, warm = {}, self.step < self.warm_start
        turns = list(self.imitation() if warm else self.turns(self.step - self.warm_start))
        self.placement.agree(self.step, [role for role, _ in turns], self.shared)
        self._only(
            None
        )  # kernels are chosen by what requires a gradient: a resumed run must draw under the same choice
        parts = [self._part(part, warm) for part in micro_batches(batch, self.placement.accumulate)]
        for role, loss in turns:
            self._only(role)
            self._update(role, self._gradient(role, loss, parts))
        self.step += 1
        if self._trainer is not None:
            self._report_to_trainer(batch)

    @staticmethod
    def _check_batch(batch: Any) -> None:
        if not isinstance(batch, dict) or not any(isinstance(v, Tensor) for v in batch.values()):
            raise BadInput(
                f"The data loader yields {type(batch).__name__}; a method trains on dictionaries of tensors, for example "
                '{"x": images, "label": labels}.'
            )

    def _part(self, batch: dict[str, Any], warm: bool) -> tuple:
        """What the turns share on one micro-batch."""
        cond = {k: v for k, v in batch.items() if isinstance(v, Tensor) and k not in ("x", "z")}
        self.captions, self.paired = batch.get("caption"), "z" in batch
        x, z = batch.get("x"), batch.get("z")  # a batch of pairs brings the noise that its x was made from
        if z is None:
            shape = tuple(self.shape) if x is None else x.shape[1:]  # of buckets, each batch has its own
            z = torch.randn(batch_size(batch), *shape, device=self.device)
        return (x, z, cond) if warm else self.draw(x, z, cond)

    def _gradient(self, role: str, loss: Callable[..., Tensor], parts: list[tuple]) -> Tensor:
        """Add up the turn's gradient; returns the loss, the mean over micro-batches and ranks."""
        self.placement.zero_grad(role)
        losses = []
        for i, shared in enumerate(parts):
            value = loss(*shared)
            self.placement.backward(role, value, last=i == len(parts) - 1)
            losses.append(value.detach() / len(parts))
        return self.placement.mean(torch.stack(losses).sum())

    def _only(self, role: str | None) -> None:
        """Enable gradients for this role and disable them for all others; critics and heads not in turn are evaluated."""
        for name, parameters in self._parameters_of.items():
            for p in parameters:
                p.requires_grad_(name == role)
        for name in self.trainable:  # a critic's or head's dropout is for its own turn
            if name != "student":
                getattr(self, name).train(self.training and role in (None, name))

    def _update(self, role: str, value: Tensor) -> None:
        """Step a role's optimizer. If loss or gradient is non-finite on any rank, the step and its averages are skipped."""
        settings = self.optim[role]
        lr = settings.lr * learning_rate(settings, *self.schedule_step())
        norm, stepped = self.placement.step(role, lr, torch.isfinite(value))
        self._average(role, stepped)
        self.log_value(f"{role}/loss", value)
        self.log_value(f"{role}/grad_norm", norm)
        self.log_value(f"{role}/skipped", self.nonfinite.update(role, stepped))

    def log_value(self, name: str, value: Tensor | float) -> None:
        """Keep a scalar of this step for the log; no synchronisation until it is read."""
        self.logs[name] = value.detach() if isinstance(value, Tensor) else value

    # -- averages --------------------------------------------------------------------------------------------------

    def _start_averages(self, averages: dict[str, tuple[str, float | None]]) -> None:
        self._averages = averages
        for name, (role, _) in self._averages.items():
            setattr(self, name, copy_network(getattr(self, role)).requires_grad_(False))
        self.ema.eval()  # a target keeps its source's mode, so both drop the same units
        self._parameters_of = {r: list(getattr(self, r).parameters()) for r in self.trainable}
        for role in self.frozen:
            getattr(self, role).requires_grad_(False).eval()

    @torch.no_grad()
    def _average(self, role: str, stepped: Tensor) -> None:
        for name, (source, decay) in self._averages.items():
            if source == role and decay is not None:
                step, _ = self.schedule_step()
                weight = 1 - min(decay, (1 + step) / (10 + step))
                self.placement.average(name, source, weight, stepped)

    def copy_weights(self, name: str, source: str) -> None:
        """Copy one network's weights into another of its shape, for methods in rounds."""
        self.placement.copy(name, source)

    def reset_optimizer(self, role: str) -> None:
        """Reset the state of a role's optimizer, for methods in rounds."""
        self.placement.reset_optimizer(role)

    def train(self, mode: bool = True) -> TurnModule:
        super().train(mode)
        still = (name for name, (_, decay) in self._averages.items() if name == "ema" or decay is None)
        for role in (*self.frozen, *still):
            getattr(self, role).eval()
        return self

    # -- under a Trainer -------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """One optimizer per trainable role, in the order of `trainable`; none where a DeepSpeed engine owns them.

        Raises:
            BadInput: the Trainer's strategy or precision is one that several networks cannot be trained under.
        """
        if self._trainer is not None and type(self.placement) is Placement:
            self.placement = self._placement_of_trainer()
        self.placement.prepare(self)
        self._parameters_of = {r: self.placement.parameters(r) for r in self.trainable}
        self._prepared = True
        return list(self.placement.optimizers.values())

    def _placement_of_trainer(self) -> Placement:
        """One process, or replicas under `strategy="ddp"`; gradients are averaged here, not by DistributedDataParallel."""
        strategy, precision = self.trainer.strategy, str(self.trainer.precision)
        if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
            raise BadInput(
                f"Trainer(strategy={type(strategy).__name__}) is not supported by methods with several networks; use "
                '"auto" or "ddp", or run `distill train` with engine.strategy fsdp, zero1, zero2 or zero3.'
            )
        if precision.endswith("-true") and precision != "32-true":
            raise BadInput(
                f'Trainer(precision="{precision}") would store trainable weights in low precision; use "bf16-mixed", '
                '"16-mixed" or "32-true".'
            )
        accumulate, scale = self.placement.accumulate, precision == "16-mixed"
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            replicas = Replicas(accumulate, scale)
            replicas.device = self.device
            return replicas
        return Placement(accumulate, scale)

    def on_fit_start(self) -> None:
        """Note whether anything reads the log, and continue from a checkpoint."""
        trainer: lightning.Trainer = self.trainer
        watching = (Checkpoint, EarlyStopping, ProgressBar)
        self._logging = bool(trainer.loggers) or any(isinstance(c, watching) for c in _callbacks(trainer))
        if self._resumed is not None:
            self.restore(self._resumed)

    def on_train_start(self) -> None:
        """Take the number of steps from the Trainer, and apply this run's settings to the optimizers' loaded states.

        Raises:
            BadInput: the Trainer has no end, and a schedule needs it.
        """
        self.total_steps = self._total_steps()
        self.placement.apply_settings()
        loader = self.trainer.train_dataloader
        if isinstance(loader, Stateful) and not isinstance(loader, Sized):
            warnings.warn(
                f"{type(loader).__name__} has a state but no length, and Lightning reads such loaders one batch ahead: a "
                "resumed run leaves out a batch. Give it a __len__, such as 2**62 for an endless one.",
                stacklevel=2,
            )

    def _total_steps(self) -> int:
        """The value of `step` at the end of this fit, by the Trainer's max_steps and max_epochs; 0 if it has no end."""
        trainer: lightning.Trainer = self.trainer
        left = trainer.max_steps - trainer.global_step if trainer.max_steps >= 0 else math.inf
        if trainer.max_epochs is not None and trainer.max_epochs >= 0:
            done = trainer.fit_loop.epoch_loop.batch_progress.current.ready  # of the epoch that a checkpoint continues
            left = min(left, (trainer.max_epochs - trainer.current_epoch) * trainer.num_training_batches - done)
        if math.isfinite(left):
            return self.step + int(left)
        decaying = [f"optim.{role}.decay" for role, o in self.optim.items() if o.decay != "constant"]
        if decaying or self.needs_total_steps:
            raise BadInput(
                f"{decaying[0] if decaying else type(self).__name__} needs the number of training steps, and this Trainer "
                "has no end: give Trainer(max_steps=...), or max_epochs and a data loader that has a length."
            )
        return 0

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Restore the random generators of a resumed run, after data loaders have drawn what they need to start."""
        if self._resumed is not None:
            self._restore_random(self._resumed["random"])
            self._resumed = None

    def _report_to_trainer(self, batch: dict[str, Any]) -> None:
        """Count this pass as one step of the Trainer, and log its scalars."""
        loop = self.trainer.fit_loop.epoch_loop.manual_optimization
        for (
            optimizer
        ) in self.trainer.strategy._lightning_optimizers:  # Lightning sets these hooks again for every batch
            optimizer._on_before_step = optimizer._on_after_step = _do_nothing
        loop.optim_step_progress.increment_ready()
        loop.optim_step_progress.increment_completed()
        if self._logging:
            for name, value in self.logs.items():
                value = value.float() if isinstance(value, Tensor) else float(value)
                self.log(name, value, batch_size=batch_size(batch), prog_bar=name.endswith("/loss"))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add counters and generators; leave out frozen networks, which are read from their source again."""
        state = self.snapshot()
        checkpoint[STATE] = {k: v for k, v in state.items() if k not in ("networks", "optimizers")}
        frozen = tuple(f"{role}." for role in self.frozen)
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in weights.items() if not k.startswith(frozen)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the weights of the frozen networks to the loaded ones, and restore counters and generators.

        Raises:
            BadInput: the checkpoint was not written by a method.
        """
        if STATE not in checkpoint:
            raise BadInput("The checkpoint holds no state of a distill method; give one that a Method wrote.")
        frozen = tuple(f"{role}." for role in self.frozen)
        own = {k: v for k, v in self.state_dict().items() if k.startswith(frozen)}
        checkpoint["state_dict"] = own | checkpoint["state_dict"]
        self._resumed = checkpoint[STATE]
        self.step, self.extra_batches = self._resumed["step"], self._resumed["extra_batches"]

    # -- state -----------------------------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """The state from which a run continues bit for bit, complete on rank 0; without frozen roles.

        A collective: all ranks call it. The state has the same form under every placement.
        """
        placement, named = self.placement, (*self.trainable, *self._averages)
        random = {"cpu": placement.gather(torch.get_rng_state()), "shared": self.shared.get_state()}
        if self.device.type == "cuda":
            random["cuda"] = placement.gather(torch.cuda.get_rng_state())
        return {
            "step": self.step,
            "networks": {n: placement.weights(n) for n in named},
            "optimizers": {r: placement.moments(r) for r in self.trainable},
            "random": random,
            "nonfinite": self.nonfinite.state(),
            "extra_batches": self.extra_batches,
        }

    def restore(self, state: dict[str, Any], weights_only: bool = False) -> None:
        """Undo `snapshot`. Optimizers must exist unless `weights_only`, which takes the state's own tensors.

        On another number of ranks all is exact but the ranks' own draws of noise, which are seeded by rank and step.
        """
        load = self.placement.load_weights if not weights_only else self._take
        for name, weights in state.get("networks", {}).items():
            load(name, weights)
        self.step, self.extra_batches = state["step"], state.get("extra_batches", state.get("ahead", 0))
        if weights_only:
            return
        self.nonfinite.restore(state.get("nonfinite", state.get("skips", {})))
        for role, moments in state.get("optimizers", {}).items():
            self.placement.load_moments(role, moments)
        self._restore_random(state["random"])

    def _take(self, name: str, weights: dict[str, Tensor]) -> None:
        network = getattr(self, name)
        network.load_state_dict(weights, assign=True)
        if name in self._parameters_of:
            self._parameters_of[name] = list(network.parameters())

    def _restore_random(self, random: dict[str, Any]) -> None:
        self.shared.set_state(random["shared"].cpu())
        cpu, rank = random["cpu"] if isinstance(random["cpu"], list) else [random["cpu"]], self.placement.rank
        if len(cpu) != self.placement.world:
            torch.manual_seed((torch.initial_seed() + 1_000_003 * self.step + rank) % 2**63)
            return
        torch.set_rng_state(cpu[rank].cpu())
        if "cuda" in random and self.device.type == "cuda":
            cuda = random["cuda"] if isinstance(random["cuda"], list) else [random["cuda"]]
            torch.cuda.set_rng_state(cuda[rank].cpu())

    # -- optimizer settings ------------------------------------------------------------------------------------------

    def _take_optim(self, optim: dict[str, Any] | None) -> None:
        for role in optim or {}:
            if role not in self.trainable:
                raise BadInput(f"optim.{role}: not a trainable role.{suggest(role, self.trainable)}")
        given = {role: (optim or {}).get(role, {}) for role in self.trainable}
        self.optim = {role: o if isinstance(o, Optim) else Optim(**o) for role, o in given.items()}


def _do_nothing() -> None:
    """Replaces Lightning's hooks around an optimizer's step, which would count it."""


def _callbacks(trainer: Any) -> list[lightning.Callback]:
    return trainer.callbacks
