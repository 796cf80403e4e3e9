"""Discriminator heads: the optimum of their loss is the log ratio of the densities, log p_data - log p_student.

On two atoms any function is affine and the means over a batch are the exact expectations, so the gradient is zero to rounding. On
Gaussians a grid of quantiles stands for both laws.
"""

from __future__ import annotations

import math

import pytest
import torch
from affine import Affine, Labelled, of_gaussian
from points import D, at, drawn
from torch import nn

from distill.losses.adversarial import discriminator_loss, penalised_discriminator_loss
from distill.methods import DMD2, LADD
from distill.noise import VE, RectifiedFlow

N = 20_000
QUANTILES = torch.special.ndtri((torch.arange(N, dtype=D) + 0.5) / N)[:, None]


class Quadratic(nn.Module):
    """l(y) = a + b y + c y^2."""

    def __init__(self, coefficients):
        super().__init__()
        self.coefficients = nn.Parameter(torch.tensor(coefficients, dtype=D))

    def forward(self, y):
        a, b, c = self.coefficients
        return (a + b * y + c * y**2)[:, 0]


def log_ratio(mean_p, std_p, mean_q, std_q) -> list[float]:
    """Coefficients of log N(mean_p, std_p^2) - log N(mean_q, std_q^2)."""
    p, q = (
        (-(m**2) / (2 * s**2) - math.log(s), m / s**2, -1 / (2 * s**2)) for m, s in ((mean_p, std_p), (mean_q, std_q))
    )
    return [a - b for a, b in zip(p, q)]


def dmd2(student, schedule, u, **options):
    roles = {"teacher": of_gaussian(0, 1, schedule=schedule), "critic": of_gaussian(0, 1, schedule=schedule)}
    return DMD2(
        roles | {"student": student, "head": nn.Linear(1, 1)}, grid=1, adversarial=1.0, density=at(u), **options
    )


def ladd(student, schedule, u, **options):
    roles = {"teacher": of_gaussian(0, 1, schedule=schedule), "features": of_gaussian(0, 1, schedule=schedule)}
    return LADD(roles | {"student": student, "head": nn.Linear(1, 1)}, grid=1, density=at(u), **options)


def slope(method, head, data, z, noise) -> torch.Tensor:
    """d head loss / d coefficients."""
    method.logit = lambda y, u, cond, step=None: head(y)
    with drawn(noise):
        return torch.autograd.grad(method.head_loss(*method.draw(data, z, {})), head.coefficients)[0]


@pytest.mark.parametrize("make", [dmd2, ladd])
def test_on_two_atoms_the_optimum_is_the_log_ratio_exactly(make):
    """Data 3 : 1 and samples 1 : 4 on +1 and -1, as they are (u = 0): l(+1) = log(.75/.2), l(-1) = log(.25/.8)."""
    data = torch.tensor([1.0] * 15 + [-1.0] * 5, dtype=D)[:, None]
    z = torch.tensor([1.0] * 4 + [-1.0] * 16, dtype=D)[:, None]
    up, down = math.log(0.75 / 0.2), math.log(0.25 / 0.8)
    right = [(up + down) / 2, (up - down) / 2, 0.0]
    method = make(Affine(0.0, 1.0), RectifiedFlow(), 0.0)
    assert slope(method, Quadratic(right), data, z, torch.zeros_like(z)).abs().max() < 1e-15
    for k in (0, 1):
        for step in (0.2, -0.2):
            off = list(right)
            off[k] += step
            assert slope(method, Quadratic(off), data, z, torch.zeros_like(z))[k] * step > 0
    swapped = [-a for a in right]
    assert slope(method, Quadratic(swapped), data, z, torch.zeros_like(z)).abs().max() > 0.1


@pytest.mark.parametrize("make", [dmd2, ladd])
@pytest.mark.parametrize("schedule", [RectifiedFlow(), VE(10.0, 1.0)], ids=lambda s: type(s).__name__)
def test_on_gaussians_both_are_noised_to_the_same_level(make, schedule):
    """With the noise left out x_u = alpha_u x: the ratio of N(alpha m, alpha^2 s^2) of data and of samples."""
    u = 0.4
    alpha = schedule.alpha(torch.tensor(u, dtype=D)).item()
    student = Affine(0.5, 0.8 / schedule.noise_scale, schedule=schedule)
    student.forward = lambda x_t, t, **cond: 0.5 + 0.8 * QUANTILES  # whatever noise it starts from
    right = log_ratio(alpha * 0.2, alpha * 1.1, alpha * 0.5, alpha * 0.8)
    method = make(student, schedule, u)
    data = 0.2 + 1.1 * QUANTILES
    away = slope(method, Quadratic([0.0, 0.0, 0.0]), data, QUANTILES, torch.zeros_like(QUANTILES)).abs().max()
    assert (
        slope(method, Quadratic(right), data, QUANTILES, torch.zeros_like(QUANTILES)).abs().max() < 2e-4 < 0.02 < away
    )


