"""Schedules against closed forms in float64."""

import math
import pickle
import subprocess
import sys

import pytest
import torch

from distill.errors import BadInput
from distill.noise import VE, RectifiedFlow, Table, TrigFlow, VPCosine, VPLinear, VPScaledLinear, bcast

ZERO_SNR = {
    "cosine": VPCosine(),
    "flow": RectifiedFlow(),
    "flow shift 3": RectifiedFlow(3.0),
    "trig": TrigFlow(),
    "trig 0.5": TrigFlow(0.5),
    "table zero": Table([0.9, 0.7, 0.4, 0.1, 0.0]),
}
SCHEDULES = {
    "vp linear": VPLinear(),
    "vp scaled linear": VPScaledLinear(),
    "ve": VE(),
    "ve floor": VE(sigma_min=0.002),
    "table": Table([0.999 - 0.99 * n / 99 for n in range(100)]),
} | ZERO_SNR

every = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
t_mid = torch.linspace(0.013, 0.987, 61, dtype=torch.float64)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ends(schedule, dtype):
    alpha, sigma = schedule(torch.tensor([0.0, 1.0], dtype=dtype))
    assert alpha.dtype == sigma.dtype == dtype
    assert alpha[0] == 1 and sigma[0] == 0, "t = 0 is clean data, exactly"
    zero = schedule in ZERO_SNR.values()
    assert (alpha[1] == 0) == zero, "a zero terminal SNR is an exact zero in every precision"
    assert schedule.zero_terminal_snr == zero


@every
def test_log_snr_and_its_inverse(schedule):
    log_snr = schedule.log_snr(t_mid)
    assert (log_snr.diff() < 0).all()
    torch.testing.assert_close(schedule.time(log_snr), t_mid, atol=1e-8, rtol=0)
    wanted = torch.linspace(log_snr[-1], log_snr[0], 50, dtype=torch.float64)
    torch.testing.assert_close(schedule.log_snr(schedule.time(wanted)), wanted, atol=1e-8, rtol=0)
    ends = schedule.time(torch.tensor([math.inf, 1e3, -1e3, -math.inf], dtype=torch.float64))
    torch.testing.assert_close(ends, torch.tensor([0.0, 0.0, 1.0, 1.0], dtype=torch.float64), atol=1e-7, rtol=0)


@every
def test_derivatives_equal_autograd(schedule):
    t = t_mid.clone().requires_grad_()
    for value, slope in [(schedule.alpha, schedule.d_alpha), (schedule.sigma, schedule.d_sigma)]:
        (grad,) = torch.autograd.grad(value(t).sum() + 0 * t.sum(), t)
        torch.testing.assert_close(slope(t_mid), grad, atol=1e-10, rtol=1e-9)


@every
def test_transition_keeps_the_marginal(schedule):
    s = torch.tensor([0.0, 0.1, 0.3, 0.5, 0.7, 0.99], dtype=torch.float64)
    u = torch.tensor([0.0, 0.1, 0.6, 1.0, 0.71, 1.0], dtype=torch.float64)
    (alpha_s, sigma_s), (alpha_u, sigma_u) = schedule(s), schedule(u)
    ratio, beta = schedule.transition_coefs(s, u)
    torch.testing.assert_close(ratio * alpha_s, alpha_u)
    torch.testing.assert_close((ratio * sigma_s) ** 2 + beta**2, sigma_u**2)
    x, noise = torch.randn(2, 6, 3, 2, dtype=torch.float64)
    x_u = schedule.transition(x, s, u, noise)
    torch.testing.assert_close(x_u, ratio[:, None, None] * x + beta[:, None, None] * noise)
    assert torch.equal(x_u[:2], x[:2]), "u = s moves nothing"


@every
def test_transition_from_pure_noise_to_itself_is_finite(schedule):
    one = torch.ones(2)
    x = torch.randn(2, 3)
    torch.testing.assert_close(schedule.transition(x, one, one, torch.randn(2, 3)), x)


