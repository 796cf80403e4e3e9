"""CTM: the exact flow map has no loss, gradient passes through the frozen target, the gamma-sampler keeps marginals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distill.denoise import Denoiser, Gaussian
from distill.errors import BadInput
from distill.methods import ctm
from distill.methods.ctm import CTM, jump
from distill.models.small import MLP
from distill.noise import VE, RectifiedFlow, TrigFlow, VPCosine, bcast
from distill.solvers import Solver
from distill.solvers.flowmap import GammaSampler

F64, STD = torch.float64, 0.5
SCHEDULES = [VE(), RectifiedFlow(), VPCosine(), TrigFlow()]


class Exact(nn.Module):
    """g*(x_t, t, s): slope (v_s/v_t - s/t)/(1 - s/t) in EDM's chart, the denoiser where s = t; mean null + w shift."""

    flow_map, shape = True, (2,)

    def __init__(self, schedule, mean=0.0):
        super().__init__()
        self.schedule, self.mean, self.off = schedule, mean, nn.Parameter(torch.zeros(1, dtype=F64))

    def forward(self, x, t, s=None, label=None):
        s = t if s is None else s
        (a, sd), (b, sb) = self.schedule.at(t, x), self.schedule.at(s, x)
        v, v_s = ((a * STD) ** 2 + sd**2).sqrt(), ((b * STD) ** 2 + sb**2).sqrt()
        keep = torch.where(sd == 0, 1.0, sb / sd.clamp_min(1e-300))
        pull = b - a * keep
        near = bcast(t - s, x).abs() < 1e-9
        slope = torch.where(near, a * STD**2 / v**2, (v_s / v - keep) / torch.where(near, 1.0, pull))
        return self.mean + slope * (x - a * self.mean) + self.off


class Flow(Solver):
    """The exact step of a Gaussian."""

    def __call__(self, denoiser, x_t, t, s, **cond):
        return denoiser.denoiser.flow_map(x_t, t, s)


def exact(schedule, **kw):
    student = Denoiser(Exact(schedule, 0.3), schedule, "x")
    return CTM({"teacher": Gaussian([0.3, 0.3], STD, schedule), "student": student}, **{"solver": Flow()} | kw)


def draw(n=300):
    torch.manual_seed(0)
    x, z = torch.randn(2, n, 2, dtype=F64)
    return 0.3 + STD * x, z


def test_the_slope_of_the_exact_g():
    """Of methods of this kind the known values, t = 3 in EDM's chart: 0.0514 at s = 1, D's 0.02703 near s = t."""
    schedule = VE(80.0, 7.0)
    net, x = Exact(schedule), torch.ones(1, 2, dtype=F64)
    time = lambda sigma: torch.tensor([(sigma / 80) ** (1 / 7)], dtype=F64)
    assert abs(net(x, time(3.0), time(1.0))[0, 0].item() - 0.0514) < 1e-4
    assert abs(net(x, time(3.0), time(2.999))[0, 0].item() - 0.02703) < 1e-5
    assert abs(net(x, time(3.0), time(3.0))[0, 0].item() - 0.25 / 9.25) < 1e-12


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_jumps_are_the_identity_and_a_semigroup(schedule):
    student = Denoiser(Exact(schedule, 0.3), schedule, "x")
    x, t = torch.randn(20, 2, dtype=F64), torch.linspace(0.3, 1, 20, dtype=F64)
    torch.testing.assert_close(jump(student, x, t, t, {}), x)
    u, s = 0.6 * t, 0.3 * t
    two = jump(student, jump(student, x, t, u, {}), u, s, {})
    torch.testing.assert_close(two, jump(student, x, t, s, {}), rtol=1e-10, atol=1e-12)
    mlp = Denoiser(MLP(dim=2, width=8, flow_map=True), schedule).double()
    torch.testing.assert_close(jump(mlp, x, t, t, {}), x)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_flow_map_has_no_loss_and_a_perturbation_points_back(schedule):
    method = exact(schedule)
    x, z = draw()
    for _ in range(5):
        assert method.jump_loss(x, z, {}).item() < 1e-20
    off = method.student.net.off
    for sign in (-1, 1):
        with torch.no_grad():
            off.fill_(0.05 * sign)  # the target stays exact
        assert torch.autograd.grad(method.jump_loss(x, z, {}), off)[0] * sign > 0


def test_with_few_teacher_steps_the_solver_matters():
    x, z = draw()
    losses = []
    for intervals in (4, 64):
        torch.manual_seed(0)
        losses.append(exact(RectifiedFlow(), solver="heun", intervals=intervals, longest=1).jump_loss(x, z, {}).item())
    assert losses[0] > 1000 * losses[1] > 0


