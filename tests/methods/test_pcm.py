"""PCM: the optimum is the solver's map to each edge, and the edge is chosen by t for both branches."""

from __future__ import annotations

import pytest
import torch
from slopes import F64, STD, batch
from torch import nn

from distill.denoise import Denoiser, Gaussian
from distill.errors import BadInput
from distill.methods import pcm
from distill.methods.pcm import PCM
from distill.models.small import MLP
from distill.noise import RectifiedFlow, TrigFlow, VPCosine, bcast
from distill.solvers import DDIM, ddim, solve
from distill.times import Grid

SCHEDULES = [RectifiedFlow(), VPCosine(), TrigFlow()]
EDGES = [1.0, 0.7, 0.45, 0.2, 0.0]
STEPS = 5


class Solved(nn.Module):
    """The x whose DDIM jump to the phase's edge is the n-step DDIM map there, for N(m, STD^2), m = null + w shift."""

    shape, guided = (1,), True

    def __init__(self, schedule, null=0.0, shift=0.0, edges=EDGES, steps=STEPS):
        super().__init__()
        self.schedule, self.null_mean, self.shift = schedule, null, shift
        self.edges, self.steps, self.off = edges, steps, nn.Parameter(torch.zeros(1, dtype=F64))

    def forward(self, x, t, label=None, w=None):
        mean = bcast(self.null_mean + self.shift * (torch.ones_like(t) if w is None else w), x)
        out = torch.empty_like(x)
        for i in range(len(x)):  # one sample at a time: clear, not fast
            edge = next(e for e in self.edges if e < t[i] - 1e-9) if t[i] > 1e-9 else 0.0
            top = self.edges[max(self.edges.index(edge) - 1, 0)]
            n = max(round((t[i].item() - edge) / (top - edge) * self.steps), 1)
            times = [edge + (t[i].item() - edge) * j / n for j in range(n, -1, -1)]
            slope = torch.ones(1, 1, dtype=F64)
            for a, b in zip(times, times[1:]):
                slope = DDIM()(Gaussian([0.0], STD, self.schedule), slope, *torch.tensor([[a], [b]], dtype=F64))
            (a, s), (b, r) = (self.schedule(torch.tensor(u, dtype=F64)) for u in (times[0], edge))
            keep = r / s if s > 0 else torch.tensor(1.0, dtype=F64)
            pull = b - a * keep
            centred = x[i] - a * mean[i]
            out[i] = mean[i] + ((slope[0, 0] - keep) / pull * centred if pull.abs() > 1e-12 else 0.0)
        return out + self.off


class TwoClasses(Denoiser):
    """N(1, STD^2) under a label, N(-0.5, STD^2) without."""

    def __init__(self, schedule):
        super().__init__(None, schedule, "x")
        self.with_label, self.without = Gaussian([1.0], STD, schedule), Gaussian([-0.5], STD, schedule)

    def native(self, x_t, t, label):
        return torch.where(bcast(label < 0, x_t), self.without(x_t, t), self.with_label(x_t, t))


def solved(schedule, teacher=None, null=0.0, shift=0.0, **kw):
    student = Denoiser(Solved(schedule, null, shift), schedule, "x")
    teacher = teacher or Gaussian([0.0], STD, schedule)
    kw = {"grid": EDGES, "intervals": STEPS, "huber": None} | kw
    return PCM({"teacher": teacher, "student": student}, **kw)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_optimum_is_the_solvers_map_and_a_perturbation_points_back(schedule):
    method = solved(schedule)
    x, z = batch(40)
    assert method.loss(x, z, {}).item() < 1e-20
    for sign in (-1, 1):
        with torch.no_grad():
            method.student.net.off.fill_(0.05 * sign)  # the target stays
        grad = torch.autograd.grad(method.loss(x, z, {}), method.student.net.off)[0]
        assert grad * sign > 0


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_sampler_is_the_teachers_fine_ddim(schedule):
    """From edge to edge the optimum repeats the solver's phases x intervals steps: deterministic, exact."""
    method, z = solved(schedule), torch.randn(20, 1, dtype=F64)
    fine = [e + (t - e) * j / STEPS for t, e in zip(EDGES, EDGES[1:]) for j in range(STEPS, 0, -1)] + [0.0]
    torch.testing.assert_close(method.sample(z, {}), solve(method.teacher, z, fine, DDIM()), rtol=1e-9, atol=1e-9)


def test_guidance_is_mean_extrapolation_and_w_reaches_the_student():
    schedule, cond = RectifiedFlow(), {"label": torch.zeros(30, dtype=torch.long)}
    kw = dict(teacher=TwoClasses(schedule), shift=1.5, guidance_range=[0.0, 5.0])
    x, z = batch(30)
    assert solved(schedule, null=-0.5, **kw).loss(x, z, cond).item() < 1e-12
    assert solved(schedule, null=1.0, **kw).loss(x, z, cond).item() > 1e-4  # w for w + 1


class Linear(nn.Module):
    shape = (1,)

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.full((1,), 0.3, dtype=F64))

    def forward(self, x, t, **cond):
        return self.gain * x


