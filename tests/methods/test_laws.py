"""Laws of what methods draw and weights of their losses, asserted directly.

Ranges do not start at 0, samples have more than one dimension, and data have the standard deviation 0.5.
"""

from __future__ import annotations

import math

import pytest
import torch
from points import D, drawn
from torch import nn

from distill.denoise import Denoiser, Gaussian
from distill.methods import (
    AYF,
    CTM,
    PCM,
    SCM,
    Consistency,
    ConsistencyTraining,
    Guidance,
    MeanFlow,
    Progressive,
    ctm,
    scm,
)
from distill.models.small import MLP
from distill.noise import RectifiedFlow, TrigFlow, bcast
from distill.times import TimePairs

FLOW, STD = RectifiedFlow(), 0.5


def net(dim=2, **traits):
    return Denoiser(MLP(dim, 8, 1, **traits), FLOW)


def teacher(dim=2):
    return Gaussian([0.0] * dim, STD, FLOW)


@pytest.mark.parametrize("low, high", [(6.0, 16.0), (1.5, 1.5)])
@pytest.mark.parametrize("method", [Consistency, PCM, Guidance, Progressive, AYF])
def test_w_is_uniform_between_low_and_high_not_above_low_by_high(method, low, high):
    student = net(guided=True, classes=2, flow_map=method is AYF)
    options = {"teacher_steps": 8} if method is Progressive else {}
    made = method({"teacher": teacher(), "student": student}, guidance_range=[low, high], **options)
    seen = []
    student.net.register_forward_pre_hook(lambda net, args, kw: seen.append(kw["w"]), with_kwargs=True)
    made.loss(torch.randn(4000, 2), torch.randn(4000, 2), {"label": torch.zeros(4000, dtype=torch.long)})
    w = seen[0]
    assert w.shape == (4000,) and low <= w.min() and w.max() <= high + 1e-4
    assert w.mean().item() == pytest.approx((low + high) / 2, abs=0.2)
    assert w.std().item() == pytest.approx((high - low) / math.sqrt(12), abs=0.1)


def test_ctm_draws_the_end_s_from_all_times_up_to_u_itself(monkeypatch):
    """n steps below t_j, s is uniform over t_0, ..., t_(j-n) = u; at s = u the target is the teacher's own step."""
    method = CTM({"teacher": teacher(), "student": net(flow_map=True)}, intervals=4, longest=2, solver="ddim")
    seen, inner = [], ctm.jump
    monkeypatch.setattr(ctm, "jump", lambda net, x, t, s, cond: seen.append((t, s)) or inner(net, x, t, s, cond))
    counts: dict[tuple[int, int, int], int] = {}
    for _ in range(6):
        seen.clear()
        method.jump_loss(*torch.randn(2, 3000, 2), {})
        (t, s), _, (u, _), _ = seen
        for key in torch.stack([t, u, s], 1).mul(4).round().int().tolist():
            counts[tuple(key)] = counts.get(tuple(key), 0) + 1
    for n in {t - u for t, u, _ in counts}:
        assert {t for t, u, _ in counts if t - u == n} == set(range(n, 5)), "every t that has n steps below it"
        for j in range(n, 5):
            of_j = [counts.get((j, j - n, i), 0) for i in range(j - n + 1)]
            assert min(of_j) > 0.7 * sum(of_j) / len(of_j), f"s from t_{j}, u = t_{j - n}: {of_j}"
            assert not any(key[:2] == (j, j - n) and key[2] > j - n for key in counts)


class Pair(TimePairs):
    def __call__(self, n, *rest):
        return torch.full((n,), 0.6, dtype=D), torch.full((n,), 0.3, dtype=D)


@pytest.mark.parametrize("constant", [0.0, 0.3])
@pytest.mark.parametrize("weigh", [True, False])
def test_consistency_training_in_several_dimensions_by_hand(constant, weigh):
    """sqrt(|y - y_r|^2 + (c sqrt(d))^2) - c sqrt(d), over y_t - y_r = .6/.4 - .3/.7."""
    method = ConsistencyTraining({"student": net(4).double()}, pairs=Pair(), huber=constant, weigh=weigh)
    x, z = torch.randn(2, 16, 4, dtype=D)
    t, r = Pair()(16)
    with torch.no_grad():
        away = method.student(0.4 * x + 0.6 * z, t) - method.student(0.7 * x + 0.3 * z, r)
    c = constant * 2  # sqrt(4)
    expected = (away.square().sum(1) + c**2).sqrt().mean() - c
    expected = expected / (0.6 / 0.4 - 0.3 / 0.7) if weigh else expected
    assert method.loss(x, z, {}).item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize(("total", "shares"), [(8, [0, 0.125, 0.5]), (0, [0, 0.5, 0.8])])
