"""Where in time: densities p(t) to train on, and the student's grid of times."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from distill.errors import BadInput


class Density:
    """A density of times. `density(n)` draws t (n,), strictly between 0 and 1."""

    def __call__(
        self,
        n: int,
        generator: Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        home = generator.device if generator is not None else device
        t = self.draw(n, generator=generator, device=home, dtype=dtype or torch.float32).to(device=device)
        edge = torch.finfo(t.dtype).eps
        return t.clamp(edge, 1 - edge)

    def draw(self, n: int, **kw) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True)
class Uniform(Density):
    """t ~ U(lo, hi)."""

    lo: float = 0.0
    hi: float = 1.0

    def draw(self, n, **kw):
        return self.lo + (self.hi - self.lo) * torch.rand(n, **kw)


@dataclass(frozen=True)
class LogitNormal(Density):
    """logit(t) ~ N(mean, std^2), Esser et al. 2024, https://arxiv.org/abs/2403.03206."""

    mean: float = 0.0
    std: float = 1.0

    def draw(self, n, **kw):
        return torch.sigmoid(self.mean + self.std * torch.randn(n, **kw))


@dataclass(frozen=True)
class LogNormalSigma(Density):
    """log(sigma_t / alpha_t) ~ N(mean, std^2), Karras et al. 2022, https://arxiv.org/abs/2206.00364."""

    schedule: Any  # a noise.Schedule
    mean: float = -1.2
    std: float = 1.2

    def draw(self, n, **kw):
        return self.schedule.time(-2 * (self.mean + self.std * torch.randn(n, **kw)))


@dataclass(frozen=True)
class Grid:
    """The student's times 1 = t_K > ... > t_1 > t_0 = 0. Segment k in 1..K runs from t_k down to t_{k-1}.

    Raises:
        BadInput: if the times do not start at noise (1), do not end at data (0), or do not decrease strictly.
    """

    times: tuple[float, ...]

    def __post_init__(self):
        times = tuple(float(t) for t in self.times)
        if len(times) < 2:
            raise BadInput(f"grid {list(times)} has no step: give at least [1, 0], or a number of steps.")
        if any(not t > s for t, s in zip(times, times[1:])):
            raise BadInput(f"grid {_show(times)} must decrease strictly from 1 to 0: sort it and drop repeats.")
        if times[0] != 1:
            raise BadInput(f"grid starts at {times[0]:g} but the student starts from noise: make the first time 1.")
        if times[-1] != 0:
            raise BadInput(f"grid ends at {times[-1]:g} but the student must reach data: append 0 as the last time.")
        object.__setattr__(self, "times", times)

    @classmethod
    def uniform(cls, steps: int) -> Grid:
        """1, (K-1)/K, ..., 0 for K = `steps`: on a Table, the "trailing" spacing of DDIM."""
        if steps < 1:
            raise BadInput(f"grid of {steps} steps: give 1 or more.")
        return cls(tuple(k / steps for k in range(steps, -1, -1)))

    @classmethod
    def of(cls, value: int | Iterable[float] | Grid) -> Grid:
        """A Grid as it is, a number of steps as a uniform grid, a list of times as a grid."""
        if isinstance(value, Grid):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return cls.uniform(value)
        if isinstance(value, Iterable) and not isinstance(value, str):
            return cls(tuple(value))
        raise BadInput(f"grid {value!r}: give a number of steps or a list of times such as [1, 0.5, 0].")

    @property
    def steps(self) -> int:
        """K, the number of student evaluations."""
        return len(self.times) - 1

    def tensor(self, device=None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The K + 1 times (K+1,), decreasing."""
        return torch.tensor(self.times, device=device, dtype=dtype)

    def segment(self, k: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """(t_k, t_{k-1}), each (B,), for k (B,) in 1..K; k outside raises IndexError."""
        times = self.tensor(k.device, dtype)
        return times.index_select(0, self.steps - k), times.index_select(0, self.steps - k + 1)

    def draw(self, n: int, generator: Generator | None = None, device=None) -> Tensor:
        """n segments k (n,), uniform in 1..K."""
        home = generator.device if generator is not None else device
        return torch.randint(1, self.steps + 1, (n,), generator=generator, device=home).to(device=device)


def _show(times: tuple[float, ...]) -> str:
    text = [f"{t:g}" for t in times]
    return f"[{', '.join(text if len(text) <= 8 else text[:3] + ['...'] + text[-3:])}]"
