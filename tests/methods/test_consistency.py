"""Consistency distillation against its closed-form optima: an affine student on Gaussian data has an exact answer."""

from __future__ import annotations

import pytest
import torch
from slopes import F64, STD, Affine, batch, fixed_point, karras
from torch import nn

from distill.denoise import Denoiser, Gaussian
from distill.errors import BadInput
from distill.methods import consistency
from distill.methods.consistency import Consistency
from distill.models.small import MLP
from distill.noise import VE, RectifiedFlow, TrigFlow, VPCosine, bcast
from distill.solvers import DDIM


class TwoClasses(Denoiser):
    """N(1, STD^2) under a label, N(-0.5, STD^2) without: guidance w gives N(-0.5 + 1.5 w, STD^2)."""

    def __init__(self, schedule):
        super().__init__(None, schedule, "x")
        self.with_label, self.without = Gaussian([1.0], STD, schedule), Gaussian([-0.5], STD, schedule)

    def native(self, x_t, t, label):
        return torch.where(bcast(label < 0, x_t), self.without(x_t, t), self.with_label(x_t, t))


def method_of(times, slopes, teacher, null=0.0, shift=0.0, **kw):
    net = Affine(sorted(times), slopes, null, shift)
    net.alpha = teacher.schedule.alpha
    kw = {"target_ema": 0.0, "intervals": list(times)} | kw
    return Consistency({"teacher": teacher, "student": Denoiser(net, teacher.schedule, "x")}, **kw)


@pytest.mark.parametrize(
    "solver, n, expected",
    [
        ("ddim", 10, 0.36522),
        ("ddim", 18, 0.42304),
        ("ddim", 40, 0.46486),
        ("ddim", 80, 0.48233),
        ("heun", 10, 0.60981),
        ("heun", 18, 0.52763),
        ("heun", 40, 0.50488),
        ("heun", 80, 0.50115),
    ],
)
def test_the_fixed_point_in_the_edm_chart(solver, n, expected):
    """80 a(80) for std 0.5, sigma in [0.002, 80], rho 7; the exact flow map has 0.49999."""
    times = karras(n)
    method = method_of(times, torch.ones(n), Gaussian([0.0], STD, VE(80.0, 7.0)), solver=solver)
    assert len(method.times) == n
    slopes = fixed_point(method, *batch(10 * n))
    assert abs(80 * slopes[-1].item() - expected) < 1e-4
    assert method.loss(*batch(4000), {}).item() < 1e-20, "CD's optimum is exact, not only in the mean"


def ddim_slopes(times, schedule):
    """Slopes of the DDIM map from each time (ascending) to the first, on centred Gaussian data."""
    teacher, slopes = Gaussian([0.0], STD, schedule), [1.0]
    for s, t in zip(times, times[1:]):
        t, s, x = *torch.tensor([[t], [s]], dtype=F64), torch.ones(1, 1, dtype=F64)
        slopes.append(slopes[-1] * DDIM()(teacher, x, t, s).item())
    return torch.tensor(slopes, dtype=F64)


@pytest.mark.parametrize("schedule", [RectifiedFlow(), VPCosine(), TrigFlow()])
def test_guidance_is_mean_extrapolation_and_w_reaches_the_student(schedule):
    times = [j / 12 for j in range(12, -1, -1)]
    slopes = ddim_slopes(times[::-1], schedule)
    cond = {"label": torch.zeros(500, dtype=torch.long)}
    kw = dict(guidance_range=[0.0, 5.0], intervals=12)
    right = method_of(times, slopes, TwoClasses(schedule), -0.5, 1.5, **kw)
    off_by_one = method_of(times, slopes, TwoClasses(schedule), 1.0, 1.5, **kw)  # took w for w + 1
    deaf = method_of(times, slopes, TwoClasses(schedule), -0.5, 1.5, **kw)
    deaf.student.net.guided = False  # is not told w, so answers as if it were 1
    x, z = batch(500)
    assert right.loss(x, z, cond).item() < 1e-12
    assert off_by_one.loss(x, z, cond).item() > 1e-3
    assert deaf.loss(x, z, cond).item() > 1e-2