def linear(**kw):
    schedule = RectifiedFlow()
    roles = {"teacher": Gaussian([0.0], STD, schedule), "student": Denoiser(Linear(), schedule, "x")}
    return PCM(roles, **{"huber": None} | kw)


def spied(method, monkeypatch, n=400):
    """(f, target, t, s, edge, last) of one call."""
    seen, inner, times = [], pcm.mse, method.times
    kept = []
    method.times = lambda x: kept.append(times(x)) or kept[-1]
    with monkeypatch.context() as patch:
        patch.setattr(pcm, "mse", lambda a, b: seen.append((a, b)) or inner(a, b))
        method.loss(*batch(n), {}).backward()
    return *seen[0], *kept[0]


def test_times_and_edges():
    method = linear(grid=EDGES, intervals=STEPS)
    t, s, edge, last = method.times(torch.zeros(4000, 1, dtype=F64))
    grid = torch.tensor(EDGES, dtype=F64)
    expected = torch.stack([max(e for e in grid if e < a - 1e-9) for a in t])
    assert torch.equal(edge, expected) and (s >= edge - 1e-12).all() and (s < t).all()
    torch.testing.assert_close(s[last], edge[last])
    assert (s[~last] > edge[~last] + 1e-6).all()
    assert abs(last.double().mean() - 1 / STEPS) < 0.03 and len(set(t.mul(1e6).round().tolist())) == 4 * STEPS


def test_the_target_uses_the_edge_of_t(monkeypatch):
    method = linear(grid=EDGES, intervals=STEPS)
    f, target, t, s, edge, last = spied(method, monkeypatch)
    x, z = batch(400)
    x_t = method.schedule.add_noise(x, t, z)
    x_s = DDIM()(method.teacher, x_t, t, s)
    torch.testing.assert_close(f, ddim(method.schedule, 0.3 * x_t, x_t, t, edge))
    jumped = ddim(method.schedule, 0.3 * x_s, x_s, s, edge)
    torch.testing.assert_close(target, torch.where(bcast(last, x), x_s, jumped))
    assert target.grad_fn is None and f.grad_fn is not None
    assert all(p.grad is None and not p.requires_grad for p in method.target.parameters())
    assert method.student.net.gain.grad.abs() > 0


def test_a_phase_of_one_interval_is_the_teachers_step(monkeypatch):
    """The target is free of the student, and a student equal to the teacher starts at loss 0."""
    method = linear(grid=10, intervals=1)
    with torch.no_grad():
        method.target.net.gain.fill_(99.0)
    _, target, t, s, edge, last = spied(method, monkeypatch)
    x, z = batch(400)
    assert last.all() and torch.equal(s, edge)
    torch.testing.assert_close(target, DDIM()(method.teacher, method.schedule.add_noise(x, t, z), t, s))
    same = solved(RectifiedFlow(), grid=10, intervals=1)
    same.student = same.teacher
    assert same.loss(*batch(50), {}).item() < 1e-28


def test_one_phase_is_consistency_distillation():
    method = linear(grid=1, intervals=8)
    t, s, edge, _ = method.times(torch.zeros(500, 1))
    assert (edge == 0).all() and set((t * 8).round().int().tolist()) == set(range(1, 9))
    torch.testing.assert_close(t - s, torch.full_like(t, 1 / 8))
    x, z = batch(20)
    x_t = method.schedule.add_noise(x, torch.full((20,), 0.5, dtype=F64), z)
    half, zero = torch.full((20,), 0.5, dtype=F64), torch.zeros(20, dtype=F64)
    torch.testing.assert_close(pcm.to_edge(method.student, x_t, half, zero, {}), method.student(x_t, half))


def test_both_branches_drop_the_same_units(monkeypatch):
    class Masks(nn.Module):
        shape = (32,)

        def __init__(self):
            super().__init__()
            self.drop, self.gain, self.masks = nn.Dropout(0.5), nn.Parameter(torch.ones(1)), []

        def forward(self, x, t, **cond):
            self.masks.append(self.drop(self.gain * torch.ones_like(x)).detach())
            return self.masks[-1]

    teacher = Gaussian(torch.zeros(32), STD, RectifiedFlow())
    method = PCM({"teacher": teacher, "student": Denoiser(Masks(), RectifiedFlow(), "x")}).train()
    method.loss(torch.zeros(16, 32), torch.randn(16, 32), {})
    assert torch.equal(method.student.net.masks[0], method.target.net.masks[0])
    assert (method.student.net.masks[0] == 0).any()


def test_huber_is_the_default():
    roles = {"teacher": Gaussian([0.0, 0.0], STD, RectifiedFlow())}
    method = PCM(roles | {"student": Denoiser(MLP(dim=2, width=8), RectifiedFlow())})
    assert method.huber == 1e-3 and torch.isfinite(method.loss(torch.randn(8, 2), torch.randn(8, 2), {}))
    assert Grid.of(4) == method.grid
    with pytest.raises(BadInput, match="method.intervals"):
        linear(intervals=0)
