"""The continuous-time consistency loss against closed forms."""

from __future__ import annotations

import math

import torch

from distill.losses.continuous import normalised_tangent, tangent, tangent_loss, uncertainty_weighted
from distill.noise import bcast

F64 = torch.float64


def test_the_tangent_is_cos_times_the_derivative_of_f():
    """f = cos x - sin sd F along x(theta) = theta^2 a, F = sin(3 theta) x, by hand."""
    sd = 0.7
    theta = torch.linspace(0.1, 1.5, 9, dtype=F64)
    a = torch.randn(9, 2, dtype=F64)
    x, dx = bcast(theta**2, a) * a, bcast(2 * theta, a) * a
    F = lambda th: bcast(torch.sin(3 * th) * th**2, a) * a
    f = lambda th: bcast(th.cos() * th**2, a) * a - bcast(th.sin(), a) * sd * F(th)
    _, slope = torch.func.jvp(F, (theta,), (theta.cos() * theta.sin(),))
    _, df = torch.func.jvp(f, (theta,), (torch.ones_like(theta),))
    g = tangent(F(theta), slope, x, dx, theta, sd)
    torch.testing.assert_close(g, bcast(theta.cos(), a) * df, rtol=1e-12, atol=1e-12)


def test_without_warm_up_the_optimum_is_the_velocity():
    x, dx, slope = torch.randn(3, 5, 2, dtype=F64)
    theta = torch.rand(5, dtype=F64)
    assert tangent(dx / 0.5, slope, x, dx, theta, sd=0.5, r=0.0).abs().max() < 1e-15


def test_the_gradient_is_minus_two_g_weight_over_the_elements():
    F = torch.randn(6, 3, 4, dtype=F64, requires_grad=True)
    g, weight = torch.randn(6, 3, 4, dtype=F64), torch.rand(6, dtype=F64)
    tangent_loss(F, g, weight, per_sample=True).sum().backward()
    torch.testing.assert_close(F.grad, -2 * g * bcast(weight, g) / 12)


def test_the_normalised_tangent_is_below_one_and_keeps_its_direction():
    g = torch.randn(8, 50, dtype=F64) * torch.logspace(-6, 6, 8, dtype=F64)[:, None]
    n = normalised_tangent(g, 0.1)
    size = n.square().mean(1).sqrt()
    assert (size < 1).all() and size[-1] > 0.999 and abs(size[0] / (g[0].square().mean().sqrt() / 0.1) - 1) < 1e-4
    torch.testing.assert_close(torch.cosine_similarity(n, g), torch.ones(8, dtype=F64))


def test_the_optimum_of_the_balance_is_the_log_of_the_value():
    value = torch.tensor([0.1, 1.0, 30.0], dtype=F64)
    u = value.log().requires_grad_()
    uncertainty_weighted(value, u).backward()
    assert u.grad.abs().max() < 1e-15
    up = (value.log() + 0.1).requires_grad_()
    uncertainty_weighted(value, up).backward()
    assert (up.grad > 0).all() and math.isclose(uncertainty_weighted(value, u).item(), (1 + value.log()).mean().item())


def test_the_defaults_are_unit_data_no_warm_up_and_the_papers_constant():
    F, dF, x, dx, g = torch.randn(5, 4, 3, dtype=F64)
    theta = torch.linspace(0.2, 1.4, 4, dtype=F64)
    torch.testing.assert_close(tangent(F, dF, x, dx, theta), tangent(F, dF, x, dx, theta, sd=1.0, r=1.0))
    torch.testing.assert_close(normalised_tangent(g), g / (g.square().mean(1, keepdim=True).sqrt() + 0.1))
    torch.testing.assert_close(tangent_loss(F, g), g.square().mean())
