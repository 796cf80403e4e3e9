r"""Diagnostics of critic and discriminator at validation: critic lag, critic excess, head accuracy.

critic_lag     [E_F(x) / E_D(x)] / [E_F(x') / E_D(x')] with E_F(x) = mean|F(x_u) - x|^2, x samples of the trained
               student, x' of its average, D the teacher: 1 if the critic fits both equally well, above 1 if it lags
critic_excess  E_F(x) / E_D(x): at most 1 if the critic has learned the student's distribution
head_accuracy  share of correct decisions on equally many data and student samples; 1/2 at the optimum
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from distill.denoise import Denoiser
from distill.metrics.collapse import subset
from distill.solvers import solve

MOST = 256  # samples a probe takes


@torch.no_grad()
def probes(method: Any, z: Tensor, x: Tensor, cond: Mapping[str, Tensor], real: Any, seed: int = 0) -> dict[str, float]:
    """The diagnostics that apply to the method, from noises z, its samples x and conditions; all ranks call it if sharded.

    Args:
        real: has samples `x` and possibly `label`, for the head.
        seed: of the random numbers; the generators of training are not changed.
    """
    device, found = next(method.student.parameters()).device, {}
    z, x, cond = (_on(device, v) for v in (z, x, cond))
    trained = method.role("teacher") is not None and isinstance(method.role("critic"), Denoiser)
    judged = method.judged
    with _aside(method, device, seed):
        if trained and "critic" in method.trainable:
            conditions = method.student_conditions(cond, len(z))
            live = solve(
                method.student, method.student.schedule.start(z), method.grid.times, method.sampler, **conditions
            )
            fresh, held_out = _excess(method, live, cond), _excess(method, x, cond)
            found |= {"critic_lag": fresh / max(held_out, 1e-12), "critic_excess": fresh}
        if judged and getattr(real, "x", None) is not None and real.x.shape[1:] == x.shape[1:]:
            found["head_accuracy"] = _accuracy(method, x, cond, real)
    return found


def _on(device: torch.device, value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _on(device, v) for k, v in value.items()}
    return subset(value, MOST).to(device)


def _excess(method: Any, x: Tensor, cond: Mapping[str, Tensor]) -> float:
    """The critic's error on noised x over the teacher's, with the same noise at each call."""
    generator, schedule = torch.Generator().manual_seed(0), method.critic.schedule
    u = torch.linspace(0.05, 0.95, len(x))[torch.randperm(len(x), generator=generator)].to(x.device)
    noise = torch.randn(x.shape, generator=generator).to(x)
    x_u = schedule.add_noise(x, u, noise)
    found = method.critic(x_u, u, **cond, **method.critic_time_condition(u)), method.teacher(x_u, u, **cond)
    critic, teacher = ((estimate - x).square().mean() for estimate in found)
    return float(critic / teacher.clamp_min(1e-12))


def _accuracy(method: Any, x: Tensor, cond: Mapping[str, Tensor], real: Any) -> float:
    y, u = subset(real.x, len(x)).to(x), method.density(len(x), device=x.device, dtype=x.dtype)
    n, schedule = min(len(x), len(y)), method.teacher.schedule
    labels = {} if getattr(real, "label", None) is None else {"label": subset(real.label, len(x)).to(x.device)[:n]}
    right = []
    for samples, conditions, sign in ((y[:n], labels or cond, 1), (x[:n], cond, -1)):
        conditions = {k: v[:n] for k, v in conditions.items()}
        logit = method.logit(schedule.add_noise(samples, u[:n], torch.randn_like(samples)), u[:n], conditions)
        right.append((sign * logit.reshape(n, -1).mean(1) > 0).double().mean())
    return float(torch.stack(right).mean())


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