def test_the_gradient_points_back_after_a_perturbation():
    times, schedule = [j / 8 for j in range(8, -1, -1)], RectifiedFlow()
    exact = ddim_slopes(times[::-1], schedule)
    for sign in (-1, 1):
        method = method_of(times, exact, Gaussian([0.0], STD, schedule))
        with torch.no_grad():
            method.student.net.slopes[1:] += sign * 0.1  # the target stays at the optimum
        grad = torch.autograd.grad(method.loss(*batch(2000), {}), method.student.net.slopes)[0]
        assert (grad[1:] * sign > 0).all()


def small(**kw):
    teacher = Gaussian([0.2, -0.1], STD, RectifiedFlow())
    student = Denoiser(MLP(dim=2, width=16, depth=1), RectifiedFlow())
    return Consistency({"teacher": teacher, "student": student}, **kw)


def captured(method, monkeypatch, n=64, name="mse"):
    """(online, target) as the loss sees them, and the loss."""
    seen = []
    inner = getattr(consistency, name)
    monkeypatch.setattr(consistency, name, lambda a, b, *rest: seen.append((a, b)) or inner(a, b, *rest))
    torch.manual_seed(0)
    shape = (n, *method.shape)
    loss = method.loss(torch.randn(shape), torch.randn(shape), {})
    return *seen[0], loss


@pytest.mark.parametrize("decay", [0.0, 0.95])
def test_the_target_has_no_graph_and_its_network_no_gradient(decay, monkeypatch):
    method = small(target_ema=decay, intervals=4)
    y, target, loss = captured(method, monkeypatch)
    loss.backward()
    assert y.grad_fn is not None and target.grad_fn is None and not target.requires_grad
    assert all(p.grad is None and not p.requires_grad for p in method.target.parameters())
    assert all(p.grad is not None for p in method.student.parameters())


@pytest.mark.parametrize("prediction", ["eps", "v", "flow", "edm"])
@pytest.mark.parametrize("schedule", [RectifiedFlow(), VPCosine(), VE()])
def test_at_time_zero_the_student_is_the_identity(schedule, prediction):
    if prediction == "eps" and schedule.zero_terminal_snr:
        pytest.skip("refused by Denoiser")
    student, x = Denoiser(MLP(dim=2, width=8), schedule, prediction).double(), torch.randn(6, 2, dtype=F64)
    torch.testing.assert_close(student(x, torch.zeros(6, dtype=F64)), x, rtol=0, atol=1e-15)


def test_the_first_interval_ends_at_the_solver_and_not_at_the_target(monkeypatch):
    method = small(intervals=1)
    for p in method.target.parameters():
        nn.init.constant_(p, 3.0)
    y, target, _ = captured(method, monkeypatch)
    torch.manual_seed(0)
    _, z = torch.randn(2, 64, 2)
    t = torch.ones(64)
    torch.testing.assert_close(target, method.teacher(z, t))  # x_1 = z, and one step down to 0 lands on D


class Masks(nn.Module):
    """Answers with its own dropout mask, so that two branches agree if and only if they drop the same units."""

    shape = (32,)

    def __init__(self):
        super().__init__()
        self.drop, self.scale = nn.Dropout(0.5), nn.Parameter(torch.ones(1))

    def forward(self, x, t, **cond):
        return self.drop(self.scale * torch.ones_like(x))


@pytest.mark.parametrize("decay", [0.0, 0.95])
def test_both_branches_drop_the_same_units(decay, monkeypatch):
    teacher = Gaussian(torch.zeros(32), STD, RectifiedFlow())
    roles = {"teacher": teacher, "student": Denoiser(Masks(), RectifiedFlow(), "x")}
    method = Consistency(roles, intervals=10_000, target_ema=decay)
    for mode in (True, False):
        method.train(mode)
        y, target, _ = captured(method, monkeypatch)
        assert torch.equal(y, target)
        assert mode == bool((y == 0).any()), "the target follows the student's mode"


def test_huber_is_the_per_element_one(monkeypatch):
    method = small(huber=1e-3)
    y, target, loss = captured(method, monkeypatch, name="huber")
    torch.testing.assert_close(loss, (((y - target).square() + 1e-6).sqrt() - 1e-3).mean())


@pytest.mark.parametrize("intervals", [0, [1.0], [0.2, 1.0], [1.5, 0.0], [1.0, 1.0, 0.0]])
def test_times_that_do_not_decrease_are_refused(intervals):
    with pytest.raises(BadInput, match="method.intervals"):
        small(intervals=intervals)
