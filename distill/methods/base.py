"""Method: which networks exist, which train, how they start, and how the student samples."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from distill.denoise import Denoiser, network_of
from distill.errors import BadInput, suggest
from distill.losses.regression import mse
from distill.methods.module import Turn, TurnModule
from distill.models.copies import copy_network, to_float32
from distill.solvers import DDIM, RowNoise, solve
from distill.times import Grid


class Method(TurnModule):
    r"""A distillation method: a frozen teacher, a trainable student, and further networks such as critics and heads.

    A subclass names its roles and yields its turns. One training step is one pass of the turns:

        for role, loss in turns(step):  only `role` requires gradient;  loss(*shared).backward();  step that role

    `placement` holds the networks on their devices and steps the optimizers; the Trainer's strategy determines it.

    Args:
        roles: name -> Denoiser (or another module, for heads). A string names the role to copy; a trainable role that is
            absent starts as a copy of the teacher. Weights that train, and their averages, become float32.
        grid: the student's times: a number of steps K (uniform), a list 1 = t_K > ... > t_0 = 0, or a Grid.
        guidance: teacher's w in `uncond + w (cond - uncond)`; w = 1 is the conditional model.
        optim: role -> Optim.
        ema: decay of the averaged student that samples, validates and is exported; ramps up as (1 + n)/(10 + n).
        averages: further averaged copies, name -> (role, decay), such as a consistency target. Decay 0 copies at each
            step; None never, for copies that the method updates itself.
        warm_start: steps in which trainable denoisers first regress on the teacher's E[x | x_t]; for students whose
            network is not a copy of the teacher's.

    Raises:
        BadInput: a role that is unknown, missing, or has no weights to copy.

    Examples:
        >>> import torch
        >>> from distill.denoise import Denoiser
        >>> from distill.methods import Method
        >>> from distill.models import MLP
        >>> from distill.noise import RectifiedFlow
        >>> class Regression(Method):
        ...     def turns(self, step):
        ...         yield "student", self.loss
        ...
        ...     def loss(self, x, z, cond):
        ...         t = torch.rand(len(x))
        ...         x_t = self.student.schedule.add_noise(x, t, z)
        ...         return (self.student(x_t, t, **cond) - self.teacher(x_t, t, **cond)).square().mean()
        >>> teacher = Denoiser(MLP(dim=2, width=8), RectifiedFlow(), "flow")
        >>> method = Regression({"teacher": teacher}, grid=2)  # the student starts as a copy of the teacher
        >>> method.training_step({"x": torch.randn(4, 2)})
        >>> method.step, method.logs["student/loss"].item(), method.sample(torch.randn(3, 2), {}).shape
        (1, 0.0, torch.Size([3, 2]))
    """

    student: Denoiser
    teacher: Denoiser
    critic: Denoiser
    ema: Denoiser
    metric: Any
    trainable: tuple[str, ...] = ("student",)
    frozen: tuple[str, ...] = ("teacher",)
    sampler: Any = DDIM()  # the student's sampler
    serving: str = "ode"  # the kind of stock scheduler with the same sampler: "ode" (DDIM) or "renoise" (LCM)
    unsharded: str = ""  # why no network of this method may be cut to shards
    needs_data: bool = True  # False: needs conditions only, no samples
    jvp: str | None = None  # how derivatives along a direction are taken, of methods that need them
    judged: bool = False  # whether a discriminator head trains, and `logit` exists

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
        super().__init__(warm_start)
        self.metric = None  # a reward on samples, of methods that have one
        self.grid = Grid.of(grid)
        self.guidance = guidance
        for role in roles:
            if role not in self.trainable + self.frozen:
                raise BadInput(
                    f"roles.{role}: {type(self).__name__} has no such role.{suggest(role, self.trainable + self.frozen)} "
                    f"It has {', '.join(self.trainable + self.frozen)}."
                )
        for role in self.frozen + self.trainable:
            setattr(self, role, self._fill(role, roles))
        for role in self.trainable:
            to_float32(getattr(self, role))
        self._start_averages({"ema": ("student", ema)} | (averages or {}))
        self._take_optim(optim)

    # -- overridable ---------------------------------------------------------------------------------------------

    def start(self, role: str, roles: dict[str, Any]) -> nn.Module:
        """A trainable role that the config does not give: a copy of the teacher."""
        return copy_network(self._weights(role, roles, "teacher"))

    # -- sampling ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(
        self,
        z: Tensor,
        cond: dict[str, Tensor],
        generator: torch.Generator | RowNoise | None = None,
        grid: int | list | Grid | None = None,
    ) -> Tensor:
        """Few-step samples of the averaged student from noise z (B, ...): exactly K = grid.steps evaluations.

        `generator` draws what a stochastic sampler needs; `grid` replaces the grid it was trained for.
        """
        times = (self.grid if grid is None else Grid.of(grid)).times
        x_1, student_cond = self.student.schedule.start(z), self.student_conditions(cond, len(z))
        return solve(self.ema, x_1, times, self.sampler, generator=generator, **student_cond)

    def student_conditions(self, cond: dict[str, Any], n: int) -> dict[str, Any]:
        """The conditions of n samples as the student takes them: with `guidance` where its network has that input."""
        if not network_of(self.student).guided:
            return cond
        return cond | {"w": torch.full((n,), float(self.guidance), device=self.device)}

    def draw_guidance(
        self, x: Tensor, cond: dict[str, Any], interval: list[float] | None
    ) -> tuple[float | Tensor, dict[str, Any]]:
        """The teacher's w for samples x (B, ...), and the student's conditions: with w where its network has that input.

        w is uniform in `interval` per sample (B,); without one it is the number `guidance`, not a tensor, because
        `Guided` evaluates the teacher once for the number 1 and twice for a tensor.
        """
        w: float | Tensor = float(self.guidance)
        if interval is not None:
            low, high = interval
            w = low + (high - low) * torch.rand(len(x), device=x.device)
        if not network_of(self.student).guided:
            return w, cond
        return w, cond | {"w": torch.as_tensor(w, device=x.device).expand(len(x))}

    @torch.no_grad()
    def simulate(self, z: Tensor, cond: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The student's own input at one time of its grid, by backward simulation: x_{t_k} (B, ...) and t_k (B,).

        k ~ U{1..K}, the same on all ranks; from noise z the student samples down to t_k, so that it trains on the inputs
        of its own sampler. https://arxiv.org/abs/2405.14867, section 4.5.
        """
        k = int(self.grid.draw(1, generator=self.shared))
        times = self.grid.times[: self.grid.steps - k + 1]
        x_1 = self.student.schedule.start(z)
        x_t = solve(self.student, x_1, times, self.sampler, **cond) if len(times) > 1 else x_1
        dtype = torch.promote_types(z.dtype, torch.float32)
        return x_t, torch.full((len(z),), times[-1], dtype=dtype, device=z.device)

    def reward_of(self, x: Tensor, data: Tensor | None, cond: dict[str, Tensor]) -> Tensor:
        """The reward `metric` (B,) of samples x, one or several consecutive ones per condition; it gets the captions too."""
        captions = self.captions or ()
        captions_of = {"caption": [c for c in captions for _ in range(len(x) // len(captions))]} if captions else {}
        return self.metric(x, data=data, **cond, **captions_of)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one sample."""
        return tuple(network_of(self.student).shape)

    # -- warm start ---------------------------------------------------------------------------------------------

    def imitation(self) -> Iterator[Turn]:
        r"""Warm start: each trainable denoiser minimises |G(x_t) - D(x_t)|^2 at t ~ U(0, 1), D the teacher."""

        def loss(role, x, z, cond):
            t = torch.rand(len(z), device=z.device)
            x_t = self.teacher.schedule.add_noise(torch.zeros_like(z) if x is None else x, t, z)
            with torch.no_grad():
                target = self.teacher(x_t, t, **cond)
            return mse(getattr(self, role)(x_t, t, **cond), target)

        for role in self.trainable:
            if isinstance(getattr(self, role), Denoiser):
                yield role, lambda x, z, cond, role=role: loss(role, x, z, cond)

    def critic_time_condition(self, like: Tensor, t: Tensor | None = None) -> dict[str, Tensor]:
        """The second time input of a critic conditioned on the student's timestep: t, by default that of the last step."""
        if not network_of(self.critic).flow_map:
            return {}
        return {"s": torch.full_like(like, self.grid.times[-2]) if t is None else t}

    # -- roles ---------------------------------------------------------------------------------------------------

    def _fill(self, role: str, roles: dict[str, Any]) -> nn.Module:
        given = roles.get(role)
        if isinstance(given, str):
            return copy_network(self._weights(role, roles, given))
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
            raise BadInput(
                f"roles.{role} cannot start as a copy of '{source}', which has no weights; give it a network."
            )
        return given