def small(**kw):
    roles = {
        "teacher": Gaussian([0.2, -0.1], STD, RectifiedFlow()),
        "student": Denoiser(MLP(dim=2, width=16, depth=1, flow_map=True), RectifiedFlow()),
    }
    return CTM(roles, **{"intervals": 6} | kw)


def test_gradient_passes_through_the_frozen_target(monkeypatch):
    method, seen, inner = small(), [], ctm.mse
    monkeypatch.setattr(ctm, "mse", lambda a, b: seen.append((a, b)) or inner(a, b))
    x, z = torch.randn(2, 32, 2)
    method.jump_loss(x, z, {}).backward()
    e, target = seen[0]
    assert e.requires_grad and not target.requires_grad
    assert all(p.grad is None and not p.requires_grad for p in method.target.parameters())
    assert sum(p.grad.abs().sum() for p in method.student.parameters() if p.grad is not None) > 0


def test_the_gradient_has_the_slope_of_the_target():
    """A target that triples its input triples e's gradient: under no_grad it would vanish, detached it would be 1."""
    method, inner = small(), ctm.jump
    x_t, t, s = torch.randn(8, 2), torch.full((8,), 0.8), torch.full((8,), 0.4)
    bias = method.student.net.leave.bias

    def gradient(factor):
        ctm.jump = lambda net, x, t, s, conditions: (
            factor * x if net is method.target else inner(net, x, t, s, conditions)
        )
        try:
            return torch.autograd.grad(method.landed(x_t, t, s, {}).sum(), bias)[0]
        finally:
            ctm.jump = inner

    torch.testing.assert_close(gradient(3.0), 3 * gradient(1.0))
    assert gradient(1.0).abs().sum() > 0


class LogSigma(nn.Module):
    """An EDM network, which embeds log sigma_t: not finite at t = 0."""

    flow_map, shape = True, (2,)

    def __init__(self, schedule):
        super().__init__()
        self.schedule, self.gain = schedule, nn.Linear(2, 2)

    def forward(self, x, t, s=None):
        return self.gain(x) * (1 - self.schedule.log_snr(t)[:, None] / 100)


@pytest.mark.parametrize("floor", [0.0, 0.002])
def test_an_edm_network_is_never_evaluated_at_noise_level_zero(floor):
    schedule = VE(sigma_min=floor)
    net = Denoiser(LogSigma(schedule), schedule, "edm", sigma_data=STD)
    method = CTM({"teacher": Gaussian([0.3, 0.3], STD, schedule), "student": net}, intervals=4)
    x, z = torch.randn(2, 64, 2)
    for _ in range(8):
        method._only("student")
        loss = method.loss(x, z, {})
        loss.backward()
        assert torch.isfinite(loss) and all(torch.isfinite(p.grad).all() for p in method.student.parameters())


def test_a_network_is_evaluated_at_times_of_the_schedule_only():
    """Above 0 and at most 1, in the rows of a batch that start at the data too."""
    method, asked = small(), []
    for network in (method.student, method.target):
        network.net.register_forward_pre_hook(lambda net, args: asked.append(args[1]))
    for _ in range(8):
        method.jump_loss(*torch.randn(2, 64, 2), {})
    t = torch.cat(asked)
    assert 0 < t.min() and t.max() <= 1


@pytest.mark.parametrize(("factor", "total"), [(0.5, 2 + 0.5 * 3 * 4), (0.0, 2)])
def test_the_loss_is_the_jumps_plus_the_balanced_denoising(factor, total):
    method = small(denoise=factor)
    method.jump_loss, method.denoise_loss = lambda *_: torch.tensor(2.0), lambda *_: torch.tensor(4.0)
    method.balance = lambda jump, denoise: 3.0
    assert method.loss(None, None, {}).item() == total and method.logs["student/jump"].item() == 2


def test_jumps_from_the_data_stay_there():
    student = Denoiser(Exact(VE(), 0.3), VE(), "x")
    x, zero = torch.randn(5, 2, dtype=F64), torch.zeros(5, dtype=F64)
    assert torch.equal(jump(student, x, zero, zero, {}), x)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_law_of_n_is_uniform_or_in_proportion_to_n(weighted):
    method = small(intervals=6, longest=4, weighted=weighted)
    counts = torch.bincount(torch.tensor([method.draw_steps() for _ in range(8000)]), minlength=6)
    chances = torch.tensor([0.0, 1, 2, 3, 4, 0]) / 10 if weighted else torch.tensor([0.0, 1, 1, 1, 1, 0]) / 4
    torch.testing.assert_close(counts / 8000, chances, atol=0.02, rtol=0)


