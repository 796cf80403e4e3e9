"""Baselines without training: the teacher under the ODE solvers of distill and several time grids, at counted cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Generator, Tensor, nn

from distill.errors import BadInput, suggest
from distill.noise import Schedule, Table
from distill.solvers import DDIM, Solver, solve, solver
from distill.times import Grid

TRAINING_FREE = ("ddim", "heun", "dpmpp_2s", "dpmpp_2m")

# --- time grids ----------------------------------------------------------------------------------------------


def uniform(schedule: Schedule, steps: int) -> Grid:
    """Equal steps in t."""
    return Grid.uniform(steps)


def karras(schedule: Schedule, steps: int, rho: float = 7.0) -> Grid:
    r"""(sigma/alpha)^{1/rho} falls linearly from 80 to 0.002 over K times, then 0; mapped to t through the log-SNR.

    The first time is 1. Source: Karras et al. 2022, https://arxiv.org/abs/2206.00364, equation 5.
    """
    low, high = (ratio ** (1 / rho) for ratio in _ratios(schedule, 0.002, 80.0))
    return _grid(schedule, -2 * rho * torch.linspace(high, low, steps, dtype=torch.float64).log())


def logsnr(schedule: Schedule, steps: int) -> Grid:
    """log(sigma/alpha) falls linearly from 4 to -4 over K times, then 0, as in https://arxiv.org/abs/2206.00927."""
    low, high = (math.log(ratio) for ratio in _ratios(schedule, math.exp(-4), math.exp(4)))
    return _grid(schedule, -2 * torch.linspace(high, low, steps, dtype=torch.float64))


GRIDS: dict[str, Callable[[Schedule, int], Grid]] = {"uniform": uniform, "karras": karras, "logsnr": logsnr}


def _ratios(schedule: Schedule, low: float, high: float) -> tuple[float, float]:
    """The range of sigma/alpha, clipped to that of the schedule; a Table starts at node 0, below which nothing is trained."""
    first = 1 / len(schedule.alphas_cumprod) if isinstance(schedule, Table) else 0.0
    bottom, top = torch.exp(-schedule.log_snr(torch.tensor([first, 1.0], dtype=torch.float64)) / 2).tolist()
    return max(low, bottom), min(high, top)


def _grid(schedule: Schedule, log_snr: Tensor) -> Grid:
    return Grid((1.0, *schedule.time(log_snr)[1:].tolist(), 0.0))


# --- cost ---------------------------------------------------------------------------------------------------


class Counted(nn.Module):
    """A denoiser that counts network evaluations per sample in `.evaluations`; set it to 0 to start again.

    Rows of the calls of the innermost denoiser are divided by the rows of the outer call: a guided call, which evaluates
    the network with and without the condition, counts 2, batched or not, and 1 if w = 1. Papers often count such a call
    as one step.
    """

    def __init__(self, denoiser: nn.Module):
        super().__init__()
        self.denoiser, self.schedule, self.evaluations = denoiser, denoiser.schedule, 0.0

    def null(self, cond: dict) -> dict:
        return self.denoiser.null(cond)

    def forward(self, x_t: Tensor, t: Tensor, **cond) -> Tensor:
        def count(module, args):
            self.evaluations += len(args[0]) / len(x_t)

        inner = self.denoiser
        while isinstance(getattr(inner, "denoiser", None), nn.Module):
            inner = inner.denoiser
        hook = inner.register_forward_pre_hook(count)
        try:
            return self.denoiser(x_t, t, **cond)
        finally:
            hook.remove()


