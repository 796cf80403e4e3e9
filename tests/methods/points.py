"""Few points instead of random numbers: every mean up to the second moment is exact, so that gradients are zero, not small."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import nn

from distill.denoise import Denoiser

D = torch.float64


def columns(draws: int) -> torch.Tensor:
    """All sign patterns of `draws` variables, (draws, 2^draws, 1): mean 0, variance 1, independent of each other."""
    rows = torch.arange(2**draws)
    return torch.stack([1.0 - 2.0 * (rows >> k & 1) for k in range(draws)]).to(D)[..., None]


@contextmanager
def drawn(*values, names=("randn_like",)):
    """Let each of `torch.NAME` return the values in turn, whatever the shape that is asked for; the last one repeats."""
    left, inner = [list(values) for _ in names], [getattr(torch, name) for name in names]
    for name, rest in zip(names, left):
        setattr(torch, name, lambda like, rest=rest, **_: (rest.pop(0) if len(rest) > 1 else rest[0]).to(like))
    try:
        yield
    finally:
        for name, function in zip(names, inner):
            setattr(torch, name, function)


def at(u: float):
    """A density that draws only u."""
    return lambda n, device=None, dtype=None: torch.full((n,), u, dtype=dtype or D, device=device)


class Line(nn.Module):
    """An affine function of x_in that is `exact` in the critic's chart, plus off + gain x_in, both 0 at the start."""

    shape, flow_map = (1,), False

    def __init__(self, exact):
        super().__init__()
        self.exact = exact
        self.off, self.gain = nn.Parameter(torch.zeros(1, dtype=D)), nn.Parameter(torch.zeros(1, dtype=D))

    def forward(self, x, t, **cond):
        return self.exact(x, t) + self.off + self.gain * x


def critic_of(exact: Denoiser, prediction: str) -> Denoiser:
    """`exact` as a network of that chart."""
    critic = Denoiser(None, exact.schedule, prediction, sigma_data=0.5)

    def formula(x_in, t):
        x_t = x_in * critic._edm(x_in, t)[2] if prediction == "edm" else x_in
        return critic.from_x(exact(x_t, t), x_t, t)

    critic.net = Line(formula)
    return critic