def test_transition_samples():
    schedule, n = RectifiedFlow(2.0), 200_000
    g = torch.Generator().manual_seed(0)
    z, noise = torch.randn(2, n, 1, generator=g, dtype=torch.float64)
    s, u = torch.full((n,), 0.3, dtype=torch.float64), torch.full((n,), 0.8, dtype=torch.float64)
    x_u = schedule.transition(schedule.add_noise(torch.full_like(z, 2.0), s, z), s, u, noise)
    alpha_u, sigma_u = schedule(u[:1])
    assert abs(x_u.mean() - 2 * alpha_u) < 4 * sigma_u / n**0.5
    assert abs(x_u.std() / sigma_u - 1) < 4 / (2 * n) ** 0.5


@every
def test_eps_score_velocity(schedule):
    t_noisy = t_mid[t_mid > 0.2]  # below, VE leaves no digits of the noise in x_t
    t = t_noisy.clone().requires_grad_()
    x, z = torch.randn(2, len(t), 3, 2, dtype=torch.float64)
    x_t = schedule.add_noise(x, t, z)
    torch.testing.assert_close(schedule.eps(x, x_t, t), z, atol=1e-9, rtol=1e-9)
    sigma = bcast(schedule.sigma(t_noisy), x)
    torch.testing.assert_close(schedule.score(x, x_t, t_noisy) * sigma, -z, atol=1e-9, rtol=1e-9)
    # dx_t/dt along a fixed pair (x, z), component by component
    dx_dt = torch.stack([torch.autograd.grad(c.sum(), t, retain_graph=True)[0] for c in x_t.flatten(1).T], 1)
    torch.testing.assert_close(schedule.velocity(x, x_t, t_noisy).flatten(1), dx_dt, atol=1e-9, rtol=1e-9)


def test_clean_data_imply_no_noise():
    x = torch.randn(3, 2)
    for schedule in SCHEDULES.values():
        assert torch.equal(schedule.eps(x, x + 1, torch.zeros(3)), torch.zeros(3, 2))


@every
def test_half_precision_times_get_float32_coefficients(schedule):
    t = torch.tensor([0.25, 0.5], dtype=torch.bfloat16)
    alpha, sigma = schedule(t)
    assert alpha.dtype == sigma.dtype == torch.float32
    torch.testing.assert_close(alpha, schedule.alpha(t.float()), atol=0, rtol=0)
    assert schedule.add_noise(torch.zeros(2, 3).bfloat16(), t, torch.ones(2, 3).bfloat16()).dtype == torch.float32


def test_vp_families_integrate_their_beta():
    t = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    linear = 0.1 + t * 19.9
    scaled = (0.85**0.5 + t * (12**0.5 - 0.85**0.5)) ** 2
    for schedule, beta in [(VPLinear(), linear), (VPScaledLinear(), scaled)]:
        integral = torch.cumulative_trapezoid(beta, t)
        torch.testing.assert_close(schedule.alpha(t[1:]), torch.exp(-integral / 2), atol=1e-8, rtol=1e-7)
        torch.testing.assert_close(schedule.sigma(t) ** 2 + schedule.alpha(t) ** 2, torch.ones_like(t))


def test_vp_scaled_linear_is_the_limit_of_the_discrete_table():
    beta = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = (1 - beta).cumprod(0)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    assert (VPScaledLinear().alpha(t) - abar.sqrt()).abs().max() < 2e-3


