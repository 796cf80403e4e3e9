"""Solver steps: closed forms, batching, t = 1 and s = 0."""

import pytest
import torch
from torch import nn

from distill.denoise import Denoiser, Gaussian, GaussianMixture
from distill.errors import BadInput
from distill.noise import VE, RectifiedFlow, Table, TrigFlow, VPCosine, VPLinear, VPScaledLinear
from distill.solvers import DDIM, SOLVERS, Ancestral, DPMSolverPP, Heun, Renoise, solver

SCHEDULES = {
    "vp linear": VPLinear(),
    "vp scaled linear": VPScaledLinear(),
    "cosine": VPCosine(),
    "ve": VE(),
    "flow": RectifiedFlow(),
    "flow shift 3": RectifiedFlow(3.0),
    "trig 0.5": TrigFlow(0.5),
    "table": Table([0.999 - 0.99 * n / 99 for n in range(100)]),
    "table zero": Table([0.9, 0.7, 0.4, 0.1, 0.0]),
}
every = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
every_solver = pytest.mark.parametrize("name", SOLVERS)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


# t, s: from noise, inside, to data, all the way, and nowhere at all
T = f64(1.0, 1.0, 0.7, 0.4, 0.05, 1.0, 0.5, 0.97, 0.0, 1.0)
S = f64(0.9, 0.3, 0.5, 0.0, 0.0, 0.0, 0.5, 0.96, 0.0, 1.0)


def oracle(schedule, shape):
    if len(shape) == 1:
        return GaussianMixture([[-1.0, 0.3], [0.8, 1.0]], [0.3, 0.5], schedule=schedule)
    return Gaussian(torch.linspace(-1, 1, 12).reshape(shape), 0.5, schedule)


@every
@every_solver
@pytest.mark.parametrize("shape", [(2,), (3, 2, 2)])
def test_a_batch_with_its_own_t_and_s_equals_one_by_one(schedule, name, shape):
    model, step = oracle(schedule, shape), solver(name)
    x_t, noise, x_p = torch.randn(3, len(T), *shape, dtype=torch.float64)
    x_t = x_t * schedule.at(T, x_t)[1].clamp(min=1)
    history = lambda rows: [((1 + T[rows]) / 2, x_p[rows])]
    rows = slice(None)
    whole = step(model, x_t, T, S, noise=noise, history=history(rows))
    assert whole.shape == x_t.shape and whole.dtype == x_t.dtype
    for i in range(len(T)):
        i = slice(i, i + 1)
        alone = step(model, x_t[i], T[i], S[i], noise=noise[i], history=history(i))
        torch.testing.assert_close(whole[i], alone, atol=1e-12, rtol=1e-12)


@every
@every_solver
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_finite_with_finite_gradients_at_both_ends(schedule, name, dtype):
    """At s = 0 and at t = 1, whether or not alpha_1 = 0."""
    model, step = oracle(schedule, (2,)), solver(name)
    t, s = T.to(dtype), S.to(dtype)
    x_t, noise, x_p = torch.randn(3, len(T), 2, dtype=dtype)
    x_t.requires_grad_()
    for history in (None, [], [(torch.ones_like(t), x_p)]):
        x_s = step(model, x_t, t, s, noise=noise, history=history)
        (grad,) = torch.autograd.grad(x_s.sum(), x_t)
        assert x_s.isfinite().all() and grad.isfinite().all()


@every
@every_solver
def test_no_move_at_s_equal_t_and_clean_data_at_s_0(schedule, name):
    model, step = oracle(schedule, (2,)), solver(name)
    t = f64(1.0, 0.6, 0.3, 0.0)
    x_t, noise = torch.randn(2, 4, 2, dtype=torch.float64)
    if name != "renoise":
        torch.testing.assert_close(step(model, x_t, t, t, noise=noise), x_t, atol=1e-12, rtol=1e-12)
    if name in ("ddim", "ancestral", "renoise", "heun", "dpmpp_2m", "dpmpp_2s"):
        end = step(model, x_t, t, 0 * t, noise=noise, history=[])
        torch.testing.assert_close(end, model(x_t, t), atol=1e-15, rtol=0)


@every
@every_solver
def test_no_solver_evaluates_the_model_at_t_zero(schedule, name):
    """At t = 0 many a network takes the log of sigma."""

    class Net(nn.Module):
        def forward(self, x, t):
            return torch.where(t[:, None] == 0, torch.nan, torch.tanh(x))

    t, noise = f64(1.0, 0.6, 0.3), torch.randn(3, 2, dtype=torch.float64)
    x_s = solver(name)(Denoiser(Net(), schedule, "v"), noise, t, 0 * t, noise=noise, history=[])
    assert x_s.isfinite().all()


