"""Times: densities p(t) of training times, distributions of pairs of times, and the student's time grid.

Examples:
    >>> import torch
    >>> from distill.times import Grid
    >>> Grid.uniform(2).segment(torch.tensor([2, 1]))
    (tensor([1.0000, 0.5000]), tensor([0.5000, 0.0000]))
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from distill.errors import BadInput

Device = torch.device | str | None


class LogSNR(Protocol):
    """The part of `noise.Schedule` that is used here: log-SNR and its inverse."""

    def log_snr(self, t: Tensor) -> Tensor: ...

    def time(self, log_snr: Tensor) -> Tensor: ...


class Density:
    """Base class of the densities of training times. `density(n)` draws t (n,), strictly between 0 and 1."""

    def __call__(
        self,
        n: int,
        generator: Generator | None = None,
        device: Device = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """n times (n,) on `device`, drawn on the generator's device."""
        draw_device = generator.device if generator is not None else device
        t = self.draw(n, generator=generator, device=draw_device, dtype=dtype or torch.float32).to(device=device)
        eps = torch.finfo(t.dtype).eps
        return t.clamp(eps, 1 - eps)

    def draw(self, n: int, **kw: Any) -> Tensor:
        """n times (n,); `kw` are the arguments of `torch.rand`: generator, device, dtype."""
        raise NotImplementedError


@dataclass(frozen=True)
class Uniform(Density):
    """t ~ U(lo, hi), 0 <= lo < hi <= 1."""

    lo: float = 0.0
    hi: float = 1.0

    def draw(self, n: int, **kw: Any) -> Tensor:
        return self.lo + (self.hi - self.lo) * torch.rand(n, **kw)


class Mixture(Density):
    """Each t from one of several densities, chosen with equal probability.

    Args:
        densities: at least one Density.

    Raises:
        BadInput: if there is none.
    """

    def __init__(self, densities: list[Density]):
        if not densities:
            raise BadInput("Mixture: give at least one density.")
        self.densities = tuple(densities)

    def draw(self, n: int, **kw: Any) -> Tensor:
        draws = torch.stack([density.draw(n, **kw) for density in self.densities])
        choice = (len(draws) * torch.rand(n, **kw)).long().clamp_max(len(draws) - 1)
        return draws.gather(0, choice[None])[0]


@dataclass(frozen=True)
class LogitNormal(Density):
    """logit(t) ~ N(mean, std^2), Esser et al. 2024, https://arxiv.org/abs/2403.03206."""

    mean: float = 0.0
    std: float = 1.0

    def draw(self, n: int, **kw: Any) -> Tensor:
        return torch.sigmoid(self.mean + self.std * torch.randn(n, **kw))


@dataclass(frozen=True)
class LogNormalSigma(Density):
    """log(sigma_t / alpha_t) ~ N(mean, std^2), Karras et al. 2022, https://arxiv.org/abs/2206.00364."""

    schedule: LogSNR
    mean: float = -1.2
    std: float = 1.2

    def draw(self, n: int, **kw: Any) -> Tensor:
        return self.schedule.time(-2 * (self.mean + self.std * torch.randn(n, **kw)))


