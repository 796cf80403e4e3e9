"""Consistency training against its closed-form optima, and the laws of its pairs of times."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from slopes import F64, STD, Affine, batch, fixed_point, karras, square
from torch import nn

from distill.denoise import Denoiser
from distill.errors import BadInput
from distill.methods import ect
from distill.methods.ect import ConsistencyTraining
from distill.models.small import MLP
from distill.noise import VE, RectifiedFlow, TrigFlow, VPCosine
from distill.times import Doubling, Shrinking, TimePairs


class Every(TimePairs):
    """Each pair of neighbours of `times` (ascending), four times over."""

    def __init__(self, times):
        self.times, self.floor = torch.tensor(times, dtype=F64), times[0]

    def __call__(self, n, schedule, progress, device=None, dtype=None):
        return self.times[1:].repeat_interleave(4), self.times[:-1].repeat_interleave(4)


def training(n: int, **kw) -> ConsistencyTraining:
    """CT on the Karras grid of n points with an affine student; each pair of times meets the four exact points."""
    times = karras(n)[::-1]
    student = Denoiser(Affine(times, torch.ones(n)), VE(80.0, 7.0), "x")
    return ConsistencyTraining({"student": student}, pairs=Every(times), huber=None, **kw)


@pytest.mark.parametrize("weigh", [False, True])
@pytest.mark.parametrize("n, expected", [(10, 0.36522), (18, 0.42304), (40, 0.46486), (80, 0.48233), (160, 0.49114)])
def test_the_fixed_point_of_ct_is_that_of_euler_cd(n, expected, weigh):
    """80 a(80) for std 0.5, sigma in [0.002, 80], rho 7; the exact flow map has 0.49999."""
    if weigh and n > 40:
        pytest.skip("the same fixed point, slower")
    slopes = fixed_point(training(n, weigh=weigh), *square(n - 1))
    assert abs(80 * slopes[-1].item() - expected) < 1e-4


class Power(nn.Module):
    """Slope a(sigma) of ECT's optimum with r = kappa t: a(t) = a(kappa t)(s^2 + kappa t^2)/(s^2 + t^2), a(0) = 1."""

    shape = (1,)

    def __init__(self, schedule, kappa):
        super().__init__()
        self.schedule, self.kappa, self.gain = schedule, kappa, nn.Parameter(torch.ones(1, dtype=F64))

    def forward(self, x, t):
        alpha, sigma = self.schedule(t)
        sigma = sigma / alpha
        slope = torch.ones_like(sigma)
        for _ in range(60):
            slope = slope * (STD**2 + self.kappa * sigma**2) / (STD**2 + sigma**2)
            sigma = self.kappa * sigma
        return self.gain * (slope / alpha)[:, None] * x


