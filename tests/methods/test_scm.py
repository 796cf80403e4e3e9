"""sCM: g vanishes at the exact consistency function, whatever the student's schedule; forward against difference."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from distill.denoise import Denoiser, Gaussian
from distill.errors import BadInput
from distill.methods import scm
from distill.methods.scm import SCM
from distill.models.small import MLP, Transformer
from distill.noise import RectifiedFlow, TrigFlow, VPCosine, VPLinear, bcast

F64, STD = torch.float64, 0.5
SCHEDULES = [TrigFlow(), TrigFlow(0.7), RectifiedFlow(), VPCosine(), VPLinear()]


class Exact(nn.Module):
    """v of the consistency function m + s / v_t (x_t - alpha_t m) of N(m, s^2), m = null + w shift; x grows by gain."""

    shape = (2,)

    def __init__(self, schedule, null=0.0, shift=0.0, guided=False):
        super().__init__()
        self.schedule, self.null_mean, self.shift, self.guided = schedule, null, shift, guided
        self.gain = nn.Parameter(torch.ones(1, dtype=F64))

    def forward(self, x, t, label=None, w=None):
        mean = bcast(self.null_mean + self.shift * (torch.ones_like(t) if w is None else w), x)
        alpha, sigma = self.schedule.at(t, x)
        f = mean + STD / ((alpha * STD) ** 2 + sigma**2).sqrt() * (x - alpha * mean)
        f = f * (1 + sigma * (self.gain - 1))
        return alpha * (x - alpha * f) / sigma - sigma * f


class TwoClasses(Denoiser):
    """N(1, STD^2) under a label, N(-0.5, STD^2) without."""

    def __init__(self, schedule):
        super().__init__(None, schedule, "x")
        self.with_label, self.without = Gaussian([1.0, 1.0], STD, schedule), Gaussian([-0.5, -0.5], STD, schedule)

    def native(self, x_t, t, label):
        return torch.where(bcast(label < 0, x_t), self.without(x_t, t), self.with_label(x_t, t))


def made(schedule=None, teacher=None, null=0.0, shift=0.0, guided=False, **kw) -> SCM:
    """SCM of an exact student, without warm-up and normalisation."""
    schedule = schedule or TrigFlow()
    roles = {"student": Denoiser(Exact(schedule, null, shift, guided), schedule, "v")}
    roles |= {"teacher": teacher} if teacher is not None else {}
    return SCM(roles, **({"warm_up": 0, "c": None, "mean": 0.0} | kw))


def tangents(method, monkeypatch, n=200, x=None, z=None, cond=None):
    """(g, theta, loss) of one call."""
    seen, inner = [], scm.tangent

    def spy(F, dF, x, dx, theta, sd, r):
        seen.append((inner(F, dF, x, dx, theta, sd, r), theta))
        return seen[0][0]

    with monkeypatch.context() as patch:
        patch.setattr(scm, "tangent", spy)
        torch.manual_seed(0)
        noise = torch.randn(2, n, 2, dtype=F64)
        loss = method.loss(STD * noise[0] if x is None else x, noise[1] if z is None else z, cond or {})
    return *seen[0], loss


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("sigma_data", [1.0, 0.5])
def test_the_tangent_vanishes_at_the_flow_map(schedule, sigma_data, monkeypatch):
    teacher = Gaussian([0.0, 0.0], STD, RectifiedFlow())
    method = made(schedule, teacher, sigma_data=sigma_data)
    g, _, loss = tangents(method, monkeypatch)
    assert g.abs().max() < 1e-9
    with torch.no_grad():
        method.student.net.gain += 0.01
    g, _, loss = tangents(method, monkeypatch)
    assert g.abs().max() > 1e-3
    assert torch.autograd.grad(loss, method.student.net.gain)[0] > 0, "points back"


@pytest.mark.parametrize("how", ["forward", "difference"])
def test_guidance_is_mean_extrapolation(how, monkeypatch):
    """A guided teacher's own direction is followed, by the difference too: at the optimum g = 0 for each sample."""
    cond = {"label": torch.zeros(200, dtype=torch.long)}
    right = made(RectifiedFlow(), TwoClasses(RectifiedFlow()), -0.5, 1.5, guidance=3.0, guided=True, jvp=how)
    off_by_one = made(RectifiedFlow(), TwoClasses(RectifiedFlow()), 1.0, 1.5, guidance=3.0, guided=True, jvp=how)
    assert tangents(right, monkeypatch, cond=cond)[0].abs().max() < 1e-6
    assert tangents(off_by_one, monkeypatch, cond=cond)[0].abs().max() > 1e-2