def test_s_is_at_most_u_and_n_is_shared(monkeypatch):
    """Two ranks with other noise but the same shared stream take equally many teacher steps."""
    counts = []
    for seed in (1, 2):
        method = small()
        method.shared.manual_seed(7)
        calls, times = [0], []
        inner, solver = ctm.jump, method.solver

        def count(*a, **k):
            calls[0] += 1  # noqa: B023
            return solver(*a, **k)  # noqa: B023

        def watch(net, x, t, s, conditions):
            times.append((t, s))  # noqa: B023
            return inner(net, x, t, s, conditions)  # noqa: B023

        method.solver = count
        monkeypatch.setattr(ctm, "jump", watch)
        torch.manual_seed(seed)
        record = []
        for _ in range(10):
            calls[0] = 0
            times.clear()
            method.jump_loss(*torch.randn(2, 64, 2), {})
            (t, s), _, (u, s_again), _ = times
            assert (s <= u).all() and (u < t).all() and torch.equal(s, s_again) and (s >= 0).all()
            torch.testing.assert_close(t - u, torch.full_like(t, calls[0] / 6))
            record.append(calls[0])
        monkeypatch.setattr(ctm, "jump", inner)
        counts.append(record)
    assert counts[0] == counts[1] and len(set(counts[0])) > 1


def test_the_balance_equals_the_gradients():
    method = small(target_ema=0.0)
    x, z = torch.randn(2, 64, 2)
    jumped, denoised = method.jump_loss(x, z, {}), method.denoise_loss(x, z, {})
    last = method.student.net.leave.weight
    weight = method.balance(jumped, denoised)
    above, below = (torch.autograd.grad(a, last, retain_graph=True)[0].norm() for a in (jumped, denoised))
    torch.testing.assert_close(weight * (below + 1e-4), above)
    assert not weight.requires_grad


def test_under_guidance_the_denoising_target_is_the_teacher():
    method = exact(RectifiedFlow(), guidance=2.0)
    x, z = draw(50)
    assert method.denoise_loss(x, z, {}).item() < 1e-20
    assert exact(RectifiedFlow()).denoise_loss(x, z, {}).item() > 1e-3  # to the data, a variance remains


def test_both_branches_drop_the_same_units(monkeypatch):
    class Drop(nn.Module):
        shape, flow_map = (16,), True

        def __init__(self):
            super().__init__()
            self.drop, self.gain = nn.Dropout(0.5), nn.Parameter(torch.ones(1))

        def forward(self, x, t, s=None):
            return self.drop(self.gain * torch.ones_like(x))

    teacher = Gaussian(torch.zeros(16), STD, RectifiedFlow())
    method = CTM({"teacher": teacher, "student": Denoiser(Drop(), RectifiedFlow(), "x")}, intervals=1000, longest=1)
    method.train()
    masks, inner = [], ctm.jump
    monkeypatch.setattr(
        ctm, "jump", lambda net, x, t, s, conditions: masks.append(net.net) or inner(net, x, t, s, conditions)
    )
    record = []
    for net in (method.student.net, method.target.net):
        net.register_forward_hook(lambda m, i, out: record.append(out.detach()))
    method.jump_loss(torch.zeros(32, 16), torch.randn(32, 16), {})
    assert torch.equal(record[0], record[2]) and torch.equal(record[1], record[3]) and (record[0] == 0).any()
    assert not torch.equal(record[0], record[1])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.8, 1.0])
def test_the_gamma_sampler_keeps_the_marginals(schedule, gamma):
    """One exact step from std v_t has std v_s: the two coefficients of the linear map, squared."""
    student, sampler = Denoiser(Exact(schedule), schedule, "x"), GammaSampler(gamma)
    v = lambda t: ((schedule.alpha(t) * STD) ** 2 + schedule.sigma(t) ** 2).sqrt()
    t, s = torch.tensor([1.0, 0.9, 0.5], dtype=F64), torch.tensor([0.5, 0.2, 0.0], dtype=F64)
    one, zero = torch.ones(3, 2, dtype=F64), torch.zeros(3, 2, dtype=F64)
    keep = sampler(student, one, t, s, noise=zero)[:, 0]
    fresh = sampler(student, zero, t, s, noise=one)[:, 0]
    torch.testing.assert_close((keep * v(t)) ** 2 + fresh**2, v(s) ** 2, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(fresh, gamma * schedule.sigma(s), rtol=1e-9, atol=1e-9)


def test_a_network_without_s_is_refused():
    roles = {"teacher": Gaussian([0.0], STD, RectifiedFlow()), "student": Denoiser(MLP(dim=1), RectifiedFlow())}
    with pytest.raises(BadInput, match="flow_map"):
        CTM(roles)
