r"""Losses on average velocities, in the coordinates of `solvers.flowmap`.

(r_t - r_s) u(x_t, t, s) is the integral of v from r_s to r_t. Its derivative along the flow gives the identity
u = v - (r_t - r_s) du/dr.
"""

from __future__ import annotations

from torch import Tensor

from distill.losses.regression import mse
from distill.noise import bcast


def average_velocity(v: Tensor, du_dr: Tensor, gap: Tensor, share: float = 1.0) -> Tensor:
    """The regression target v - share (r_t - r_s) du/dr (B, ...), detached.

    Args:
        v: velocity at x_t (B, ...).
        du_dr: derivative of u along the flow (B, ...).
        gap: r_t - r_s (B,).
        share: factor of the derivative; below 1 during tangent warm-up.

    MeanFlow, https://arxiv.org/abs/2505.13447.
    """
    return (v - share * bcast(gap, v) * du_dr).detach()


def adaptive_loss(u: Tensor, target: Tensor, power: float = 1.0, c: float = 0.01) -> Tensor:
    r"""mean of S / sg((S + c)^power), with S the sum of squared errors of a sample; power 0 is the squared error.

    MeanFlow, https://arxiv.org/abs/2505.13447; the defaults are those of its ImageNet runs.
    """
    square = (u - target).square().flatten(1).sum(1)
    return (square / (square.detach() + c).pow(power)).mean()


def normalised_direction_loss(u: Tensor, target: Tensor, c: float = 0.1) -> Tensor:
    r"""mean |u - sg(u + g / (|g| + c))|^2 with g = target - u and |g| the norm of a sample: a gradient of bounded norm.

    Align Your Flow, https://arxiv.org/abs/2506.14603.
    """
    g = (target - u).detach()
    length = g.flatten(1).norm(dim=1)
    return mse(u, (u + g / bcast(length + c, g)).detach())


def guided_velocity(v: Tensor, u_null: Tensor, u_cond: Tensor, w: float, kappa: float) -> Tensor:
    r"""omega v + (1 - omega - kappa) u(null) + kappa u(cond) (B, ...) with omega = w (1 - kappa).

    In expectation the fixed point is u(cond) = u(null) + w (v - u(null)). MeanFlow, https://arxiv.org/abs/2505.13447.

    Args:
        v: velocity at x_t (B, ...).
        u_null, u_cond: outputs of the current network at s = t with the null condition and the condition (B, ...).
        w: guidance scale; 1 is conditional.
        kappa: share of u(cond), in [0, 1).
    """
    omega = w * (1 - kappa)
    return omega * v + (1 - omega - kappa) * u_null + kappa * u_cond
