"""Distillation-DPO: its gradient exists, its closed form on order statistics, ranking only, who gets gradient."""

import math
from functools import partial

import pytest
import torch
from affine import Affine, in_turn, of_gaussian, pull, touched

from distill.denoise import Denoiser
from distill.methods import DistillationDPO, dpo
from distill.metrics.rewards import Near
from distill.models.small import MLP
from distill.noise import VE, RectifiedFlow
from distill.times import Uniform

D = torch.float64


class Order(Denoiser):
    """Exact E[x | x_u] of the larger (+1) or smaller (-1) of two draws of N(m, 1), under a VE schedule.

    p(x) = 2 phi(x - m) Phi(+-(x - m)) is skew normal; with y = x_u - m, k = 1/(1+sigma^2) and v^2 = k sigma^2 the
    posterior mean is m + k y +- (k sigma^2 / c) phi(ky/c) / Phi(+-ky/c), c^2 = 1 + v^2.
    """

    def __init__(self, mean, sign, schedule):
        super().__init__(None, schedule, "x")
        self.mean, self.sign = mean, sign

    def forward(self, x_u, u, **cond):
        sigma2 = self.schedule.sigma(u)[:, None] ** 2
        y, k = x_u - self.mean, 1 / (1 + sigma2)
        c = (1 + k * sigma2).sqrt()
        a = k * y / c
        hazard = torch.exp(-0.5 * a**2) / math.sqrt(2 * math.pi) / torch.special.ndtr(self.sign * a)
        return self.mean + k * y + self.sign * k * sigma2 / c * hazard


def exact(mean, **options):
    """Student N(mean, 1), teacher N(0, 1), metric x itself, exact critics of winners and losers."""
    schedule = VE(sigma_max=2.0, rho=1.0)
    student = Affine(mean, 1.0 / schedule.noise_scale, schedule=schedule)
    roles = {"teacher": of_gaussian(0, 1, schedule=schedule), "student": student}
    roles |= {"winner": Order(mean, 1, schedule), "loser": Order(mean, -1, schedule)}
    return DistillationDPO(roles, metric=lambda x, **_: x[:, 0], density=Uniform(0.45, 0.45 + 1e-9), **options)


def test_the_order_statistics_critic_is_exact():
    """E[W(x_w,u)] = E[x_w] = 1/sqrt(pi), and regression of x_w on W has slope one."""
    torch.manual_seed(0)
    schedule = VE(sigma_max=2.0, rho=1.0)
    x = torch.randn(200_000, 2, dtype=D).amax(1, keepdim=True)
    u = torch.full((200_000,), 0.45, dtype=D)
    w = Order(0.0, 1, schedule)(schedule.add_noise(x, u, torch.randn_like(x)), u)
    assert w.mean().item() == pytest.approx(1 / math.sqrt(math.pi), abs=0.006)
    assert (((x - x.mean()) * (w - w.mean())).mean() / w.var()).item() == pytest.approx(1.0, abs=0.02)


@pytest.fixture
def plain(monkeypatch):
    """In one dimension the mean of the normaliser 1 / |x - D| is infinite: leave it out where means are compared."""
    monkeypatch.setattr(dpo, "matching", partial(dpo.matching, normalise="none"))


def loss(method, n=40_000):
    torch.manual_seed(0)
    return method.student_loss(*method.draw(None, torch.randn(n, 1, dtype=D), {}))


def test_the_papers_form_has_a_gradient_and_lowers_the_reward_of_a_student_equal_to_its_teacher(plain):
    """W - D > 0 on winners drags them back, D - L > 0 on losers pushes them away: both downwards (r = x)."""
    method = exact(0.0)
    m, _ = pull(method, lambda: loss(method))
    k = 1 / (1 + 0.9**2)  # E(W - D) - E(L - D) = (1 - k) 2 / sqrt(pi)
    assert m == pytest.approx((1 - k) * 2 / math.sqrt(math.pi), abs=0.02), "descent on m moves the mean down"


