"""Adversarial losses: values, the optimal logit, the gradient penalty's limit."""

import math

import pytest
import torch
from torch import nn

from distill.errors import BadInput
from distill.losses.adversarial import (
    MAX_RATIO,
    approximate_r1,
    check_r1_step,
    discriminator_loss,
    extra_loss_weight,
    generator_loss,
    gradient_ratio,
    penalised_discriminator_loss,
    r1,
)

D = torch.float64


def test_values_by_hand():
    zero, two = torch.zeros(3, dtype=D), torch.full((3,), 2.0, dtype=D)
    assert discriminator_loss(zero, zero).item() == pytest.approx(2 * math.log(2))
    assert generator_loss(zero).item() == pytest.approx(math.log(2))
    assert discriminator_loss(two, -two, "hinge").item() == 0.0, "hinge is 0 beyond its margins"
    assert discriminator_loss(zero, zero, "hinge").item() == 2.0 and generator_loss(two, "hinge").item() == -2.0
    with pytest.raises(BadInput, match="Did you mean 'hinge'"):
        generator_loss(zero, "hing")


def test_a_linear_head_gives_the_generator_gradient_minus_sigmoid_alpha_w():
    torch.manual_seed(0)
    w, alpha = torch.randn(3, dtype=D), 0.6
    x = torch.randn(4, 3, dtype=D, requires_grad=True)
    logit = (alpha * x + torch.randn(4, 3, dtype=D)) @ w
    generator_loss(logit).backward()
    assert torch.allclose(x.grad, -torch.sigmoid(-logit.detach())[:, None] * alpha * w / 4, atol=1e-14)


def test_the_optimal_logit_is_the_log_density_ratio():
    """The discriminator's loss on a grid of points with weights p and q has its zero gradient at log p - log q."""
    y = torch.linspace(-8, 8, 4001, dtype=D)
    p, q = torch.exp(-0.5 * y**2), torch.exp(-0.5 * ((y - 1) / 0.7) ** 2) / 0.7
    logit = (p.log() - q.log()).requires_grad_()
    loss = (p * nn.functional.softplus(-logit) + q * nn.functional.softplus(logit)).sum()
    (slope,) = torch.autograd.grad(loss, logit)
    assert slope.abs().max() < 1e-14
    hand = sum(discriminator_loss(l[None], l[None]) for l in logit[:3].detach())
    assert hand.item() == pytest.approx(
        (nn.functional.softplus(-logit[:3]) + nn.functional.softplus(logit[:3])).sum().item()
    )


def net():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 3)).double()


def test_r1_by_hand():
    w = torch.tensor([3.0, 4.0], dtype=D)
    x = torch.randn(6, 2, dtype=D, requires_grad=True)
    assert r1(x @ w, x).item() == pytest.approx(12.5)  # |w|^2 / 2
    patches = torch.stack([x @ w, -(x @ w)], dim=1)
    assert r1(patches, x).item() == pytest.approx(0.0), "patches are averaged before the slope"


def test_r1_trains_the_discriminator_only_through_the_second_derivative():
    f = net()
    x = torch.randn(6, 5, dtype=D, requires_grad=True)
    r1(f(x), x).backward()
    assert f[0].weight.grad.abs().sum() > 0


def test_the_approximate_r1_tends_to_the_exact_one():
    f, n = net(), 200_000
    torch.manual_seed(2)
    x = torch.randn(1, 5, dtype=D).expand(n, 5)
    leaf = x[:1].clone().requires_grad_()
    exact = r1(f(leaf), leaf).item()
    noise = torch.randn(n, 5, dtype=D)
    errors = []
    with torch.no_grad():
        for step in (1.0, 1e-1, 1e-3):
            near = approximate_r1(f(x), f(x + step * noise), step).item()
            errors.append(abs(near / exact - 1))
    assert errors[0] > errors[1] and errors[2] < 0.015, errors  # 1e-3: sampling error, 1.4 / sqrt(n) x 4


def test_discriminate_reaches_no_sample_and_adds_the_named_penalty():
    f = net()
    torch.manual_seed(3)
    real, fake, noise = (torch.randn(6, 5, dtype=D, requires_grad=True) for _ in range(3))
    plain = penalised_discriminator_loss(f, real, fake, noise)
    plain.backward()
    assert real.grad is None and fake.grad is None and f[0].weight.grad.abs().sum() > 0
    leaf = real.detach().requires_grad_()
    exact = penalised_discriminator_loss(f, real, fake, noise, penalty=0.3)
    assert (exact - plain).item() == pytest.approx(0.3 * r1(f(leaf), leaf).item())
    near = penalised_discriminator_loss(f, real, fake, noise, penalty=0.3, step=0.1)
    assert (near - plain).item() == pytest.approx(0.3 * approximate_r1(f(real), f(real + 0.1 * noise), 0.1).item())


