"""The sampling loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from distill.denoise import Denoiser
from distill.errors import BadInput
from distill.solvers.base import History, Solver
from distill.times import Grid


class RowNoise:
    """Noise by row number: a row gets the same numbers whatever batch, process or device it is in.

    Args:
        rows: numbers of the rows of a batch.
        seed: of all rows.
    """

    def __init__(self, rows: Sequence[int], seed: int = 0):
        self.generators = [Generator().manual_seed(seed + 1_000_003 * int(row)) for row in rows]

    def draw(self, x: Tensor) -> Tensor:
        """N(0, I) of the shape of x (B, ...), B the number of rows."""
        rows = [torch.randn(x.shape[1:], generator=generator, dtype=x.dtype) for generator in self.generators]
        return torch.stack(rows).to(x.device)


def solve(
    denoiser: Denoiser,
    z: Tensor,
    times: Sequence[float] | Grid,
    solver: Solver,
    *,
    generator: Generator | RowNoise | Callable[[Tensor], Tensor] | None = None,
    trajectory: bool = False,
    **cond: Any,
) -> Tensor:
    """Applies `solver` from times[0] through all times to times[-1]. Gradients are recorded if they are enabled.

    Args:
        denoiser: a Denoiser.
        z: the state (B, ...) at times[0]; at time 1, `denoiser.schedule.start(z)` of z ~ N(0, I).
        times: at least two decreasing numbers in [0, 1], or a Grid.
        solver: any Solver.
        generator: source of the noise of a stochastic solver, or a function that maps x_t to noise of its shape.
        trajectory: return the states at all times instead of the last one.
        cond: conditions, passed to the denoiser in every step.

    Returns:
        x (B, ...) at times[-1], or (len(times), B, ...) with `trajectory`; float32, or float64 if z is.

    Raises:
        BadInput: if there are fewer than two times, or they do not decrease within [0, 1].

    Examples:
        >>> from distill.denoise import Gaussian
        >>> from distill.noise import RectifiedFlow
        >>> from distill.solvers import DDIM
        >>> denoiser = Gaussian([1.0], 0.5, RectifiedFlow())
        >>> z = torch.randn(1000, 1, generator=torch.Generator().manual_seed(0))
        >>> x = solve(denoiser, denoiser.schedule.start(z), Grid.uniform(100), DDIM())
        >>> round(x.mean().item(), 1), round(x.std().item(), 1)
        (1.0, 0.5)
    """
    points = [float(t) for t in (times.times if isinstance(times, Grid) else times)]
    if len(points) < 2 or any(not 1 >= t > s >= 0 for t, s in zip(points, points[1:])):
        raise BadInput(f"times {points}: give two or more decreasing numbers within [0, 1].")
    dtype = torch.promote_types(z.dtype, torch.float32)
    x_t, states = z.to(dtype), [z.to(dtype)]
    history: History = []
    for start, end in zip(points, points[1:]):
        t, s = (torch.full((len(z),), time, dtype=dtype, device=z.device) for time in (start, end))
        noise = _noise(x_t, generator) if solver.stochastic else None
        x_t = solver(denoiser, x_t, t, s, history=history, noise=noise, **cond)
        if trajectory:
            states.append(x_t)
    return torch.stack(states) if trajectory else x_t


def _noise(x: Tensor, generator: Generator | RowNoise | Callable[[Tensor], Tensor] | None) -> Tensor:
    if isinstance(generator, RowNoise):
        return generator.draw(x)
    if callable(generator):
        return generator(x)
    device = generator.device if generator is not None else x.device
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)