class TimePairs:
    """Base class of the distributions of time pairs t > r >= `floor` for consistency training without a teacher.

    Attributes:
        floor: the smallest time; at it the student is the identity.
    """

    floor: float = 0.0

    def __call__(
        self,
        n: int,
        schedule: LogSNR,
        progress: float,
        device: Device = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        """(t, r), each (n,), at `progress` in [0, 1): the fraction of the training steps already done."""
        raise NotImplementedError


@dataclass(frozen=True)
class Doubling(TimePairs):
    """Neighbouring times of the grid t_j = floor + (1 - floor) j / N, with N doubled in equal spans of the training.

    j is drawn such that log(sigma_t / alpha_t) ~ N(mean, std^2), discretised on the grid.
    Song and Dhariwal 2023, https://arxiv.org/abs/2310.14189, sections 3.4 and 3.5.

    Args:
        first, last: N at the start and at the end of training.
        mean, std: of log(sigma_t / alpha_t); `mean=None` draws j uniformly.
        floor: the smallest time.

    Raises:
        BadInput: unless 1 <= first <= last.
    """

    first: int = 10
    last: int = 160
    mean: float | None = -1.1
    std: float = 2.0
    floor: float = 0.0

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.last:
            raise BadInput(
                f"Doubling: first must be 1 or more and at most last, got first={self.first} to last={self.last}."
            )

    def intervals(self, progress: float) -> int:
        """N at `progress`."""
        spans = math.ceil(math.log2(self.last / self.first)) + 1
        return min(self.first * 2 ** int(progress * spans), self.last)

    def __call__(
        self,
        n: int,
        schedule: LogSNR,
        progress: float,
        device: Device = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        times = torch.linspace(self.floor, 1, self.intervals(progress) + 1, dtype=dtype, device=device)
        if self.mean is None:
            j = torch.randint(1, len(times), (n,), device=device)
        else:
            edges = torch.special.ndtr((-schedule.log_snr(times) / 2 - self.mean) / self.std)
            j = 1 + torch.multinomial(edges.diff().clamp_min(1e-12), n, replacement=True)
        return times[j], times[j - 1]


@dataclass(frozen=True)
class Shrinking(TimePairs):
    """Pairs whose gap shrinks in stages, in y = sigma / alpha: log y_t ~ N(mean, std^2) and

    y_r = y_t (1 - q^-(stage + 1) (1 + k sigmoid(-b y_t))), or r = 0 where that is not positive.

    In the first stage most r are 0, which is the diffusion objective.
    Geng et al. 2024, https://arxiv.org/abs/2406.14548, section 3.3.

    Args:
        stages: number of stages, equal spans of the training.
        q, k, b: of the equation; q > 1.
        mean, std: of log y_t.
        cap: the largest y_r / y_t.

    Raises:
        BadInput: if q <= 1.
    """

    stages: int = 8
    q: float = 2.0
    k: float = 8.0
    b: float = 1.0
    mean: float = -1.1
    std: float = 2.0
    cap: float = 0.999

    def __post_init__(self) -> None:
        if self.q <= 1:
            raise BadInput(f"Shrinking needs q > 1 (the gap shrinks by 1/q in each stage), got q={self.q}.")

    def __call__(
        self,
        n: int,
        schedule: LogSNR,
        progress: float,
        device: Device = None,
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        t = LogNormalSigma(schedule, self.mean, self.std)(n, device=device, dtype=dtype)
        log_y = -schedule.log_snr(t) / 2
        gap = self.q ** -(int(progress * self.stages) + 1.0) * (1 + self.k * torch.sigmoid(-self.b * log_y.exp()))
        r = schedule.time(-2 * (log_y + (1 - gap).clamp(0, self.cap).log()))
        return t, torch.where(gap >= 1, 0.0, r)


@dataclass(frozen=True)
class Grid:
    """The student's times 1 = t_K > ... > t_1 > t_0 = 0. Segment k in 1..K is the step from t_k to t_{k-1}.

    Args:
        times: K + 1 times, strictly decreasing from 1 to 0.

    Raises:
        BadInput: if the times do not start at 1 (noise), do not end at 0 (data), or do not decrease strictly.

    Examples:
        >>> import torch
        >>> from distill.times import Grid
        >>> grid = Grid.uniform(4)
        >>> grid.times
        (1.0, 0.75, 0.5, 0.25, 0.0)
        >>> grid.segment(torch.tensor([4, 1]))
        (tensor([1.0000, 0.2500]), tensor([0.7500, 0.0000]))
        >>> Grid.of([1, 0.6, 0]).steps
        2
    """

    times: tuple[float, ...]

    def __post_init__(self) -> None:
        times = tuple(float(t) for t in self.times)
        if len(times) < 2:
            raise BadInput(f"grid {list(times)} has no step: give at least [1, 0], or a number of steps.")
        if any(not t > s for t, s in zip(times, times[1:])):
            raise BadInput(
                f"grid {_show(times)} must decrease strictly from 1 to 0: sort it and remove repeated times."
            )
        if times[0] != 1:
            raise BadInput(f"grid starts at {times[0]:g} but the student starts from noise: make the first time 1.")
        if times[-1] != 0:
            raise BadInput(f"grid ends at {times[-1]:g} but the student must reach data: append 0 as the last time.")
        object.__setattr__(self, "times", times)

    @classmethod
    def uniform(cls, steps: int) -> Grid:
        """1, (K-1)/K, ..., 0 for K = `steps`: on a Table, the "trailing" timestep spacing of diffusers."""
        if steps < 1:
            raise BadInput(f"grid of {steps} steps: the number of steps must be 1 or more.")
        return cls(tuple(k / steps for k in range(steps, -1, -1)))

    @classmethod
    def of(cls, value: int | Iterable[float] | Grid) -> Grid:
        """A Grid from a number of steps (uniform), from a list of times, or a Grid unchanged."""
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

    def tensor(self, device: Device = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """The K + 1 times (K+1,), decreasing."""
        return torch.tensor(self.times, device=device, dtype=dtype)

    def segment(self, k: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """(t_k, t_{k-1}), each (B,), for k (B,) in 1..K. Raises IndexError for k outside 1..K."""
        times = self.tensor(k.device, dtype)
        return times.index_select(0, self.steps - k), times.index_select(0, self.steps - k + 1)

    def draw(self, n: int, generator: Generator | None = None, device: Device = None) -> Tensor:
        """n segments k (n,), uniform in 1..K."""
        draw_device = generator.device if generator is not None else device
        return torch.randint(1, self.steps + 1, (n,), generator=generator, device=draw_device).to(device=device)


def halving_steps(start: int, grid: Grid) -> tuple[int, ...]:
    """Numbers of steps of progressive distillation: start / 2, start / 4, ..., K for a uniform grid of K steps.

    Raises:
        BadInput: if the grid is not uniform, or `start` is not K times 2, 4, 8, ...
    """
    if grid != Grid.uniform(grid.steps):
        raise BadInput(
            f"grid {_show(grid.times)} is not uniform, and only uniform grids can be halved: give a number of steps."
        )
    halvings = (start // grid.steps).bit_length() - 1
    if halvings < 1 or grid.steps * 2**halvings != start:
        raise BadInput(f"teacher_steps {start} does not halve to {grid.steps}: give {grid.steps} times 2, 4, 8, ...")
    return tuple(grid.steps * 2**i for i in reversed(range(halvings)))


def _show(times: tuple[float, ...]) -> str:
    """The times as text; of more than 8, the first and last three."""
    numbers = [f"{t:g}" for t in times]
    if len(numbers) > 8:
        numbers = [*numbers[:3], "...", *numbers[-3:]]
    return f"[{', '.join(numbers)}]"
