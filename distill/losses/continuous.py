r"""Continuous-time consistency in the chart of TrigFlow: x_theta = cos(theta) x + sin(theta) z, z ~ N(0, sd^2 I).

    f(x_theta, theta) = cos(theta) x_theta - sin(theta) sd F(x_theta, theta),   theta in [0, pi/2]

sCM, Lu and Song 2024, https://arxiv.org/abs/2410.11081.
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
        dF: cos sin dF/dtheta along the trajectory, the derivative for tangents multiplied by cos(theta) sin(theta): so
            it stays bounded as theta goes to pi/2.
        x, dx: x_theta and its velocity dx/dtheta on the trajectory.
        theta: (B,) in [0, pi/2].
        sd: sigma_data.
        r: warm-up in [0, 1]; at 0 the optimum is sd F = dx/dtheta, that of diffusion.
    """
    cos, sin = bcast(theta.cos(), x), bcast(theta.sin(), x)
    return -(cos**2) * (sd * F - dx) - r * (cos * sin * x + sd * dF)


def normalised(g: Tensor, c: float = 0.1) -> Tensor:
    """g / (|g| + c) with |g| the root mean square over a sample's elements, so below 1 for every sample."""
    return g / (bcast(g.flatten(1).square().mean(1).sqrt(), g) + c)


def descend(F: Tensor, g: Tensor, weight: Tensor | None = None, per_sample: bool = False) -> Tensor:
    r"""weight mean_i (F - sg F - g)_i^2, whose gradient in F is -2 g weight over the number of elements.

    Its value is that of |g|^2 and no measure of progress.
    """
    return mse(F, (F + g).detach(), weight, per_sample)


def balanced(value: Tensor, u: Tensor) -> Tensor:
    r"""mean of e^-u value + u over the batch, both (B,): where e^u = E[value | t], its optimum, all times count alike.

    Kendall et al. 2018, https://arxiv.org/abs/1705.07115; as learned weighting, https://arxiv.org/abs/2312.02696.
    """
    return (torch.exp(-u) * value + u).mean()
