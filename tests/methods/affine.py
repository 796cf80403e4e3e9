"""Students and teachers whose law is known: what the closed-form tests of distribution matching stand on."""

from __future__ import annotations

import torch
from torch import nn

from distill.denoise import Denoiser, Gaussian
from distill.noise import RectifiedFlow


class Affine(Denoiser):
    """x = m + g x_t whatever t: from noise at t = 1 its one-step law is exactly N(m, g^2)."""

    def __init__(self, mean, std, dim=1, schedule=None):
        super().__init__(nn.Linear(1, 1), schedule or RectifiedFlow(), "x")
        self.net.shape, self.net.guided = (dim,), False
        self.net.requires_grad_(False)
        self.m = nn.Parameter(torch.full((dim,), float(mean), dtype=torch.float64))
        self.g = nn.Parameter(torch.full((dim,), float(std), dtype=torch.float64))

    def forward(self, x_t, t, **cond):
        return self.m + self.g * x_t

    native = forward

    def null(self, cond):
        return {k: torch.full_like(v, -1) for k, v in cond.items()}


class Labelled(Denoiser):
    """N(m_label, std^2), and N(m_u, std^2) for label -1: guidance w extrapolates the mean exactly."""

    def __init__(self, means, mean_null, std, schedule=None):
        super().__init__(None, schedule or RectifiedFlow(), "x")
        self.means = torch.tensor([*means, mean_null], dtype=torch.float64)
        self.std = std

    def forward(self, x_t, t, label=None, **cond):
        mean = self.means[-1].expand(len(x_t)) if label is None else self.means[label]
        centred = Gaussian(torch.zeros(x_t.shape[1:]), self.std, self.schedule)
        alpha, _ = self.schedule.at(t, x_t)
        mean = mean.view(-1, *[1] * (x_t.ndim - 1))
        return mean + centred(x_t - alpha * mean, t)


def of_gaussian(mean, std, dim=1, schedule=None):
    """The exact critic of a student with the law N(mean, std^2)."""
    return Gaussian([float(mean)] * dim, std, schedule or RectifiedFlow())


def in_turn(method, role):
    """Let only `role` require gradient, as the loop does, and clear what is there."""
    method._only(role)
    for p in method.parameters():
        p.grad = None
    return method


def pull(method, loss):
    """d loss / d(m, g) of an affine student, each a float (mean over dimensions)."""
    in_turn(method, "student")
    loss().backward()
    return method.student.m.grad.sum().item(), method.student.g.grad.sum().item()


def touched(method):
    """The roles whose parameters hold a non-zero gradient."""
    roles = (*method.trainable, *method.frozen)
    grads = {r: [p.grad for p in getattr(method, r).parameters() if p.grad is not None] for r in roles}
    return {r for r in roles if any(g.abs().sum() > 0 for g in grads[r])}