@pytest.mark.parametrize("schedule", [TrigFlow(), RectifiedFlow()])
@pytest.mark.parametrize("teacher", [True, False])
def test_forward_and_difference_agree(schedule, teacher, monkeypatch):
    torch.manual_seed(0)
    roles = {"student": Denoiser(MLP(dim=2, width=32), schedule, "v" if schedule == TrigFlow() else "flow").double()}
    roles |= {"teacher": Gaussian([0.2, -0.3], STD, schedule)} if teacher else {}
    g = [tangents(SCM(roles, warm_up=0, c=None, jvp=how), monkeypatch)[0] for how in ("forward", "difference")]
    torch.testing.assert_close(*g, rtol=1e-5, atol=1e-5)


def test_the_mean_tangent_of_training_is_that_of_distillation(monkeypatch):
    """Given x_theta the two posterior points D +- std have the mean D, and g is linear in the velocity."""
    n, schedule = 50, TrigFlow()
    student = Denoiser(MLP(dim=2, width=32), schedule, "v").double()
    teacher = Gaussian([0.0, 0.0], STD, schedule)
    sct = SCM({"student": student}, warm_up=0, c=None)
    scd = SCM({"student": student, "teacher": teacher}, warm_up=0, c=None)
    theta = torch.rand(n, dtype=F64) * 1.4 + 0.05
    t, x_t = theta / (math.pi / 2), torch.randn(n, 2, dtype=F64)
    var = STD**2 * theta.sin() ** 2 / ((theta.cos() * STD) ** 2 + theta.sin() ** 2)
    found = []
    for sign in (-1, 1):
        x = teacher(x_t, t) + sign * bcast(var.sqrt(), x_t)
        z = (x_t - bcast(theta.cos(), x) * x) / bcast(theta.sin(), x)
        for method in (sct, scd):
            method.density = lambda n, device, dtype: t
            found.append(tangents(method, monkeypatch, n, x, z)[0])
    torch.testing.assert_close((found[0] + found[2]) / 2, found[1], rtol=1e-9, atol=1e-9)
    assert (found[0] - found[1]).abs().max() > 0.1


def test_the_tangent_stays_bounded_at_pure_noise(monkeypatch):
    method = SCM({"student": Denoiser(MLP(dim=2, width=32), TrigFlow(), "v").double()}, warm_up=0, c=None)
    method.density = lambda n, device, dtype: torch.linspace(0.9, 1, n, dtype=dtype)
    g, theta, _ = tangents(method, monkeypatch)
    assert theta.max() < math.pi / 2 and g.abs().max() < 10


def test_warm_up_starts_at_the_teacher(monkeypatch):
    """With r = 0 a student that answers as the teacher has g = 0."""
    teacher = Gaussian([0.2, 0.1], STD, TrigFlow())

    class Same(nn.Module):
        shape = (2,)

        def __init__(self):
            super().__init__()
            self.off = nn.Parameter(torch.zeros(1, dtype=F64))

        def forward(self, x, t):
            alpha, sigma = TrigFlow().at(t, x)
            return (alpha * x - teacher(x, t)) / sigma + self.off

    method = SCM({"teacher": teacher, "student": Denoiser(Same(), TrigFlow(), "v")}, warm_up=10, c=None)
    sizes = []
    for step in (0, 5, 10, 20):
        method.step = step
        sizes.append(tangents(method, monkeypatch)[0].abs().max().item())
    assert sizes[0] < 1e-9 < sizes[1] < sizes[2] == sizes[3]


def test_who_gets_gradient():
    method = SCM({"student": Denoiser(MLP(dim=2, width=8), TrigFlow(), "v")})
    shared = method.draw(torch.randn(8, 2), torch.randn(8, 2), {})
    loss = method.loss(*shared)
    loss.backward()
    assert all(p.grad is not None for p in method.student.parameters())
    assert all(p.grad is None for p in method.balance.parameters())
    _, turn = list(method.turns(0))[1]
    turn(*shared).backward()
    assert any(p.grad.abs().sum() > 0 for p in method.balance.parameters())


