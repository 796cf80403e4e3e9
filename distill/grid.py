"""Where in time: densities p(t) to train on, laws of pairs of times, and the student's grid of times."""

from __future__ import annotations

import math
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


class Pairs:
    """A law of pairs of times t > r >= `floor` for training without a teacher.

    `pairs(n, schedule, progress)` draws (t, r), each (n,), at `progress` in [0, 1) of the run. `floor` is the smallest
    time, at which a student is the identity.
    """

    floor: float = 0.0

    def __call__(self, n: int, schedule, progress: float, device=None, dtype=torch.float32) -> tuple[Tensor, Tensor]:
        raise NotImplementedError


@dataclass(frozen=True)
class Doubling(Pairs):
    """Neighbours of the grid t_j = floor + (1 - floor) j / N; N doubles at equal spans of the run, from first to last.

    log(sigma_t / alpha_t) ~ N(mean, std^2) discretised on the grid, or j uniform where mean is None.
    Song and Dhariwal 2023, https://arxiv.org/abs/2310.14189, sections 3.4 and 3.5.
    """

    first: int = 10
    last: int = 160
    mean: float | None = -1.1
    std: float = 2.0
    floor: float = 0.0

    def __post_init__(self):
        if not 1 <= self.first <= self.last:
            raise BadInput(f"intervals from first={self.first} to last={self.last} must grow from 1 or more.")

    def intervals(self, progress: float) -> int:
        """N at `progress`."""
        spans = math.ceil(math.log2(self.last / self.first)) + 1
        return min(self.first * 2 ** int(progress * spans), self.last)

    def __call__(self, n, schedule, progress, device=None, dtype=torch.float32):
        times = torch.linspace(self.floor, 1, self.intervals(progress) + 1, dtype=dtype, device=device)
        if self.mean is None:
            j = torch.randint(1, len(times), (n,), device=device)
        else:
            edges = torch.special.ndtr((-schedule.log_snr(times) / 2 - self.mean) / self.std)
            j = 1 + torch.multinomial(edges.diff().clamp_min(1e-12), n, replacement=True)
        return times[j], times[j - 1]


@dataclass(frozen=True)
class Shrinking(Pairs):
    """log y_t ~ N(mean, std^2) for y = sigma / alpha, and y_r = y_t (1 - q^-(stage + 1) (1 + k sigmoid(-b y_t))), or 0.

    The `stages` are equal spans of the run. In the first most r are 0, which is the diffusion objective.
    Geng et al. 2024, https://arxiv.org/abs/2406.14548, section 3.3.
    """

    stages: int = 8
    q: float = 2.0
    k: float = 8.0
    b: float = 1.0
    mean: float = -1.1
    std: float = 2.0
    cap: float = 0.999  # the largest y_r / y_t

    def __post_init__(self):
        if self.q <= 1:
            raise BadInput(f"q={self.q} must be above 1, so that the gap shrinks from stage to stage.")

    def __call__(self, n, schedule, progress, device=None, dtype=torch.float32):
        t = LogNormalSigma(schedule, self.mean, self.std)(n, device=device, dtype=dtype)
        log = -schedule.log_snr(t) / 2
        gap = self.q ** -(int(progress * self.stages) + 1.0) * (1 + self.k * torch.sigmoid(-self.b * log.exp()))
        r = schedule.time(-2 * (log + (1 - gap).clamp(0, self.cap).log()))
        return t, torch.where(gap >= 1, 0.0, r)


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


def ladder(start: int, grid: Grid) -> tuple[int, ...]:
    """Numbers of steps from start/2 by halves down to that of a uniform grid, as progressive distillation takes them.

    Raises:
        BadInput: if the grid is not uniform, or `start` is not its steps times 2, 4, 8, ...
    """
    if grid != Grid.uniform(grid.steps):
        raise BadInput(f"grid {_show(grid.times)} is not uniform, and only uniform grids can be halved: give a number.")
    rungs = (start // grid.steps).bit_length() - 1
    if rungs < 1 or grid.steps * 2**rungs != start:
        raise BadInput(f"teacher_steps {start} does not halve to {grid.steps}: take {grid.steps} times 2, 4, 8, ...")
    return tuple(grid.steps * 2**r for r in reversed(range(rungs)))


def _show(times: tuple[float, ...]) -> str:
    text = [f"{t:g}" for t in times]
    return f"[{', '.join(text if len(text) <= 8 else text[:3] + ['...'] + text[-3:])}]"