@every
@pytest.mark.parametrize("name", ["ddim", "heun", "dpmpp_2s", "dpmpp_2m"])
def test_exact_in_one_step_when_the_data_are_one_point(schedule, name):
    """E[x | x_t] = c everywhere, and eps stays what it is."""

    class Point(nn.Module):
        def forward(self, x, t):
            return torch.full_like(x, 0.7)

    model = Denoiser(Point(), schedule, "x")
    t, s = T[T > S], S[T > S]
    z = torch.randn(len(t), 2, dtype=torch.float64)
    c = torch.full_like(z, 0.7)
    x_s = solver(name)(model, schedule.add_noise(c, t, z), t, s, history=[])
    torch.testing.assert_close(x_s, schedule.add_noise(c, s, z), atol=1e-11, rtol=1e-11)


@every
def test_ddim_is_its_equation_and_invert_undoes_it(schedule):
    t, s = f64(0.95, 0.7, 0.5, 0.3), f64(0.2, 0.1, 0.4, 0.0)
    x, x_t = torch.randn(2, 4, 3, dtype=torch.float64)
    x_s = DDIM().step(schedule, x, x_t, t, s)
    torch.testing.assert_close(x_s, schedule.add_noise(x, s, schedule.eps(x, x_t, t)), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(DDIM().invert(schedule, x_s, x_t, t, s), x, atol=1e-9, rtol=1e-9)


def test_rectified_flow_euler_is_ddim_and_gives_the_published_slopes():
    model = Gaussian([0.0], 0.5, RectifiedFlow())
    for steps, wanted in [(1, 0.0), (2, 0.2), (4, 0.34054), (8, 0.41478), (16, 0.45568), (128, 0.49425)]:
        for name in ("euler", "ddim"):
            x = torch.ones(1, 1, dtype=torch.float64)
            for k in range(steps, 0, -1):
                x = solver(name)(model, x, f64(k / steps), f64((k - 1) / steps))
            assert x.item() == pytest.approx(wanted, abs=6e-6)


@pytest.mark.parametrize(
    "name,wanted",
    [
        ("ddim", {10: 0.36522, 18: 0.42304, 40: 0.46486, 80: 0.48233}),
        ("heun", {10: 0.60981, 18: 0.52763, 40: 0.50488, 80: 0.50115}),
    ],
)
def test_edm_grid_gives_the_known_slopes(name, wanted):
    """x = 80 carried down the Karras grid 80 ... 0.002 (rho 7) for data N(0, 0.5^2); the exact flow ends at 0.49999."""
    schedule = VE()
    model = Gaussian([0.0], 0.5, schedule)
    for n, end in wanted.items():
        i = torch.arange(n, dtype=torch.float64) / (n - 1)
        sigma = (80 ** (1 / 7) + i * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
        t, x = schedule.time(-2 * sigma.log()), f64([80.0])
        for k in range(n - 1):
            x = solver(name)(model, x, t[k : k + 1], t[k + 1 : k + 2])
        assert x.item() == pytest.approx(end, abs=6e-6)


def test_heun_is_karras_algorithm_1_and_takes_the_flow_chart_at_zero_terminal_snr():
    t, s = f64(0.8, 0.5), f64(0.6, 0.1)
    x_t = torch.randn(2, 1, dtype=torch.float64)
    for schedule in (VE(), VPLinear()):
        model = Gaussian([0.3], 0.5, schedule)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.at(t, x_t), schedule.at(s, x_t)
        r_t, r_s, y = sigma_t / alpha_t, sigma_s / alpha_s, x_t / alpha_t
        d_t = (y - model(x_t, t)) / r_t
        y_s = y + (r_s - r_t) * d_t
        d_s = (y_s - model(alpha_s * y_s, s)) / r_s
        wanted = alpha_s * (y + (r_s - r_t) * (d_t + d_s) / 2)
        torch.testing.assert_close(Heun()(model, x_t, t, s), wanted)
    schedule = RectifiedFlow()
    model = Gaussian([0.3], 0.5, schedule)
    v_t = schedule.velocity(model(x_t, t), x_t, t)
    x_s = x_t + (s - t)[:, None] * v_t
    v_s = schedule.velocity(model(x_s, s), x_s, s)
    torch.testing.assert_close(Heun()(model, x_t, t, s), x_t + (s - t)[:, None] * (v_t + v_s) / 2)
    torch.testing.assert_close(Heun("flow")(model, x_t, t, s), Heun()(model, x_t, t, s))


@every
def test_dpmpp_is_its_paper(schedule):
    """sigma_s / sigma_t x_t - alpha_s (exp(-h) - 1) D with D of the paper's Algorithms 1 and 2."""
    p, t, s = f64(0.95, 0.8), f64(0.8, 0.5), f64(0.6, 0.2)
    x_t, x_p = torch.randn(2, 2, 2, dtype=torch.float64)
    model, half = oracle(schedule, (2,)), lambda a: schedule.log_snr(a)[:, None] / 2
    (_, sigma_t), (alpha_s, sigma_s), h = schedule.at(t, x_t), schedule.at(s, x_t), half(s) - half(t)
    update = lambda d: sigma_s / sigma_t * x_t - alpha_s * torch.expm1(-h) * d
    x, r = model(x_t, t), (half(t) - half(p)) / h
    torch.testing.assert_close(DPMSolverPP(1)(model, x_t, t, s), update(x))
    history = [(p, x_p)]
    multi = solver("dpmpp_2m")(model, x_t, t, s, history=history)
    torch.testing.assert_close(multi, update((1 + 1 / (2 * r)) * x - x_p / (2 * r)))
    assert len(history) == 1 and torch.equal(history[0][0], t)
    torch.testing.assert_close(history[0][1], x)
    u = schedule.time(schedule.log_snr(t) / 2 + schedule.log_snr(s) / 2)
    alpha_u, sigma_u = schedule.at(u, x_t)
    x_u = sigma_u / sigma_t * x_t - alpha_u * torch.expm1(-h / 2) * x
    torch.testing.assert_close(DPMSolverPP(2)(model, x_t, t, s), update(model(x_u, u)))


@every
def test_ancestral_is_the_posterior_by_bayes(schedule):
    """q(x_s | x_t, x) from the product of N(x_s; alpha_s x, sigma_s^2) and the transition q(x_t | x_s)."""
    t, s = f64(0.97, 0.7, 0.5), f64(0.3, 0.6, 0.1)
    x, x_t, noise = torch.randn(3, 3, 2, dtype=torch.float64)
    alpha_s, sigma_s = schedule.at(s, x)
    ratio, beta = (c[:, None] for c in schedule.transition_coefs(s, t))
    var = 1 / (1 / sigma_s**2 + (ratio / beta) ** 2)
    mean = var * (alpha_s * x / sigma_s**2 + ratio * x_t / beta**2)
    wanted = mean + var.sqrt() * noise
    torch.testing.assert_close(Ancestral().step(schedule, x, x_t, t, s, noise), wanted, atol=1e-9, rtol=1e-9)
    ddim = DDIM().step(schedule, x, x_t, t, s)
    torch.testing.assert_close(Ancestral(eta=0).step(schedule, x, x_t, t, s, noise), ddim, atol=1e-9, rtol=1e-9)


@every
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ancestral_keeps_the_marginal_for_every_eta(schedule, eta):
    """If x_t = alpha_t x + sigma_t z, then x_s has mean alpha_s x and standard deviation sigma_s."""
    t, s = f64(1.0, 0.7, 0.5), f64(0.3, 0.6, 0.0)
    x = torch.randn(3, 1, dtype=torch.float64)
    step = lambda z, noise: Ancestral(eta).step(
        schedule, x, schedule.add_noise(x, t, torch.full_like(x, z)), t, s, torch.full_like(x, noise)
    )
    mean, (alpha_s, sigma_s) = step(0.0, 0.0), schedule.at(s, x)
    torch.testing.assert_close(mean, alpha_s * x)
    var = (step(1.0, 0.0) - mean) ** 2 + (step(0.0, 1.0) - mean) ** 2
    torch.testing.assert_close(var, sigma_s**2)


def test_renoise_is_the_forward_process_of_the_prediction():
    model, t, s = oracle(VPLinear(), (2,)), f64(1.0, 0.6), f64(0.4, 0.0)
    x_t, noise = torch.randn(2, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(Renoise()(model, x_t, t, s, noise=noise), VPLinear().add_noise(model(x_t, t), s, noise))


@every_solver
def test_a_step_costs_what_it_declares_and_passes_the_condition(name):
    seen = []

    class Net(nn.Module):
        def forward(self, x, t, label):
            seen.append(label)
            return torch.tanh(x)

    step, label = solver(name), torch.tensor([3, 4])
    x, noise = torch.randn(2, 2, 2)
    step(Denoiser(Net(), VPCosine(), "v"), x, torch.ones(2), torch.full((2,), 0.5), noise=noise, label=label)
    assert len(seen) == step.evaluations
    assert all(torch.equal(label, other) for other in seen)


def test_refusals():
    model, x, t = oracle(VE(), (2,)), torch.randn(1, 2), torch.ones(1)
    for name in SOLVERS:
        if solver(name).stochastic:
            with pytest.raises(BadInput, match="noise"):
                solver(name)(model, x, t, t / 2)
    with pytest.raises(BadInput, match="Did you mean 'heun'"):
        solver("huen")
    with pytest.raises(BadInput, match="chart"):
        Heun("vp")
    with pytest.raises(BadInput, match="order"):
        DPMSolverPP(3)
    step = DDIM()
    assert solver(step) is step
