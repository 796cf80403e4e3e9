"""Method: which networks exist, who is updated when, and the only training loop of the project."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from distill.denoise import network_of
from distill.errors import BadInput, suggest
from distill.grid import Grid
from distill.losses.regression import mse
from distill.place import Place, batch_size, copy_of, learning_rate, micro_batches
from distill.schema import Optim
from distill.skips import Skips
from distill.solvers import DDIM, solve

Turn = tuple[str, Callable[..., Tensor]]


class Method(lightning.LightningModule):
    r"""A frozen teacher, a trainable student and whoever else takes turns.

    A subclass states its roles and yields its turns; one step is one pass of them:

        for role, loss in turns(step):  only `role` requires gradient;  loss(*shared).backward();  step that role

    Where the roles live and how they step is `place`, which a strategy replaces before training starts.

    Args:
        roles: name -> Denoiser (or another module, for heads). A string names the role to copy; a trainable role that is
            absent starts as a copy of the teacher.
        grid: the student's times: a number of steps K (uniform), a list 1 = t_K > ... > t_0 = 0, or a Grid.
        guidance: teacher's w in `uncond + w (cond - uncond)`; w = 1 is the conditional model.
        optim: role -> Optim.
        ema: decay of the averaged student that samples, validates and is exported; ramps up as (1 + n)/(10 + n).
        averages: further averaged copies, name -> (role, decay), such as a consistency target; decay 0 copies each step,
            decay none never: the method renews that copy itself.
        warm_start: steps in which trainable denoisers first regress on the teacher's E[x | x_t]; for students whose
            network is not a copy of the teacher's.

    Raises:
        BadInput: a role that is unknown, missing, or has no weights to copy.
    """

    trainable: tuple[str, ...] = ("student",)
    frozen: tuple[str, ...] = ("teacher",)
    sampler: Any = DDIM()  # how the student walks its grid
    serving: str = "ode"  # the kind of stock scheduler that walks the same way: ode or renoise
    unsharded: str = ""  # why no network of this method may be cut to shards
    needs_data: bool = True  # False: conditions and a shape are enough

    def __init__(
        self,
        roles: dict[str, Any],
        *,
        grid: int | list | Grid = 4,
        guidance: float = 1.0,
        optim: dict[str, Any] | None = None,
        ema: float = 0.999,
        averages: dict[str, tuple[str, float | None]] | None = None,
        warm_start: int = 0,
    ):
        super().__init__()
        self.automatic_optimization = False
        self.grid = Grid.of(grid)
        self.guidance = guidance
        self.warm_start = warm_start
        self.step, self.total_steps = 0, 0
        self.ahead = 0  # batches taken beyond the steps that count: those of steps that were undone
        self.skips = Skips(self.trainable)
        self.logs: dict[str, Tensor | float] = {}
        self.captions: list[str] | None = None  # of this micro-batch, for a metric that reads them
        self.paired = False  # whether this micro-batch brought its noise
        self.place = Place()
        self.shared = torch.Generator().manual_seed(torch.initial_seed() % 2**63)  # draws that all ranks agree on
        for role in roles:
            if role not in self.trainable + self.frozen:
                raise BadInput(
                    f"roles.{role}: {type(self).__name__} has no such role.{suggest(role, self.trainable + self.frozen)} "
                    f"It has {', '.join(self.trainable + self.frozen)}."
                )
        for role in self.frozen + self.trainable:
            setattr(self, role, self._fill(role, roles))
        self._start_averages({"ema": ("student", ema)} | (averages or {}))
        self.optim = {role: self._optim(role, optim or {}) for role in self.trainable}
        for role in optim or {}:
            if role not in self.trainable:
                raise BadInput(f"optim.{role}: not a trainable role.{suggest(role, self.trainable)}")

    # -- what a method writes ------------------------------------------------------------------------------------

    def turns(self, step: int) -> Iterator[Turn]:
        """Yield `(role, loss)` in the order of the paper's algorithm box."""
        raise NotImplementedError

    def draw(self, x: Tensor | None, z: Tensor, cond: dict[str, Tensor]) -> tuple:
        """What all turns of one step share, without gradient; its items are the losses' arguments.

        Called for each micro-batch, so what one turn leaves for a later one belongs into a dictionary among them.
        """
        return x, z, cond

    def start(self, role: str, roles: dict[str, Any]) -> nn.Module:
        """A trainable role that the config does not give: a copy of the teacher."""
        return copy_of(self._weights(role, roles, "teacher"))

    def clock(self) -> tuple[int, int]:
        """(step, of how many) for learning rates and averages; a method that starts anew midway counts from there."""
        return self.step, self.total_steps

    # -- sampling ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        z: Tensor,
        cond: dict[str, Tensor],
        generator: torch.Generator | None = None,
        grid: int | list | Grid | None = None,
    ) -> Tensor:
        """Few-step samples of the averaged student from noise z (B, ...): exactly K = grid.steps evaluations.

        `generator` draws what a stochastic sampler needs; `grid` replaces the grid it was trained for.
        """
        times = (self.grid if grid is None else Grid.of(grid)).times
        x_1, told = self.student.schedule.start(z), self.student_cond(cond, len(z))
        return solve(self.ema, x_1, times, self.sampler, generator=generator, **told)

    def student_cond(self, cond: dict[str, Tensor], n: int) -> dict[str, Tensor]:
        """The conditions of n samples as the student takes them: with `guidance` where its network has that input."""
        if not network_of(self.student).guided:
            return cond
        return cond | {"w": torch.full((n,), float(self.guidance), device=self.device)}

    @torch.no_grad()
    def simulate(self, z: Tensor, cond: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The student's own input at one time of its grid, by backward simulation: x_{t_k} (B, ...) and t_k (B,).

        k ~ U{1..K}, the same on all ranks; from noise z the student walks down to t_k with its own sampler, so that it
        trains on what it will meet when it samples. https://arxiv.org/abs/2405.14867, section 4.5.
        """
        k = int(self.grid.draw(1, generator=self.shared))
        times = self.grid.times[: self.grid.steps - k + 1]
        x_1 = self.student.schedule.start(z)
        x_t = solve(self.student, x_1, times, self.sampler, **cond) if len(times) > 1 else x_1
        dtype = torch.promote_types(z.dtype, torch.float32)
        return x_t, torch.full((len(z),), times[-1], dtype=dtype, device=z.device)

    def judge(self, x: Tensor, data: Tensor | None, cond: dict[str, Tensor]) -> Tensor:
        """`metric` of samples x, one or several in a row a condition, (B,); it is told the data's captions too."""
        captions = self.captions or ()
        told = {"caption": [c for c in captions for _ in range(len(x) // len(captions))]} if captions else {}
        return self.metric(x, data=data, **cond, **told)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(network_of(self.student).shape)

    # -- the loop ------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Any], index: int = 0) -> None:
        self.logs, warm = {}, self.step < self.warm_start
        turns = list(self.imitation() if warm else self.turns(self.step - self.warm_start))
        self.place.agree(self.step, [role for role, _ in turns], self.shared)
        self._only(None)  # else what is drawn after a resume differs in its last digit: kernels are chosen by who needs one
        parts = [self._part(part, warm) for part in micro_batches(batch, self.place.accumulate)]
        for role, loss in turns:
            self._only(role)
            self._update(role, self._gradient(role, loss, parts))
        self.step += 1

    def _part(self, batch: dict[str, Any], warm: bool) -> tuple:
        """What the turns share on one micro-batch."""
        cond = {k: v for k, v in batch.items() if isinstance(v, Tensor) and k not in ("x", "z")}
        self.captions, self.paired = batch.get("caption"), "z" in batch
        x, z = batch.get("x"), batch.get("z")  # a batch of pairs brings the noise that its x was made from
        if z is None:
            shape = self.shape if x is None else x.shape[1:]  # of buckets, each batch has its own
            z = torch.randn(batch_size(batch), *shape, device=self.device)
        return (x, z, cond) if warm else self.draw(x, z, cond)

    def _gradient(self, role: str, loss: Callable[..., Tensor], parts: list[tuple]) -> Tensor:
        """Add up the turn's gradient; returns the loss, the mean over micro-batches and ranks."""
        self.place.zero_grad(role)
        total = 0.0
        for i, shared in enumerate(parts):
            value = loss(*shared)
            self.place.backward(role, value, last=i == len(parts) - 1)
            total = total + value.detach() / len(parts)
        return self.place.mean(total)

    def imitation(self) -> Iterator[Turn]:
        r"""Warm start: each trainable denoiser minimises |G(x_t) - D(x_t)|^2 at t ~ U(0, 1), D the teacher."""

        def loss(role, x, z, cond):
            t = torch.rand(len(z), device=z.device)
            x_t = self.teacher.schedule.add_noise(torch.zeros_like(z) if x is None else x, t, z)
            with torch.no_grad():
                target = self.teacher(x_t, t, **cond)
            return mse(getattr(self, role)(x_t, t, **cond), target)

        for role in self.trainable:
            if hasattr(getattr(self, role), "schedule"):
                yield role, lambda x, z, cond, role=role: loss(role, x, z, cond)

    def _only(self, role: str | None) -> None:
        """Only this role's parameters require gradient."""
        for name, parameters in self._parameters_of.items():
            for p in parameters:
                p.requires_grad_(name == role)

    def _update(self, role: str, value: Tensor) -> None:
        """Step a role, unless its loss or gradient is not finite on some rank: then neither it nor its averages move."""
        settings = self.optim[role]
        lr = settings.lr * learning_rate(settings, *self.clock())
        norm, stepped = self.place.step(role, lr, torch.isfinite(value))
        self._average(role, stepped)
        self.log_value(f"{role}/loss", value)
        self.log_value(f"{role}/grad_norm", norm)
        self.log_value(f"{role}/skipped", self.skips.note(role, stepped))

    def log_value(self, name: str, value: Tensor | float) -> None:
        """Keep a scalar of this step for the log; no synchronisation until someone reads it."""
        self.logs[name] = value.detach() if isinstance(value, Tensor) else value

    # -- averages, optimisers, state -----------------------------------------------------------------------------

    def _start_averages(self, averages: dict[str, tuple[str, float | None]]) -> None:
        self._averages = averages
        for name, (role, _) in self._averages.items():
            setattr(self, name, copy_of(getattr(self, role)).requires_grad_(False))
        self.ema.eval()  # a target keeps its source's mode, so both drop the same units
        self._parameters_of = {r: [p for p in getattr(self, r).parameters()] for r in self.trainable}
        for role in self.frozen:
            getattr(self, role).requires_grad_(False).eval()

    @torch.no_grad()
    def _average(self, role: str, stepped: Tensor) -> None:
        for name, (source, decay) in self._averages.items():
            if source == role and decay is not None:
                step, _ = self.clock()
                weight = 1 - min(decay, (1 + step) / (10 + step))
                self.place.average(name, source, weight, stepped)

    def renew(self, name: str, source: str) -> None:
        """Copy one network's weights into another of its shape, for a method that starts anew midway."""
        self.place.copy(name, source)

    def train(self, mode: bool = True) -> Method:
        super().train(mode)
        still = (name for name, (_, decay) in self._averages.items() if name == "ema" or decay is None)
        for role in (*self.frozen, *still):
            getattr(self, role).eval()
        return self

    def step_told(self, like: Tensor, t: Tensor | None = None) -> dict[str, Tensor]:
        """What a critic whose network takes a second time is told: t of the student's step, its last one by default."""
        if not network_of(self.critic).flow_map:
            return {}
        return {"s": torch.full_like(like, self.grid.times[-2]) if t is None else t}

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """None for lightning: a role's optimiser belongs to its place, and lightning would count each as a step."""
        self.place.prepare(self)
        self._parameters_of = {r: self.place.parameters(r) for r in self.trainable}
        return []

    def forget(self, role: str) -> None:
        """Drop the moments of a role's optimiser, for a method that starts anew midway."""
        self.place.forget(role)

    def snapshot(self) -> dict[str, Any]:
        """All that a run needs to go on bit for bit, whole on rank 0; frozen roles are read again from their source.

        All ranks call it together; the state has the same form under every strategy.
        """
        place, named = self.place, (*self.trainable, *self._averages)
        random = {"cpu": place.gather(torch.get_rng_state()), "shared": self.shared.get_state()}
        if self.device.type == "cuda":
            random["cuda"] = place.gather(torch.cuda.get_rng_state())
        return {
            "step": self.step,
            "networks": {n: place.weights(n) for n in named},
            "optimizers": {r: place.moments(r) for r in self.trainable},
            "random": random,
            "skips": self.skips.state(),
            "ahead": self.ahead,
        }

    def restore(self, state: dict[str, Any], weights_only: bool = False) -> None:
        """Undo `snapshot`. Optimisers must exist unless `weights_only`, which takes the state's own tensors.

        On another number of ranks all is exact but the ranks' own draws of noise, which start anew from rank and step.
        """
        load = self.place.load_weights if not weights_only else self._take
        for name, weights in state["networks"].items():
            load(name, weights)
        self.step, self.ahead = state["step"], state.get("ahead", 0)
        if weights_only:
            return
        self.skips.restore(state.get("skips", {}))
        for role, moments in state["optimizers"].items():
            self.place.load_moments(role, moments)
        self._restore_random(state["random"])

    def _take(self, name: str, weights: dict[str, Tensor]) -> None:
        network = getattr(self, name)
        network.load_state_dict(weights, assign=True)
        if name in self._parameters_of:
            self._parameters_of[name] = list(network.parameters())

    def _restore_random(self, random: dict[str, Any]) -> None:
        self.shared.set_state(random["shared"].cpu())
        cpu, rank = random["cpu"] if isinstance(random["cpu"], list) else [random["cpu"]], self.place.rank
        if len(cpu) != self.place.world:
            torch.manual_seed((torch.initial_seed() + 1_000_003 * self.step + rank) % 2**63)
            return
        torch.set_rng_state(cpu[rank].cpu())
        if "cuda" in random and self.device.type == "cuda":
            cuda = random["cuda"] if isinstance(random["cuda"], list) else [random["cuda"]]
            torch.cuda.set_rng_state(cuda[rank].cpu())

    # -- roles ---------------------------------------------------------------------------------------------------

    def _fill(self, role: str, roles: dict[str, Any]) -> nn.Module:
        given = roles.get(role)
        if isinstance(given, str):
            return copy_of(self._weights(role, roles, given))
        if given is not None:
            return given
        if role in self.frozen:
            raise BadInput(f"roles.{role} is missing; {type(self).__name__} needs one.")
        return self.start(role, roles)

    def _weights(self, role: str, roles: dict[str, Any], source: str) -> nn.Module:
        given = roles.get(source)
        if not isinstance(given, nn.Module):
            given = getattr(self, source, None)
        if given is None or next(given.parameters(), None) is None:
            raise BadInput(f"roles.{role} cannot start as a copy of '{source}', which has no weights; give it a network.")
        return given

    def _optim(self, role: str, given: dict[str, Any]) -> Optim:
        settings = given.get(role, {})
        return settings if isinstance(settings, Optim) else Optim(**settings)