def test_known_values():
    half = torch.tensor([0.5], dtype=torch.float64)
    assert VPCosine(s=0.0).alpha(half).item() == pytest.approx(math.cos(math.pi / 4))
    theta = lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2)
    assert VPCosine().alpha(half).item() == pytest.approx(theta(0.5) / theta(0))
    assert VPCosine().sigma(half).item() == pytest.approx((1 - (theta(0.5) / theta(0)) ** 2) ** 0.5)
    assert RectifiedFlow(3.0).sigma(half).item() == pytest.approx(3 * 0.5 / (1 + 2 * 0.5))
    assert RectifiedFlow(3.0).alpha(half).item() == pytest.approx(0.25)
    assert VE().sigma(half).item() == pytest.approx((0.5 * 80 ** (1 / 7)) ** 7)
    # EDM's levels, equation 5 of the paper: sigma_i of i = 0, ..., N - 1 for N = 18, then 0
    floor = VE(sigma_min=0.002)
    levels = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    t = torch.tensor([1 - i / 17 for i in range(17)], dtype=torch.float64)
    assert floor.sigma(t).tolist() == pytest.approx(levels[:-1])
    assert floor.sigma(torch.tensor([1e-12], dtype=torch.float64)).item() == pytest.approx(levels[-1])
    assert (VE().sigma(t) < 0.002).sum() == 3 and (floor.sigma(t) < 0.002).sum() == 0
    with pytest.raises(BadInput, match="sigma_min 80 must be"):
        VE(sigma_min=80.0)
    assert TrigFlow(0.5).sigma(half).item() == pytest.approx(0.5 * math.sin(math.pi / 4))


@pytest.mark.parametrize("dtype,tol", [(torch.float32, 1e-6), (torch.float64, 1e-14)])
def test_table_hits_its_nodes(dtype, tol):
    abar = [0.99, 0.8, 0.3, 0.05, 0.0]
    t = torch.arange(1, 6, dtype=dtype) / 5
    alpha, sigma = Table(abar)(t)
    wanted = torch.tensor(abar, dtype=dtype)
    torch.testing.assert_close(alpha**2, wanted, atol=tol, rtol=0)
    torch.testing.assert_close(sigma**2, 1 - wanted, atol=tol, rtol=0)
    middle = torch.atan2(*Table(abar)(torch.tensor([0.1, 0.7], dtype=dtype))[::-1])
    phi = torch.tensor([0.0] + abar, dtype=dtype).sqrt().acos()
    phi[0] = 0
    torch.testing.assert_close(middle, torch.stack([(phi[0] + phi[1]) / 2, (phi[3] + phi[4]) / 2]), atol=tol, rtol=0)


def test_table_first_used_in_inference_mode_can_be_differentiated_after():
    table = Table([0.91, 0.5, 0.1])
    with torch.inference_mode():
        table(torch.rand(3))
    t = torch.tensor([0.4], requires_grad=True)
    (grad,) = torch.autograd.grad(table.alpha(t).sum(), t)
    torch.testing.assert_close(grad, table.d_alpha(t.detach()))


@pytest.mark.parametrize("abar", [[], [0.5, 0.5], [0.5, 0.9], [1.0, 0.5], [0.5, -0.1], [0.5, math.nan]])
def test_invalid_tables_raise(abar):
    with pytest.raises(BadInput, match="alphas_cumprod"):
        Table(abar)


@every
def test_schedules_are_values(schedule):
    again = pickle.loads(pickle.dumps(schedule))
    assert again == schedule and hash(again) == hash(schedule)
    assert sum(again == other for other in SCHEDULES.values()) == 1


def test_the_plain_torch_core_imports_only_torch():
    code = (
        "import distill.noise, distill.times, distill.denoise, distill.solvers, sys; "
        "bad = {'lightning', 'pytorch_lightning', 'diffusers', 'transformers', 'scipy', 'omegaconf', 'deepspeed', "
        "'webdataset', 'wandb', 'peft', 'sklearn'} & set(sys.modules); sys.exit(str(bad) if bad else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_table_of_a_path_keeps_its_snr_at_every_node():
    t = torch.arange(1, 1000, dtype=torch.float64) / 1000
    table, path = Table.of(RectifiedFlow()), RectifiedFlow()
    assert torch.allclose(table.log_snr(t), path.log_snr(t), atol=1e-9)
    assert table.zero_terminal_snr and table.alphas_cumprod[-1] == 0