def test_dropout_is_shared_by_output_and_derivative(monkeypatch):
    class Drop(nn.Module):
        shape, scale = (2,), None

        def __init__(self):
            super().__init__()
            self.drop, self.gain = nn.Dropout(0.5), nn.Parameter(torch.ones(1, dtype=F64))

        def forward(self, x, t):
            return self.drop(self.gain * x)

    for how in ("forward", "difference"):
        method = SCM({"student": Denoiser(Drop(), TrigFlow(), "v")}, jvp=how).train()
        masks = []
        method.student.net.drop.register_forward_hook(
            lambda drop, args, out: masks.append(torch.func.jvp(lambda x: x, (out,), (out,))[0] != 0)  # noqa: B023
        )
        method.loss(torch.randn(64, 2, dtype=F64), torch.randn(64, 2, dtype=F64), {})
        assert len(masks) >= 2 and all(torch.equal(mask, masks[0]) for mask in masks)


def test_the_tangent_does_not_follow_the_wiggle_of_integer_timesteps(monkeypatch):
    """At the flow map plus A sin(1000 t) in the network, g / (cos sin) is of the order A / h, not 1000 A."""
    schedule, size, rms = TrigFlow(), 1e-3, {}
    for how in (None, "forward"):
        method = made(schedule, Gaussian([0.0, 0.0], STD, schedule), jvp=how)
        net = method.student.net
        exact = net.forward
        net.timesteps = 1000
        net.forward = lambda x, t, exact=exact: exact(x, t) + size * (1000 * t).sin()[:, None]
        method = SCM({"student": method.student, "teacher": method.teacher}, warm_up=0, c=None, mean=0.0, jvp=how)
        g, theta, _ = tangents(method, monkeypatch)
        assert method.jvp == (how or "difference")
        rms[how] = (g / (theta.cos() * theta.sin())[:, None]).square().mean().sqrt()
    assert rms[None] < 0.05 and rms["forward"] > 0.3


def test_the_student_is_evaluated_within_its_range_of_times_only():
    """t - h to t + h with h = 0.04, cut at t / 2 and just below 1, where F is singular."""
    seen, h = [], 0.04
    method = made(TrigFlow(), Gaussian([0.0, 0.0], STD, TrigFlow()))
    net = method.student.net
    net.timesteps, exact = 1000, net.forward
    net.forward = lambda x, t: seen.append(t) or exact(x, t)
    method = SCM({"student": method.student, "teacher": method.teacher})
    method.density = lambda n, device, dtype: torch.linspace(0.01, 1, n, dtype=dtype)
    method.loss(torch.randn(50, 2, dtype=F64), torch.randn(50, 2, dtype=F64), {})
    t, ahead, back = seen[0], seen[-2], seen[-1]
    torch.testing.assert_close(ahead, (t + h).clamp_max(1 - 1e-4))
    torch.testing.assert_close(back, torch.maximum(t - h, t / 2))


def test_a_backbone_without_derivative_is_one_clear_sentence():
    class Round(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

    class Fused(MLP):
        def forward(self, x, t, **cond):
            return Round.apply(super().forward(x, t, **cond))

    roles = {"student": Denoiser(Fused(dim=2, width=8), TrigFlow(), "v")}
    with pytest.raises(BadInput, match="jvp: difference"):
        SCM(roles).loss(torch.randn(4, 2), torch.randn(4, 2), {})
    assert torch.isfinite(SCM(roles, jvp="difference").loss(torch.randn(4, 2), torch.randn(4, 2), {}))


def test_a_student_without_the_boundary_is_refused():
    """Twice the flow map has g = 0 too: only f(x, 0) = x tells them apart."""
    with pytest.raises(BadInput, match=r"requires f\(x, 0\) = x, which prediction .x. does not ensure"):
        SCM({"student": Denoiser(MLP(dim=2, width=8), TrigFlow(), "x")})


def test_images():
    student = Denoiser(Transformer(size=4, width=16, depth=1, heads=2), TrigFlow(), "v")
    loss = SCM({"student": student}).loss(torch.randn(4, 1, 4, 4), torch.randn(4, 1, 4, 4), {})
    assert torch.isfinite(loss)