@pytest.mark.parametrize("make", [dmd2, ladd])
def test_data_and_samples_have_their_own_noise_and_one_time(make):
    seen = []
    method = make(Affine(0.5, 0.8), RectifiedFlow(), 0.25)
    method.logit = lambda y, u, cond, step=None: seen.append((y, u)) or y[:, 0]
    data, z, first, second = torch.randn(4, 6, 1, dtype=D)
    with drawn(first, second, torch.zeros_like(z)):
        method.head_loss(*method.draw(data, z, {}))
    (real, u), (fake, again) = seen
    torch.testing.assert_close(fake, 0.75 * (0.5 + 0.8 * z) + 0.25 * first)
    torch.testing.assert_close(real, 0.75 * data + 0.25 * second)
    assert torch.equal(u, again) and (u == 0.25).all()


@pytest.mark.parametrize("make", [dmd2, ladd])
@pytest.mark.parametrize("step", [None, 0.1])
def test_the_penalty_is_added_at_the_data(make, step):
    """l = 3 y: R1 is 4.5 at any point, exact and by a finite step with noise of variance one."""
    method = make(Affine(0.5, 0.8), RectifiedFlow(), 0.25, r1=2.0, r1_step=step)
    plain = make(Affine(0.5, 0.8), RectifiedFlow(), 0.25)
    values = []
    for each in (method, plain):
        each.logit = lambda y, u, cond, step=None: 3 * y[:, 0]
        with drawn(torch.tensor([[1.0], [-1.0]], dtype=D)):
            values.append(each.head_loss(*each.draw(torch.zeros(2, 1, dtype=D), torch.ones(2, 1, dtype=D), {})).item())
    assert values[0] - values[1] == pytest.approx(2.0 * 4.5)


def test_the_critic_adds_the_heads_loss_with_its_weight_and_sign():
    method = dmd2(Affine(0.5, 0.8), RectifiedFlow(), 0.25, critic_adversarial=0.3, layers="none")
    method.head_loss = lambda *shared: torch.tensor(7.0, dtype=D)
    values = []
    for weight in (0.3, 0.0):
        method.critic_adversarial = weight
        with drawn(torch.tensor([[1.0], [-1.0]], dtype=D)):
            values.append(method.critic_loss(*method.draw(None, torch.ones(2, 1, dtype=D), {})).item())
    assert values[0] - values[1] == pytest.approx(0.3 * 7.0)
    other = dmd2(Affine(0.5, 0.8), RectifiedFlow(), 0.25, critic_adversarial=0.3, features="teacher")
    assert other.critic_adversarial == 0.0, "a head on the teacher's features says nothing to the critic"


@pytest.mark.parametrize("make, form", [(dmd2, "softplus"), (ladd, "softplus"), (ladd, "hinge")])
def test_the_student_climbs_the_logit(make, form):
    """d/dm of the student's loss is -sigmoid(-l) alpha dl/dy, or -alpha dl/dy by the hinge form."""
    options = {} if form == "softplus" else {"form": form}
    method = make(Affine(0.5, 0.8), RectifiedFlow(), 0.25, **options)
    method.critic = method.teacher  # matching is silent
    method.logit = lambda y, u, cond, step=None: 3 * y[:, 0]
    z, noise = torch.randn(2, 6, 1, dtype=D)
    with drawn(noise):
        loss = method.student_loss(*method.draw(torch.zeros_like(z), z, {}))
    (found,) = torch.autograd.grad(loss, method.student.m)
    y = 0.75 * (0.5 + 0.8 * z) + 0.25 * noise
    push = torch.sigmoid(-3 * y) if form == "softplus" else torch.ones_like(y)
    assert found.item() == pytest.approx((-push * 0.75 * 3).mean().item(), rel=1e-12)


@pytest.mark.parametrize("schedule", [RectifiedFlow(), VE(10.0, 1.0)], ids=lambda s: type(s).__name__)
def test_ladds_distillation_pulls_to_the_guided_teacher(schedule):
    """d/dx of c alpha_u |x - D_w|^2 is 2 c alpha_u (x - D_w), D_w = .2 + w (.5 - .2) of a narrow teacher at w = 3."""
    teacher = Labelled([0.5], 0.2, 1e-6, schedule)
    student = Affine(0.1, 0.0, schedule=schedule)
    roles = {"teacher": teacher, "features": of_gaussian(0, 1, schedule=schedule), "student": student}
    method = LADD(roles | {"head": nn.Linear(1, 1)}, grid=1, density=at(0.4), distillation=2.5, guidance=3.0)
    method.logit = lambda y, u, cond: torch.zeros(len(y), dtype=D)
    z, cond = torch.randn(8, 1, dtype=D), {"label": torch.zeros(8, dtype=torch.long)}
    loss = method.student_loss(*method.draw(torch.zeros_like(z), z, cond))
    (found,) = torch.autograd.grad(loss, student.m)
    alpha = schedule.alpha(torch.tensor(0.4, dtype=D)).item()
    assert found.item() == pytest.approx(2 * 2.5 * alpha * (0.1 - 1.1), rel=1e-6)


def test_real_and_fake_of_the_penalised_loss_are_the_first_and_the_second():
    real, fake = torch.tensor([[2.0]], dtype=D), torch.tensor([[-1.0]], dtype=D)
    loss = penalised_discriminator_loss(lambda y: y[:, 0], real, fake, torch.zeros_like(real))
    assert loss.item() == pytest.approx(math.log1p(math.exp(-2.0)) + math.log1p(math.exp(-1.0)))
    assert loss == discriminator_loss(real[:, 0], fake[:, 0])