@dataclass(frozen=True)
class Fourfold(Shrinking):
    """The same times at each call, each for the four exact points."""

    def __call__(self, n, *rest):
        torch.manual_seed(0)
        return tuple(a.repeat_interleave(4) for a in super().__call__(n // 4, *rest))


@pytest.mark.parametrize("schedule", [VE(), RectifiedFlow(), VPCosine(), TrigFlow()])
@pytest.mark.parametrize("stage, kappa", [(0, 0.5), (1, 0.75)])
def test_the_optimum_of_ect_with_a_constant_ratio(schedule, stage, kappa):
    roles = {"student": Denoiser(Power(schedule, kappa), schedule, "x")}
    method = ConsistencyTraining(roles, pairs=Fourfold(stages=2, k=0.0), huber=None)
    method.step, method.total_steps = stage, 2
    x, z = square(500)
    slope = lambda: torch.autograd.grad(method.loss(x, z, {}), method.student.net.gain)[0]
    at_optimum = slope().abs()
    for sign in (-1, 1):
        with torch.no_grad():
            method.student.net.gain.fill_(1 + 0.05 * sign)  # the target stays
        assert slope() * sign > 1e6 * at_optimum


def test_the_mapping_from_t_to_r():
    shares, pairs = [], Shrinking(stages=12)
    for stage in range(12):
        torch.manual_seed(0)
        t, r = pairs(4000, VE(), (stage + 0.5) / 12, dtype=F64)
        assert (r >= 0).all() and (r < t).all()
        sigma_t, sigma_r = VE().sigma(t), VE().sigma(r)
        shrink = 1 - 2.0 ** -(stage + 1) * (1 + 8 / (1 + sigma_t.exp()))
        torch.testing.assert_close(sigma_r, sigma_t * shrink.clamp(0, 0.999), rtol=1e-6, atol=1e-12)
        shares.append((r == 0).double().mean().item())
    assert shares[0] > 0.5 and shares[-1] == 0 and sorted(shares, reverse=True) == shares
    log = VE().sigma(t).log()
    assert abs(log.mean() + 1.1) < 0.1 and abs(log.std() - 2) < 0.1


def test_ect_at_r_zero_is_diffusion_training():
    class Zero(TimePairs):
        def __call__(self, n, *rest):
            return torch.full((n,), 0.6, dtype=F64), torch.zeros(n, dtype=F64)

    method = ConsistencyTraining({"student": Denoiser(MLP(dim=1, width=8), RectifiedFlow()).double()}, pairs=Zero())
    x, z = batch(64)
    expected = (method.student(0.4 * x + 0.6 * z, torch.full((64,), 0.6, dtype=F64)) - x).abs().mean() / 1.5
    torch.testing.assert_close(method.loss(x, z, {}), expected)


def test_the_grid_of_ct_doubles_at_equal_spans():
    pairs = Doubling(10, 80)
    found = [pairs.intervals(step / 400) for step in range(400)]
    assert [found.count(n) for n in (10, 20, 40, 80)] == [100] * 4 and found == sorted(found)
    torch.manual_seed(0)
    t, r = pairs(5000, VE(), 0.999, dtype=F64)
    torch.testing.assert_close(t - r, torch.full_like(t, 1 / 80))
    middle = VE().sigma(t - 1 / 160).log()
    assert abs(middle.mean() + 1.1) < 0.2 and abs(middle.std() - 2) < 0.2
    t, r = Doubling(4, 4, mean=None, floor=0.2)(5000, VE(), 0.0)
    assert sorted(set(r.tolist())) == pytest.approx([0.2, 0.4, 0.6, 0.8]) and t.max() == 1


@pytest.mark.parametrize("pairs", [Doubling(1000, 1000), Shrinking(stages=30)])
def test_the_target_has_no_graph_and_drops_the_same_units(pairs, monkeypatch):
    class Masks(nn.Module):
        shape = (32,)

        def __init__(self):
            super().__init__()
            self.drop, self.scale = nn.Dropout(0.5), nn.Parameter(torch.ones(1))

        def forward(self, x, t):
            return self.drop(self.scale * torch.ones_like(x))

    seen = []
    inner = ect.huber_norm
    monkeypatch.setattr(ect, "huber_norm", lambda a, b, *rest: seen.append((a, b)) or inner(a, b, *rest))
    method = ConsistencyTraining({"student": Denoiser(Masks(), RectifiedFlow(), "x")}, pairs=pairs)
    method.step, method.total_steps = 99, 100  # no r is 0 in the last stage
    method.train()
    loss = method.loss(torch.zeros(16, 32), torch.randn(16, 32), {})
    y, target = seen[0]
    assert torch.equal(y, target) and (y == 0).any()
    assert y.grad_fn is not None and target.grad_fn is None
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in method.target.parameters())


def test_senseless_settings_are_refused():
    with pytest.raises(BadInput, match="first=20 to last=10"):
        Doubling(20, 10)
    with pytest.raises(BadInput, match="q=1"):
        Shrinking(q=1.0)
