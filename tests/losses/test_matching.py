"""Distribution matching against closed forms: a Gaussian student with its exact critic, and quadrature."""

import math

import pytest
import torch

from distill.denoise import Gaussian
from distill.errors import BadInput
from distill.losses.matching import DIVERGENCES, divergence_weight, gap, importance, matching, normaliser
from distill.noise import VE, RectifiedFlow

D = torch.float64


def test_the_surrogate_has_exactly_the_stated_gradient():
    torch.manual_seed(0)
    x = torch.randn(5, 2, 3, dtype=D, requires_grad=True)
    fake, real, weight = torch.randn(5, 2, 3, dtype=D), torch.randn(5, 2, 3, dtype=D), torch.rand(5, dtype=D)
    matching(x, fake, real, weight=weight).backward()
    scale = weight / (x - real).detach().abs().mean((1, 2))
    assert torch.allclose(x.grad, scale[:, None, None] * (fake - real) / x.numel(), atol=1e-15)
    x.grad = None
    matching(x, fake, real, normalise="none").backward()
    assert torch.allclose(x.grad, (fake - real) / x.numel(), atol=1e-15)


def test_huber_form_saturates_at_the_sign():
    x = torch.randn(4, 3, dtype=D, requires_grad=True)
    fake, real = torch.randn(4, 3, dtype=D), torch.randn(4, 3, dtype=D)
    matching(x, fake, real, c=1e-9).backward()
    sign = (fake - real).sign() * normaliser(x, real)[:, None] / x.numel()
    assert torch.allclose(x.grad, sign, atol=1e-8)
    x.grad = None
    matching(x, real, real, c=1e-3).backward()
    assert torch.equal(x.grad, torch.zeros_like(x)), "F = D must leave x alone"


def test_no_gradient_reaches_critic_or_teacher():
    x, fake, real = (torch.randn(4, 3, dtype=D, requires_grad=True) for _ in range(3))
    matching(x, fake, real).backward()
    assert x.grad.abs().sum() > 0 and fake.grad is None and real.grad is None


def test_normaliser_is_finite_at_zero_distance_and_an_unknown_one_is_refused():
    x = torch.zeros(2, 3)
    assert torch.isfinite(normaliser(x, x)).all()
    with pytest.raises(BadInput, match="Did you mean 'real'"):
        matching(x, x, x, normalise="reel")


def exact(mean, std, schedule=None):
    return Gaussian([mean], std, schedule or VE(sigma_max=10.0, rho=1.0))


