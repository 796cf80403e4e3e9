"""SiD's loss on Gaussians, integrated exactly: value and gradients in closed form."""

import numpy
import pytest
import torch

from distill.losses.identity import identity

D = torch.float64
SIGMA, S = 0.9, 0.8


def nodes():
    """Gauss-Hermite nodes and weights of two independent standard normals."""
    y, w = (torch.tensor(a, dtype=D) for a in numpy.polynomial.hermite_e.hermegauss(12))
    w = w / w.sum()
    n, e = torch.meshgrid(y, y, indexing="ij")
    return n.reshape(-1, 1), e.reshape(-1, 1), (w[:, None] * w).reshape(-1)


def loss(m, g, alpha, through=True, exact=None):
    """E over x = m + g n, x_u = x + sigma e with the exact critic of (m, g), frozen; teacher N(0, S^2)."""
    n, e, w = nodes()
    m0, g0 = exact or (float(m), float(g))
    x = m + g * n
    x_u = x + SIGMA * e
    if not through:
        x_u = x_u.detach()
    k_t, k_g = S**2 / (S**2 + SIGMA**2), g0**2 / (g0**2 + SIGMA**2)
    return identity(x, m0 + k_g * (x_u - m0), k_t * x_u, alpha, weight=w * len(w), normalise=False)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
@pytest.mark.parametrize(("m", "g"), [(0.3, 0.8), (0.0, 1.1), (-0.2, 0.6)])
def test_value_is_one_minus_alpha_times_the_fisher_divergence(m, g, alpha):
    n, e, w = nodes()
    x_u = m + g * n + SIGMA * e
    k_t, k_g = S**2 / (S**2 + SIGMA**2), g**2 / (g**2 + SIGMA**2)
    fisher = (w[:, None] * (k_t * x_u - m - k_g * (x_u - m)) ** 2).sum()
    value = loss(torch.tensor(m, dtype=D), torch.tensor(g, dtype=D), alpha)
    assert value.item() == pytest.approx((1 - alpha) * fisher.item(), abs=1e-12)


def slopes(m, g, alpha, **kw):
    m, g = (torch.tensor(v, dtype=D, requires_grad=True) for v in (m, g))
    return [d.item() for d in torch.autograd.grad(loss(m, g, alpha, **kw), (m, g), allow_unused=True)]


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
@pytest.mark.parametrize("g", [0.4, 0.8, 1.5])
def test_gradient_in_the_scale(g, alpha):
    k_t, k_g = S**2 / (S**2 + SIGMA**2), g**2 / (g**2 + SIGMA**2)
    expected = 2 * g * (k_t - k_g) * (k_t - 1 - alpha * (k_t - k_g))
    assert slopes(0.0, g, alpha)[1] == pytest.approx(expected, abs=1e-12)
    if alpha <= 1 and g != S:
        assert (expected > 0) == (g > S)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_gradient_in_the_mean_does_not_depend_on_alpha(alpha):
    k = S**2 / (S**2 + SIGMA**2)
    assert slopes(0.3, S, alpha)[0] == pytest.approx((1 - k) ** 2 * 0.3, abs=1e-12)


def test_the_optimum_is_stationary_and_only_with_gradient_through_the_scores_right():
    assert slopes(0.0, S, 1.2) == pytest.approx([0.0, 0.0], abs=1e-13)
    k = S**2 / (S**2 + SIGMA**2)
    blocked = slopes(0.3, S, 1.2, through=False)[0]
    assert blocked == pytest.approx((1 - k) * 0.3), "without it the scale is that of distribution matching"


def test_the_normaliser_is_detached():
    x, fake, real = (torch.randn(4, 3, dtype=D, requires_grad=True) for _ in range(3))
    identity(x, fake, real, 1.0).backward()
    scale = 1 / (x - real).detach().abs().mean(1, keepdim=True)
    assert torch.allclose(x.grad, -(real - fake).detach() * scale / 12)
    assert fake.grad.abs().sum() > 0 and real.grad.abs().sum() > 0


def test_by_hand_with_weight_and_normaliser():
    """D - F = (1, -2), D - x = (4, -1): <.,.> = (1)(4 - a) + (-2)(-1 + 2a), w = 1 / 2.5, the weight 3."""
    x, fake, real = (
        torch.tensor([[1.0, 2.0]], dtype=D),
        torch.tensor([[4.0, 3.0]], dtype=D),
        torch.tensor([[5.0, 1.0]], dtype=D),
    )
    value = lambda a: ((4 - a) - 2 * (-1 + 2 * a)) / 2
    weight = torch.tensor([3.0], dtype=D)
    assert identity(x, fake, real, 1.0, weight).item() == pytest.approx(value(1.0) * 3 / 2.5)
    assert identity(x, fake, real, 0.5, weight, normalise=False).item() == pytest.approx(value(0.5) * 3)
    assert identity(x, fake, real, normalise=False).item() == pytest.approx(value(1.2)), "the paper's alpha is 1.2"
