"""The one sampling loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Generator, Tensor

from distill.errors import BadInput
from distill.solvers.base import Solver


def solve(
    denoiser,
    z: Tensor,
    times: Sequence[float],
    solver: Solver,
    *,
    generator: Generator | None = None,
    trajectory: bool = False,
    **cond,
) -> Tensor:
    """From z = x at times[0] through all times to x at times[-1]; gradients flow, unless the caller turns them off.

    Args:
        denoiser: a Denoiser.
        z: (B, ...), the state at times[0]; sigma_1 N(0, I) when that is 1.
        times: at least two decreasing numbers in [0, 1], or a Grid.
        solver: any Solver.
        generator: for a stochastic solver's noise.
        trajectory: return all states (len(times), B, ...) and not only the last.
        cond: passed to the denoiser at every step.

    Raises:
        BadInput: if the times do not decrease or leave [0, 1].
    """
    times = [float(t) for t in getattr(times, "times", times)]
    if len(times) < 2 or any(not 1 >= t > s >= 0 for t, s in zip(times, times[1:])):
        raise BadInput(f"times {times} must be two or more, decreasing, within [0, 1].")
    dtype = torch.promote_types(z.dtype, torch.float32)
    x_t, states, history = z.to(dtype), [z.to(dtype)], []
    for t, s in zip(times, times[1:]):
        t, s = (torch.full((len(z),), a, dtype=dtype, device=z.device) for a in (t, s))
        noise = _noise(x_t, generator) if solver.stochastic else None
        x_t = solver(denoiser, x_t, t, s, history=history, noise=noise, **cond)
        if trajectory:
            states.append(x_t)
    return torch.stack(states) if trajectory else x_t


def _noise(x: Tensor, generator: Generator | None) -> Tensor:
    home = generator.device if generator is not None else x.device
    return torch.randn(x.shape, generator=generator, dtype=x.dtype, device=home).to(x.device)