def test_the_derived_form_raises_the_reward_and_keeps_to_the_teacher_without_it(plain):
    method = exact(0.0, loser=1.0, prefer=0.5)
    assert pull(method, lambda: loss(method))[0] < -0.3
    method = exact(0.0, loser=1.0, prefer=0.0)
    assert abs(pull(method, lambda: loss(method))[0]) < 0.02, "nothing to prefer: stationary at the teacher"
    method = exact(0.5, loser=1.0, prefer=0.0)
    assert pull(method, lambda: loss(method))[0] > 0.05, "and pulled back to it"


def test_equal_critics_and_equal_samples_cancel_in_the_papers_form():
    roles = {"teacher": of_gaussian(0, 1), "student": Affine(0.4, 0.8)}
    critic = of_gaussian(0.4, 0.8)
    method = DistillationDPO(roles | {"winner": critic, "loser": critic}, metric=lambda x, **_: x[:, 0], spread=1.0)
    assert pull(method, lambda: loss(method, 2000)) == pytest.approx((0.0, 0.0), abs=1e-15)


def small(**options):
    roles = {}
    for role in ("teacher", "student", "winner", "loser"):
        roles[role] = Denoiser(MLP(2, 16, 2), RectifiedFlow()).double()
        torch.nn.init.normal_(roles[role].net.leave.weight)
    return DistillationDPO(roles, **({"metric": Near([1.0, 0.0])} | options)).double()


def test_the_gradient_in_a_winner_is_the_difference_of_the_frozen_scores():
    """The released loss multiplies it by x_t - x, from which x cancels: its gradient is exactly zero."""
    method = small()
    x = torch.randn(8, 2, dtype=D, requires_grad=True)
    u, noise = torch.full((8,), 0.5, dtype=D), torch.randn(8, 2, dtype=D)
    method.pull(x, method.winner, u, noise, {}, 1.0).backward()
    with torch.no_grad():
        x_u = method.schedule.add_noise(x, u, noise)
        real, fake = method.teacher(x_u, u), method.winner(x_u, u)
        expected = (fake - real) / (x - real).abs().mean(1, keepdim=True) / x.numel()
    assert torch.allclose(x.grad, expected, atol=1e-14) and x.grad.norm() > 0


@pytest.mark.parametrize("options", [{}, {"prefer": 0.5, "loser": 1.0}, {"grid": 3, "spread": 1.1}])
def test_each_turn_reaches_its_own_role_alone(options):
    method = small(**options)
    shared = method.draw(torch.randn(8, 2, dtype=D), torch.randn(8, 2, dtype=D), {})
    for role, call in method.turns(0):
        in_turn(method, role)
        call(*shared).backward()
        assert touched(method) == {role}


def test_pairs_share_their_condition_and_their_step_and_are_ranked():
    closeness = lambda x, data, **_: -(x - data).norm(dim=1)
    method = small(grid=3, metric=closeness)
    data, z = torch.randn(64, 2, dtype=D), torch.randn(64, 2, dtype=D)
    seen = {}
    inner = method.student.forward
    method.student.forward = lambda x, t, **cond: (seen.update(cond, t=t), inner(x, t))[1]
    (w, l), _, again = method.draw(data, z, {"label": torch.arange(64)})
    assert (closeness(w, data) >= closeness(l, data)).all() and (w != l).any()
    assert torch.equal(seen["label"], torch.arange(64).repeat(2)) and len(seen["t"].unique()) == 1
    assert all(torch.equal(a, b) for a, b in zip(again(), (w, l)))


def test_rewards_by_hand():
    x = torch.tensor([[0.0, 0.12], [3.0, 4.0]])
    assert Near([0.0, 0.0])(x).tolist() == pytest.approx([-0.15, -5.0])
    assert Near([0.0, 0.0], grain=0)(x).tolist() == pytest.approx([-0.12, -5.0])
