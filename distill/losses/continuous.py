r"""Continuous-time consistency training (sCM) under TrigFlow: x_theta = cos(theta) x + sin(theta) z, z ~ N(0, sd^2 I).

    f(x_theta, theta) = cos(theta) x_theta - sin(theta) sd F(x_theta, theta),   theta in [0, pi/2]

Lu and Song 2024, https://arxiv.org/abs/2410.11081.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distill.losses.regression import mse
from distill.noise import bcast


def tangent(F: Tensor, dF: Tensor, x: Tensor, dx: Tensor, theta: Tensor, sd: float = 1.0, r: float = 1.0) -> Tensor:
    r"""g = -cos^2 (sd F - dx/dtheta) - r (cos sin x + sd dF) (B, ...): cos(theta) df/dtheta at r = 1.

    Args:
        F: the network's output at (x, theta).
        dF: cos(theta) sin(theta) dF/dtheta along the trajectory; with the factor it is bounded as theta goes to pi/2.
        x, dx: x_theta and its velocity dx/dtheta along the trajectory.
        theta: (B,) in [0, pi/2].
        sd: sigma_data.
        r: tangent warm-up in [0, 1]; at r = 0 the optimum is that of diffusion training, sd F = dx/dtheta.
    """
    cos, sin = bcast(theta.cos(), x), bcast(theta.sin(), x)
    return -(cos**2) * (sd * F - dx) - r * (cos * sin * x + sd * dF)


def normalised_tangent(g: Tensor, c: float = 0.1) -> Tensor:
    """g / (|g| + c), with |g| the root mean square over the elements of a sample: of norm below 1."""
    return g / (bcast(g.flatten(1).square().mean(1).sqrt(), g) + c)


def tangent_loss(F: Tensor, g: Tensor, weight: Tensor | None = None, per_sample: bool = False) -> Tensor:
    r"""weight mean_i (F - sg(F + g))_i^2, whose gradient with respect to F is -2 weight g / (number of elements).

    The value is weight mean_i g_i^2; it does not measure progress.

    Args:
        F: the network's output (B, ...), with gradient.
        g: the tangent (B, ...).
        weight: (B,).
        per_sample: return (B,) instead of the mean.
    """
    return mse(F, (F + g).detach(), weight, per_sample)


def uncertainty_weighted(value: Tensor, u: Tensor) -> Tensor:
    r"""mean of e^{-u} value + u over the batch, for a loss `value` and a learned log-weight `u`, both (B,).

    At the optimum e^u = E[value | t], so that all times have equal weight.

    Kendall et al. 2018, https://arxiv.org/abs/1705.07115; for diffusion, Karras et al. 2023, https://arxiv.org/abs/2312.02696.
    """
    return (torch.exp(-u) * value + u).mean()