def test_the_approximate_r1_by_hand():
    """Changes of -1/2 and 1 over a step of 1/2: (1 + 4) / 2 / 2."""
    logit, perturbed = torch.tensor([1.0, 2.0], dtype=D), torch.tensor([1.5, 1.0], dtype=D)
    assert approximate_r1(logit, perturbed, 0.5).item() == pytest.approx(1.25)
    patches = torch.stack([logit + 3, logit - 3], 1)
    assert approximate_r1(patches, torch.stack([perturbed, perturbed], 1), 0.5).item() == pytest.approx(1.25)


def test_values_on_both_sides_of_the_margins():
    real, fake = torch.tensor([0.5, 3.0], dtype=D), torch.tensor([-0.25, -2.0], dtype=D)
    assert discriminator_loss(real, fake, "hinge").item() == pytest.approx((0.5 + 0) / 2 + (0.75 + 0) / 2)
    assert generator_loss(fake, "hinge").item() == pytest.approx(1.125)
    soft = lambda a: math.log1p(math.exp(a))
    expected = (soft(-0.5) + soft(-3.0)) / 2 + (soft(-0.25) + soft(-2.0)) / 2
    assert discriminator_loss(real, fake).item() == pytest.approx(expected)
    assert generator_loss(fake).item() == pytest.approx((soft(0.25) + soft(2.0)) / 2)


def test_a_loss_without_gradient_does_not_make_the_ratio_infinite():
    x = torch.ones(2, 2, dtype=D, requires_grad=True)
    assert gradient_ratio(x, x.sum(), 0.0 * x.sum()).item() == pytest.approx(2.0 / 1e-8)


def test_auto_is_at_most_a_tenth():
    assert MAX_RATIO == 0.1, "docs/methods/dmd2.md compares this bound with other codebases"


def test_balance_equals_the_gradient_norms():
    x = torch.randn(4, 3, dtype=D, requires_grad=True)
    main, extra = x.square().sum(), 7 * x.pow(3).sum()
    factor = gradient_ratio(x, main, extra)
    a, b = torch.autograd.grad(main, x, retain_graph=True)[0], torch.autograd.grad(factor * extra, x)[0]
    assert a.norm().item() == pytest.approx(b.norm().item()) and not factor.requires_grad


@pytest.mark.parametrize(
    "how, a, ratio",
    [
        (True, 0.03, 0.03),
        (True, 30.0, 30.0),
        ("auto", 0.03, 0.03),
        ("auto", MAX_RATIO, MAX_RATIO),
        ("auto", 30.0, MAX_RATIO),
    ],
)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_a_balanced_weight_is_a_ratio_of_gradient_norms_whatever_the_losses_scale(how, a, ratio, scale):
    x = torch.randn(4, 3, dtype=D, requires_grad=True)
    main, extra = x.square().sum(), scale * x.pow(3).sum()
    factor = extra_loss_weight(a, how, x, main, extra)
    by_hand = [v.norm().item() for v in (2 * x, scale * 3 * x.square())]
    assert float(factor) * by_hand[1] == pytest.approx(ratio * by_hand[0]) and not factor.requires_grad


def test_weight_without_balance_is_unchanged_and_other_values_raise():
    x = torch.randn(4, 3, requires_grad=True)
    assert extra_loss_weight(0.3, False, x, x.sum(), x.sum()) == 0.3
    with pytest.raises(BadInput, match="balance: 'atuo' must be false, true or auto. Did you mean 'auto'"):
        extra_loss_weight(0.3, "atuo", x, x.sum(), x.sum())


def test_the_automatic_step_of_the_penalty_is_right_in_float32_and_bfloat16():
    """The penalty that training computes against the exact one in float32; 0.01 under bfloat16 is 1.4 times too large."""
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))
    x, noise = torch.randn(4096, 64), torch.randn(4096, 64)
    real = x.clone().requires_grad_()
    exact = r1(head(real), real).item()

    def penalty(step, bf16):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            whole, bare = (penalised_discriminator_loss(head, x, x, noise, p, step).double() for p in (1e3, 0.0))
        return (whole - bare).item() / 1e3 / exact

    assert penalty("auto", False) == pytest.approx(1, abs=0.03)
    assert penalty("auto", True) == pytest.approx(1, abs=0.06)
    assert penalty(0.01, True) > 1.3
    for step in ("exact", 0.0, -0.1):
        with pytest.raises(BadInput, match="r1_step"):
            check_r1_step(step)