@torch.no_grad()
def baseline(
    denoiser: nn.Module,
    z: Tensor,
    cond: Mapping[str, Any] | None = None,
    evaluations: Sequence[int] = (1, 2, 4, 8, 50),
    solvers: Sequence[str] = TRAINING_FREE,
    grids: Sequence[str] = tuple(GRIDS),
    generator: Generator | None = None,
    batch: int | None = None,
) -> dict[int, dict[str, Tensor]]:
    """Samples of the teacher at equal cost: `{nfe: {"solver/grid": x}}`, all from z (B, ...) ~ sigma_1 N(0, I).

    nfe counts network evaluations per sample, as `Counted`; a guided teacher makes nfe // 2 calls and has no entry at
    nfe 1. A solver with e > 1 calls per step takes (calls - 1) // e steps; the remaining calls are DDIM steps: the last
    step, where the solver equals DDIM anyway, and the first ones if more remain. A solver without any step of its own is
    left out. Grids that coincide (all do at one step) are sampled once. `batch` is the maximum number of rows per call;
    rows are moved to the denoiser's device, and samples back to that of z.

    Raises:
        BadInput: for an unknown solver or grid, nfe below 1, or a condition without one row per sample.
    """
    cond = dict(cond or {})
    _check(z, cond, evaluations, grids)
    call = price(denoiser, z, cond)
    out: dict[int, dict[str, Tensor]] = {}
    for nfe in evaluations:
        out[nfe], done = {}, set()
        for name in solvers:
            legs = plan(solver(name), int(nfe // call))
            for spacing in grids if legs else ():
                times = GRIDS[spacing](denoiser.schedule, len(legs)).times
                if (name, times) not in done:
                    done.add((name, times))
                    parts = [
                        _sample(denoiser, *rows, legs, times, generator) for rows in _rows(denoiser, z, cond, batch)
                    ]
                    out[nfe][f"{name}/{spacing}"] = torch.cat(parts).to(z.device)
    return out


def plan(method: Solver, calls: int) -> list[Solver]:
    """The solver of each step, with exactly `calls` denoiser calls in total; empty if `method` would have no step."""
    if method.evaluations == 1:
        return [method] * calls
    steps = (calls - 1) // method.evaluations
    spare = calls - 1 - steps * method.evaluations
    return [DDIM()] * spare + [method] * steps + [DDIM()] if steps > 0 else []


@torch.no_grad()
def price(denoiser: nn.Module, z: Tensor, cond: Mapping[str, Any]) -> float:
    """Network evaluations of one call under this condition, measured on the first sample: 1, or 2 with guidance."""
    counted = Counted(denoiser)
    z, cond = next(_rows(denoiser, z, cond, 1))
    counted(z, torch.ones(1, device=z.device), **cond)
    return counted.evaluations


def _sample(denoiser, z: Tensor, cond: dict, legs: list[Solver], times: Sequence[float], generator) -> Tensor:
    """Samples through all times; consecutive steps of one solver share one `solve`, so multistep solvers keep history."""
    start, z = 0, denoiser.schedule.start(z)
    for end in range(1, len(legs) + 1):
        if end == len(legs) or legs[end] is not legs[start]:
            z = solve(denoiser, z, times[start : end + 1], legs[start], generator=generator, **cond)
            start = end
    return z


def _rows(denoiser, z: Tensor, cond: Mapping[str, Any], batch: int | None) -> Iterator[tuple[Tensor, dict]]:
    """z and cond in batches on the denoiser's device."""
    device = next(chain(denoiser.parameters(), denoiser.buffers(), (z,))).device
    size = batch or len(z)
    for i in range(0, len(z), size):
        part = {k: v[i : i + size].to(device) if isinstance(v, Tensor) else v for k, v in cond.items()}
        yield z[i : i + size].to(device), part


def _check(z: Tensor, cond: Mapping[str, Any], evaluations: Sequence[int], grids: Sequence[str]) -> None:
    for spacing in grids:
        if spacing not in GRIDS:
            raise BadInput(f"time grid '{spacing}' is none of {', '.join(GRIDS)}.{suggest(spacing, GRIDS)}")
    for nfe in evaluations:
        if nfe < 1:
            raise BadInput(f"evaluations holds {nfe}; a sample costs at least 1.")
    for key, value in cond.items():
        if isinstance(value, Tensor) and (value.ndim == 0 or len(value) != len(z)):
            raise BadInput(f"condition '{key}' is {tuple(value.shape)} for {len(z)} samples; give one row per sample.")
    if len(z) == 0:
        raise BadInput("z is empty; draw at least one noise.")
