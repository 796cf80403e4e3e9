"""The measured order of every solver is the declared one, on flows whose end is known exactly (float64)."""

import math

import pytest
import torch

from distill.denoise import Gaussian, GaussianMixture
from distill.noise import VE, RectifiedFlow, Table, TrigFlow, VPCosine, VPLinear, VPScaledLinear
from distill.solvers import SOLVERS, Heun, solve, solver

SCHEDULES = {
    "vp linear": VPLinear(),
    "vp scaled linear": VPScaledLinear(),
    "cosine": VPCosine(),
    "ve": VE(),
    "flow": RectifiedFlow(),
    "flow shift 3": RectifiedFlow(3.0),
    "trig 0.5": TrigFlow(0.5),
    # angles equally spaced: the angle's slope jumps at no node, so no solver meets a kink
    "table zero": Table([math.cos(math.pi / 2 * (n + 1) / 8) ** 2 for n in range(7)] + [0.0]),
}
every = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
ZERO_SNR_SMOOTH = ["flow", "flow shift 3", "trig 0.5", "table zero"]


def slope(steps, errors):
    """The slope of log error against log step, by least squares."""
    h, e = -torch.tensor(steps, dtype=torch.float64).log(), torch.tensor(errors, dtype=torch.float64).log()
    return (((h - h.mean()) * e).sum() / ((h - h.mean()) ** 2).sum()).item()


def times(start, end, steps):
    return torch.linspace(start, end, steps + 1, dtype=torch.float64).tolist()


def strong_order(step, schedule, start, end, steps=(24, 48, 96)):
    oracle = GaussianMixture([[-1.0], [1.0]], [0.5, 0.7], [0.4, 0.6], schedule=schedule)
    a, b = (torch.full((9,), t, dtype=torch.float64) for t in (start, end))
    alpha, sigma = schedule(a[:1])
    x_t = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None] * (alpha**2 + sigma**2).sqrt()
    truth = oracle.flow_map(x_t, a, b)
    ends = [solve(oracle, x_t, times(start, end, k), step) for k in steps]
    return slope(steps, [(x - truth).square().mean().sqrt().item() for x in ends])


@every
@pytest.mark.parametrize("name", [name for name in SOLVERS if not solver(name).stochastic])
def test_order_of_deterministic_solvers(schedule, name):
    step = solver(name)
    assert strong_order(step, schedule, 0.9, 0.2) == pytest.approx(step.order, abs=0.2)


@every
def test_heun_has_order_2_in_the_chart_it_would_not_choose(schedule):
    chart = "edm" if schedule.zero_terminal_snr else "flow"
    assert strong_order(Heun(chart), schedule, 0.9, 0.2) == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("name", ZERO_SNR_SMOOTH)
def test_heun_keeps_order_2_from_pure_noise_to_clean_data(name):
    assert strong_order(Heun(), SCHEDULES[name], 1.0, 0.0) == pytest.approx(2, abs=0.2)


@pytest.mark.parametrize("name", ["dpmpp_2s", "dpmpp_2m"])
def test_dpmpp_stays_better_than_first_order_from_pure_noise_to_clean_data(name):
    """The steps at an infinite log-SNR are of first order, and cost a logarithm: 1.84 and 1.93 at 4096 steps."""
    assert strong_order(solver(name), RectifiedFlow(), 1.0, 0.0, steps=(64, 128, 256)) > 1.5


def law_after(step, oracle, steps):
    """Mean and variance of x at the last time. Each step on Gaussian data is affine, x_s = k x_t + c + g noise."""
    probe, noise = (torch.tensor(p, dtype=torch.float64)[:, None] for p in ([0.0, 1.0, 0.0], [0.0, 0.0, 1.0]))
    full = lambda t: torch.full((3,), t, dtype=torch.float64)
    mean, std = (p[0].item() for p in oracle._marginal(probe[:1], full(steps[0])[:1]))
    var = std**2
    for t, s in zip(steps, steps[1:]):
        zero, one, noisy = step(oracle, probe, full(t), full(s), noise=noise).flatten().tolist()
        mean, var = (one - zero) * mean + zero, (one - zero) ** 2 * var + (noisy - zero) ** 2
    return mean, var**0.5


@every
def test_weak_order_of_ancestral_sampling(schedule):
    # VE ends early: below, the noise is so small that the leading error vanishes and order 2 is measured
    start, end = (0.9, 0.6) if isinstance(schedule, VE) else (0.9, 0.2)
    step, oracle, steps = solver("ancestral"), Gaussian([0.7], 0.5, schedule), (40, 80, 160)
    last = torch.full((1,), end, dtype=torch.float64)
    truth = [p.item() for p in oracle._marginal(torch.zeros(1, 1, dtype=torch.float64), last)]
    laws = [law_after(step, oracle, times(start, end, k)) for k in steps]
    errors = [[abs(p - q) for p, q in zip(law, truth)] for law in laws]
    assert slope(steps, [std for _, std in errors]) == pytest.approx(step.order, abs=0.2)
    assert max(mean for mean, _ in errors) < 1e-12, "the posterior preserves the mean exactly"
