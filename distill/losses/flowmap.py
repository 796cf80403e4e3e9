r"""Average velocities, (r_t - r_s) u(x_t, t, s) = the integral of v from r_s to r_t, in the chart of straight paths.

Differentiated along the flow:   u = v - (r_t - r_s) du/dr.
"""

from __future__ import annotations

from torch import Tensor

from distill.losses.regression import mse
from distill.noise import bcast


def average_velocity(v: Tensor, du_dr: Tensor, gap: Tensor, share: float = 1.0) -> Tensor:
    """The right side of the identity, v - share (r_t - r_s) du/dr (B, ...), detached; gap (B,) = r_t - r_s.

    `share` < 1 leaves part of the derivative out. MeanFlow, https://arxiv.org/abs/2505.13447.
    """
    return (v - share * bcast(gap, v) * du_dr).detach()


def adaptive(u: Tensor, target: Tensor, power: float = 1.0, c: float = 0.01) -> Tensor:
    r"""mean of S / sg((S + c)^power), S the sum of a sample's squared errors: power 0 is the squared error.

    https://arxiv.org/abs/2505.13447, with its c = 1e-2 and power = 1 of ImageNet.
    """
    square = (u - target).square().flatten(1).sum(1)
    return (square / (square.detach() + c).pow(power)).mean()


def normalised(u: Tensor, target: Tensor, c: float = 0.1) -> Tensor:
    r"""mean |u - sg(u + g / (|g| + c))|^2 with g = target - u: the direction towards the target, at a bounded length.

    Align Your Flow, https://arxiv.org/abs/2506.14603.
    """
    g = (target - u).detach()
    length = g.flatten(1).norm(dim=1)
    return mse(u, (u + g / bcast(length + c, g)).detach())


def guided_velocity(v: Tensor, u_null: Tensor, u_cond: Tensor, w: float, kappa: float) -> Tensor:
    r"""omega v + (1 - omega - kappa) u(null) + kappa u(cond) with omega = w (1 - kappa), a target whose fixed point is
    u(cond) = u(null) + w (v - u(null)) in expectation. MeanFlow; u at s = t from the current network.
    """
    omega = w * (1 - kappa)
    return omega * v + (1 - omega - kappa) * u_null + kappa * u_cond