@pytest.mark.parametrize(("mean", "std"), [(0.7, 0.8), (0.0, 1.3), (0.0, 0.5), (-0.4, 0.8)])
def test_mean_gradients_with_the_exact_critic_point_to_the_teacher(mean, std):
    """Teacher N(0, .8^2), student m + g n: E dx/dm = (1-k) m at equal variance, sign(dg) = sign(g^2 - s^2) at m = 0."""
    torch.manual_seed(1)
    n, sigma, s = 50_000, 0.9, 0.8
    m = torch.tensor(mean, dtype=D, requires_grad=True)
    g = torch.tensor(std, dtype=D, requires_grad=True)
    base = torch.randn(n // 2, 1, dtype=D)
    x = m + g * torch.cat([base, -base])
    u = torch.full((n,), sigma / 10, dtype=D)
    noise = torch.randn(n // 2, 1, dtype=D)
    x_u = (x + sigma * torch.cat([noise, -noise])).detach()
    fake, real = exact(mean, std)(x_u, u), exact(0.0, s)(x_u, u)
    loss = matching(x, fake, real, normalise="none")
    dm, dg = torch.autograd.grad(loss, (m, g))
    k_t, k_g = s**2 / (s**2 + sigma**2), std**2 / (std**2 + sigma**2)
    # E (F - D) = (1 - k_t) m and E (F - D) n = (k_g - k_t) g, antithetic noise makes the first exact
    assert dm.item() == pytest.approx((1 - k_t) * mean, abs=1e-12)
    assert dg.item() == pytest.approx((k_g - k_t) * std, abs=8e-3)
    if std != s:
        assert math.copysign(1, dg.item()) == math.copysign(1, std - s)


def test_at_the_optimum_the_gradient_vanishes_and_a_sample_in_place_of_the_critic_only_in_the_mean():
    """Why a critic is needed: x itself has the right mean, E[x | x_u], and a large variance."""
    torch.manual_seed(2)
    schedule, n = RectifiedFlow(), 30_000
    x = 0.3 + 0.7 * torch.randn(n, 1, dtype=D)
    u = 0.05 + 0.9 * torch.rand(n, dtype=D)
    x_u = schedule.add_noise(x, u, torch.randn_like(x))
    model = exact(0.3, 0.7, schedule)
    direct = model(x_u, u) - x  # the estimator that uses a sample in place of the critic
    assert direct.std() > 0.1
    assert abs(direct.mean()) < 4 * direct.std() / math.sqrt(n)
    x.requires_grad_()
    matching(x, model(x_u.detach(), u), model(x_u.detach(), u)).backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


# -- f-divergences ---------------------------------------------------------------------------------------------------

F = {  # f(r) with f'' r^2 = const h(r)
    "reverse_kl": (lambda r: -r.log(), 1.0),
    "kl": (lambda r: r * r.log(), 1.0),
    "js": (lambda r: 0.5 * (r * r.log() - (1 + r) * ((1 + r) / 2).log()), 0.5),
    "hellinger": (lambda r: (1 - r.sqrt()) ** 2, 0.5),
    "jeffreys": (lambda r: (r - 1) * r.log(), 1.0),
    "neyman": (lambda r: 1 / (2 * r), 1.0),
    "softened_reverse_kl": (lambda r: (1 + r) * ((1 + r) / r).log(), 1.0),
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_f_divergence_gradients_against_quadrature(name):
    """d/d(m, g) int p_G f(p_D/p_G) = -E_G[ h(r) (score_D - score_G) dx/d(m, g) ], unequal variances."""
    f, constant = F[name]
    grid = torch.linspace(-14, 14, 8_001, dtype=D)
    step = grid[1] - grid[0]
    s = 1.0

    def log_normal(y, mean, std):
        return -0.5 * ((y - mean) / std) ** 2 - torch.log(std) - 0.5 * math.log(2 * math.pi)

    m, g = (torch.tensor(v, dtype=D, requires_grad=True) for v in (0.4, 0.9))
    log_g, log_d = log_normal(grid, m, g), log_normal(grid, torch.tensor(0.0, dtype=D), torch.tensor(s, dtype=D))
    value = (log_g.exp() * f((log_d - log_g).exp())).sum() * step
    expected = torch.autograd.grad(value, (m, g))

    with torch.no_grad():
        log_ratio = log_d - log_g
        h = divergence_weight(name, log_ratio, low=0.0, high=torch.inf) * DIVERGENCES[name](torch.ones((), dtype=D))
        inside = log_ratio.abs() < 10  # where the logit's clamp does nothing
        away = (-grid / s**2 + (grid - m) / g**2) * h * log_g.exp() * step * constant * inside
        ours = -away.sum(), -(away * (grid - m) / g).sum()
    for a, b in zip(ours, expected):
        assert a.item() == pytest.approx(b.item(), abs=2e-6)


def test_divergence_weights_clip_and_detach_and_are_one_where_the_laws_agree():
    logit = torch.tensor([-50.0, 0.0, 50.0], dtype=D, requires_grad=True)
    h = divergence_weight("kl", logit)
    assert h.tolist() == pytest.approx([0.1, 1.0, 20.0]) and not h.requires_grad
    assert all(divergence_weight(name, logit)[1] == 1 for name in DIVERGENCES)
    assert torch.equal(divergence_weight("reverse_kl", logit), torch.ones(3, dtype=D))
    with pytest.raises(BadInput, match="Did you mean 'hellinger'"):
        divergence_weight("helinger", logit)


def test_gap_is_zero_where_the_laws_meet():
    x, real = torch.randn(4, 3), torch.randn(4, 3)
    assert gap(x, real, real) == 0
    assert gap(x, x, real) == pytest.approx(1.0)


def test_importance_weight_by_hand_and_in_high_dimension():
    """Gaussian eps independent of x: the weight is 1 + O(d^-1/2); tempered by the mean over dimensions."""
    eps, noise = torch.full((1, 4), 2.0, dtype=D), torch.ones(1, 4, dtype=D)
    assert importance(eps, noise).item() == pytest.approx(math.exp(-1.5))
    torch.manual_seed(0)
    spread = []
    for d in (16, 1024, 65536):
        w = importance(torch.randn(64, d, dtype=D), torch.randn(64, d, dtype=D))
        spread.append((w - 1).abs().max().item())
    assert spread[0] > spread[1] > spread[2] and spread[2] < 0.02


def test_the_normaliser_by_hand_and_its_floor():
    x, real = torch.tensor([[1.0, 2.0], [3.0, 3.0]], dtype=D), torch.tensor([[0.0, -1.0], [3.0, 3.0]], dtype=D)
    assert normaliser(x, real).tolist() == pytest.approx([1 / 2, 1e6])


def test_extreme_ratios_stay_at_their_bounds():
    """Relative to r = 1; without bounds the logarithm is still held within 10."""
    relative = lambda name, *bounds: (
        (h := divergence_weight(name, torch.tensor([-1e4, 0.0, 1e4], dtype=D), *bounds)) / h[1]
    )
    assert relative("kl").tolist() == pytest.approx([0.1, 1.0, 20.0])
    assert relative("neyman", 0.5, 4.0).tolist() == pytest.approx([2.0, 1.0, 0.25])
    assert relative("kl", 0.0, math.inf).tolist() == pytest.approx([math.exp(-10), 1.0, math.exp(10)])
