"""Students whose optimum is known, for the closed-form tests of methods."""

from __future__ import annotations

import torch
from torch import nn

from distill.denoise import Denoiser, GaussianMixture
from distill.noise import RectifiedFlow


class Formula(nn.Module):
    """A network that answers `formula(x, t, **cond)` plus a trainable constant, which is 0 until it is perturbed."""

    guided = flow_map = True
    classes = 0

    def __init__(self, formula, shape=(1,)):
        super().__init__()
        self.formula, self.shape = formula, shape
        self.off = nn.Parameter(torch.zeros(shape, dtype=torch.float64))

    def forward(self, x, t, **cond):
        return self.formula(x, t, **cond) + self.off


def student(formula, schedule=None, prediction="x", shape=(1,), **traits) -> Denoiser:
    """A Denoiser around `Formula`; traits such as guided=False replace the network's."""
    net = Formula(formula, shape)
    for name, value in traits.items():
        setattr(net, name, value)
    return Denoiser(net, schedule or RectifiedFlow(), prediction)


class Pair(GaussianMixture):
    """Component 0 is the unconditional model, the label picks another: guidance is then exactly a shift of the mean."""

    def null(self, cond):
        return {"label": torch.zeros_like(cond["label"])}


def gradient(method, loss, *batch) -> torch.Tensor:
    """d loss / d off of the method's student."""
    off = method.student.net.off
    return torch.autograd.grad(loss(*batch), off)[0]


def drawn(n=256, dim=1, labels=None, seed=0):
    """(x, z, cond) in float64."""
    random = torch.Generator().manual_seed(seed)
    x, z = torch.randn(2, n, dim, generator=random, dtype=torch.float64)
    return x, z, {} if labels is None else {"label": torch.full((n,), labels)}


def wiggly(formula, size):
    """`formula` plus size sin(1000 t), as a network with integer timesteps may answer: its derivative is 1000 size."""
    return lambda x, t, *rest, **cond: formula(x, t, *rest, **cond) + size * (1000 * t).sin()[:, None]
