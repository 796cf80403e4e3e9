"""An affine student per time, whose optimum a consistency loss has in closed form."""

from __future__ import annotations

import torch
from torch import nn

from distill.noise import bcast

F64 = torch.float64
STD = 0.5


class Affine(nn.Module):
    """x = m + a_i (x_t - alpha m) with one slope a_i per equidistant time t_i; guidance moves m = null + w shift."""

    guided, shape = True, (1,)

    def __init__(self, times, slopes, null=0.0, shift=0.0):
        super().__init__()
        self.times = torch.tensor(times, dtype=F64)
        self.slopes = nn.Parameter(slopes.to(F64).clone())
        self.null_mean, self.shift, self.alpha = null, shift, lambda t: torch.ones_like(t)

    def forward(self, x, t, label=None, w=None):
        low, high = self.times[0], self.times[-1]
        i = ((t - low) / (high - low) * (len(self.times) - 1)).round().long()
        mean = bcast(self.null_mean + self.shift * (torch.ones_like(t) if w is None else w), x)
        return mean + bcast(self.slopes[i], x) * (x - bcast(self.alpha(t), x) * mean)


def karras(n: int) -> list[float]:
    """The times of VE(80, 7) at which sigma is the Karras grid from 80 down to 0.002."""
    low = (0.002 / 80) ** (1 / 7)
    return [1 + i / (n - 1) * (low - 1) for i in range(n)]


def batch(n: int, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return STD * torch.randn(n, 1, dtype=F64, generator=g), torch.randn(n, 1, dtype=F64, generator=g)


def square(n: int):
    """n times the four points (+-STD, +-1): E x^2, E z^2 and E xz of Gaussian data and noise are exact."""
    x = STD * torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=F64)
    z = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=F64)
    return x.repeat(n)[:, None], z.repeat(n)[:, None]


def fixed_point(method, x, z) -> torch.Tensor:
    """Newton's method on each slope by itself (the loss is quadratic in it) until the target stops moving."""
    net = method.student.net

    def slope_gradient():
        torch.manual_seed(1)
        return torch.autograd.grad(method.loss(x, z, {}), net.slopes)[0]

    for _ in range(len(net.slopes) + 1):
        g = slope_gradient()
        with torch.no_grad():
            net.slopes += 1
        curvature = slope_gradient() - g
        with torch.no_grad():
            net.slopes += -1 - g / torch.where(curvature == 0, 1, curvature)
        method.target.load_state_dict(method.student.state_dict())
    return net.slopes.detach()