def test_consistency_training_draws_its_pairs_by_the_share_of_the_steps_that_is_done(total, shares):
    method, seen = ConsistencyTraining({"student": net()}), []
    inner = method.pairs
    spy = lambda n, schedule, done, *rest: seen.append(done) or inner(n, schedule, done, *rest)
    spy.floor = inner.floor
    method.pairs, method.total_steps = spy, total
    for method.step in (0, 1, 4):
        method.loss(*torch.randn(2, 4, 2), {})
    assert seen == pytest.approx(shares)


# -- sCM with data of standard deviation 0.5 ------------------------------------------------------------------------


def continuous(**options):
    student = Denoiser(MLP(2, 8, 1), TrigFlow(STD), "v").double()
    return SCM({"student": student}, **({"sigma_data": STD, "warm_up": 0, "c": None} | options))


def test_the_velocity_of_the_pair_carries_sigma_data():
    method, theta = continuous(), torch.linspace(0.1, 1.5, 7, dtype=D)
    x, z = torch.randn(2, 7, 2, dtype=D)
    path = lambda theta: bcast(theta.cos(), x) * x + bcast(theta.sin(), x) * STD * z
    x_t, dx = torch.func.jvp(path, (theta,), (torch.ones_like(theta),))
    torch.testing.assert_close(method.velocity(x, z, x_t, theta, {}), dx)


def test_log_sigma_over_alpha_of_the_chart_is_normal():
    """log(sd tan theta) ~ N(mean, std^2), with the method's sd and not 1."""
    method = continuous(mean=-0.7, std=0.3)
    torch.manual_seed(0)
    t = method.density(20_000, dtype=D)
    log = (STD * torch.tan(t * math.pi / 2)).log()
    assert log.mean().item() == pytest.approx(-0.7, abs=0.01) and log.std().item() == pytest.approx(0.3, abs=0.01)


def test_each_sample_weighs_one_over_sd_tan_theta(monkeypatch):
    """What the balance learns from is mean_i g_i^2 / (sd tan theta)."""
    method, seen, left = continuous(), [], {}
    inner = scm.tangent
    monkeypatch.setattr(scm, "tangent", lambda *args: seen.append(inner(*args)) or seen[0])
    loss = method.loss(*torch.randn(2, 16, 2, dtype=D), {}, left)
    expected = seen[0].square().mean(1) / (STD * left["theta"].tan())
    torch.testing.assert_close(left["value"], expected.detach())
    assert loss.item() == pytest.approx(expected.mean().item()), "the balance is 0 at the start"


def test_the_balance_takes_the_time_in_the_unit_interval():
    balance, seen = scm.Balance(), []
    balance.features.register_forward_pre_hook(lambda net, args: seen.append(args[0]))
    assert torch.equal(balance(torch.linspace(0, math.pi / 2, 5)), torch.zeros(5)), "0 at the start"
    torch.testing.assert_close(seen[0], torch.linspace(0, 1, 5))


# -- MeanFlow --------------------------------------------------------------------------------------------------------


class Dropout(nn.Module):
    """Notes in which mode it is asked."""

    flow_map, shape, classes = True, (2,), 2

    def __init__(self):
        super().__init__()
        self.gain, self.asked = nn.Parameter(torch.ones(2)), []

    def forward(self, x, t, s=None, label=None):
        self.asked.append(self.training)
        return self.gain * x


@pytest.mark.parametrize("training", [True, False])
def test_the_guidance_in_the_target_is_evaluated_in_eval_mode_and_the_mode_comes_back(training):
    method = MeanFlow({"student": Denoiser(Dropout(), FLOW)}, guidance=2.0, kappa=0.5).train(training)
    x, t = torch.randn(6, 2), torch.rand(6)
    method.velocity(x, x, t, {"label": torch.zeros(6, dtype=torch.long)}, torch.zeros(6, dtype=torch.bool))
    asked = method.student.net.asked
    assert asked and not any(asked)
    assert method.student.training == method.student.net.training == training


def test_points_repeat_their_last_value():
    """The stand-in for random numbers itself: values in turn, then the last one, and torch's own again afterwards."""
    like = torch.zeros(3)
    with drawn(torch.ones(3), torch.full((3,), 2.0)):
        assert [float(torch.randn_like(like)[0]) for _ in range(3)] == [1.0, 2.0, 2.0]
    assert torch.randn_like(like).unique().numel() == 3
