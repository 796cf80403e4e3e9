r"""Diagnostics of critic and discriminator at validation: critic lag, critic excess, head accuracy.

critic_lag     [E_F(x) / E_D(x)] / [E_F(x') / E_D(x')] with E_F(x) = mean|F(x_u) - x|^2, x samples of the trained
               student, x' of its average, D the teacher: 1 if the critic fits both equally well, above 1 if it lags
critic_excess  E_F(x) / E_D(x): at most 1 if the critic has learned the student's distribution
head_accuracy  share of correct decisions on equally many data and student samples; 1/2 at the optimum
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from distill.denoise import Denoiser
from distill.metrics.collapse import subset
from distill.metrics.shared_draw import SharedDraw
from distill.metrics.shares import ALONE, SampleShares
from distill.solvers import RowNoise, solve

MOST = 256  # samples of a probe


@torch.no_grad()
def probes(
    method: Any,
    z: Tensor,
    x: Tensor,
    cond: Mapping[str, Tensor],
    real: Any,
    seed: int = 0,
    *,
    batch: int = MOST,
    ranks: SampleShares = ALONE,
    precision: str = "32",
) -> dict[str, float]:
    """The diagnostics that apply to the method, from noises z, its samples x and conditions, on all ranks.

    Args:
        z, x, cond: of all ranks, the same on each; the work is shared.
        real: has samples `x` and possibly `label`, for the head.
        seed: of the random numbers; the generators of training are not changed.
        batch, ranks, precision: see `distill.metrics.shared_draw.SharedDraw`.
    """
    device, found = next(method.student.parameters()).device, {}
    z, x, cond = subset(z, MOST), subset(x, MOST), {k: subset(v, MOST) for k, v in cond.items()}

    def each(values: Callable[..., Tensor], z: Tensor, **columns: Tensor) -> Tensor:
        draw = SharedDraw(z, columns, batch, ranks, precision)
        return ranks.gather_to_all(draw(values, method.student))

    trained = method.role("teacher") is not None and isinstance(method.role("critic"), Denoiser)
    with _aside(method, device, seed):
        if trained and "critic" in method.trainable:
            live = each(lambda z, cond, noise: _live(method, z, cond, noise), z, **cond)
            fresh, held_out = _excess(method, live, cond, each), _excess(method, x, cond, each)
            found |= {"critic_lag": fresh / max(held_out, 1e-12), "critic_excess": fresh}
        if method.judged and getattr(real, "x", None) is not None and real.x.shape[1:] == x.shape[1:]:
            found["head_accuracy"] = _accuracy(method, x, cond, real, each)
    return found


def _live(method: Any, z: Tensor, cond: dict[str, Tensor], noise: RowNoise) -> Tensor:
    """Samples of the student itself, not of its average."""
    x_1, conditions = method.student.schedule.start(z), method.student_conditions(cond, len(z))
    return solve(method.student, x_1, method.grid.times, method.sampler, generator=noise, **conditions)


def _excess(method: Any, x: Tensor, cond: Mapping[str, Tensor], each: Callable[..., Tensor]) -> float:
    """The critic's error on noised x over the teacher's, with the same noise at each call."""
    generator, schedule = torch.Generator().manual_seed(0), method.critic.schedule
    u = torch.linspace(0.05, 0.95, len(x))[torch.randperm(len(x), generator=generator)]
    noise = torch.randn(x.shape, generator=generator).to(x)

    def errors(x: Tensor, columns: dict[str, Tensor], _: RowNoise) -> Tensor:
        u, noise, cond = _split(columns, "u", "noise")
        x_u = schedule.add_noise(x, u, noise)
        found = method.critic(x_u, u, **cond, **method.critic_time_condition(u)), method.teacher(x_u, u, **cond)
        return torch.stack([(estimate - x).square().flatten(1).mean(1) for estimate in found], 1)

    critic, teacher = each(errors, x, u=u, noise=noise, **cond).mean(0)
    return float(critic / teacher.clamp_min(1e-12))


def _accuracy(method: Any, x: Tensor, cond: Mapping[str, Tensor], real: Any, each: Callable[..., Tensor]) -> float:
    count, n, schedule = len(x), min(len(x), len(real.x)), method.teacher.schedule
    y, x = subset(real.x, count)[:n].to(x), x[:n]
    u = method.density(n, device=x.device, dtype=x.dtype)
    label, cond, right = getattr(real, "label", None), {k: v[:n] for k, v in cond.items()}, []
    labels = cond if label is None else {"label": subset(label, count)[:n]}
    for samples, given, sign in ((y, labels, 1), (x, cond, -1)):

        def guessed(x: Tensor, columns: dict[str, Tensor], _: RowNoise, sign: int = sign) -> Tensor:
            u, noise, cond = _split(columns, "u", "noise")
            logit = method.logit(schedule.add_noise(x, u, noise), u, cond)
            return (sign * logit.reshape(len(x), -1).mean(1) > 0).double()

        right.append(each(guessed, samples, u=u, noise=torch.randn_like(samples), **given).mean())
    return float(torch.stack(right).mean())


def _split(columns: dict[str, Tensor], *names: str) -> tuple[Any, ...]:
    """The columns of these names, and the others as a dictionary."""
    return *(columns[name] for name in names), {k: v for k, v in columns.items() if k not in names}


@contextmanager
def _aside(method: Any, device: torch.device, seed: int) -> Iterator[None]:
    """Eval mode and separate random numbers within the context; restores modes and generators."""
    modes = {m: m.training for m in method.modules()}
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(seed)
            method.eval()
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
