"""Denoisers: prediction types, guidance and exact denoisers, against closed forms in float64."""

import math

import pytest
import torch
from torch import nn

from distill.denoise import PREDICTIONS, Denoiser, Gaussian, GaussianMixture, Guided
from distill.errors import BadInput
from distill.noise import VE, RectifiedFlow, Table, TrigFlow, VPCosine, VPLinear, VPScaledLinear, bcast

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
other = pytest.mark.parametrize("other", SCHEDULES.values(), ids=SCHEDULES)
every_chart = pytest.mark.parametrize(
    "schedule,prediction",
    [
        pytest.param(schedule, prediction, id=f"{name}-{prediction}")
        for name, schedule in SCHEDULES.items()
        for prediction in PREDICTIONS
        if not (prediction == "eps" and schedule.zero_terminal_snr)  # refused: see below
    ],
)

MEANS, STDS, WEIGHTS = [[-1.0, 0.3], [0.8, 1.0], [0.5, -1.2]], [0.3, 0.5, 0.2], [0.2, 0.5, 0.3]


def mixture(schedule):
    return GaussianMixture(MEANS, STDS, WEIGHTS, schedule=schedule)


def noisy(schedule, log_snr, dim=2, seed=0):
    """x_t, t at these log-SNRs for data of about unit variance."""
    g = torch.Generator().manual_seed(seed)
    t = schedule.time(log_snr)
    x, z = torch.randn(2, len(t), dim, generator=g, dtype=torch.float64)
    return schedule.add_noise(x, t, z), t


log_snrs = torch.linspace(-4.5, 6, 40, dtype=torch.float64)


class Perfect(nn.Module):
    """A network that predicts what `Denoiser(net, schedule, prediction)` needs to be exact."""

    def __init__(self, schedule, prediction, sigma_data=1.0):
        super().__init__()
        self.oracle, self.seen = mixture(schedule), []
        self.chart = Denoiser(None, schedule, prediction, sigma_data)

    def forward(self, x_in, t, label=None):
        self.seen.append((x_in, t))
        x_t = x_in
        if self.chart.prediction == "edm":
            alpha, sigma = self.chart.schedule.at(t, x_in)
            x_t = alpha * x_in * ((sigma / alpha) ** 2 + self.chart.sigma_data**2).sqrt()
        return self.chart.from_x(self.oracle(x_t, t, label=label), x_t, t)


# ---- predictions


@every_chart
@pytest.mark.parametrize("shape", [(40, 2), (40, 3, 2, 2)])
def test_to_x_undoes_from_x(schedule, prediction, shape):
    denoiser = Denoiser(None, schedule, prediction, sigma_data=0.7)
    t = schedule.time(log_snrs)
    x, x_t, out = torch.randn(3, *shape, dtype=torch.float64)
    torch.testing.assert_close(denoiser.to_x(denoiser.from_x(x, x_t, t), x_t, t), x, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(denoiser.from_x(denoiser.to_x(out, x_t, t), x_t, t), out, atol=1e-10, rtol=1e-10)


@every
def test_native_output_of_each_prediction_type(schedule):
    t = schedule.time(log_snrs)
    x, z = torch.randn(2, 40, 3, dtype=torch.float64)
    x_t = schedule.add_noise(x, t, z)
    alpha, sigma = schedule.at(t, x)
    wanted = {"x": x, "v": alpha * z - sigma * x, "flow": z - x}
    if not schedule.zero_terminal_snr:
        wanted["eps"] = z
    for prediction, out in wanted.items():
        denoiser = Denoiser(None, schedule, prediction)
        torch.testing.assert_close(denoiser.from_x(x, x_t, t), out, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(denoiser.to_x(out, x_t, t), x, atol=1e-10, rtol=1e-10)


def test_edm_is_karras_preconditioning():
    schedule, sd = VE(), 0.5
    sigma = torch.tensor([0.01, 0.3, 1.0, 5.0, 40.0], dtype=torch.float64)
    t, x_t = schedule.time(-2 * sigma.log()), torch.randn(5, 2, dtype=torch.float64)
    seen = []

    class Net(nn.Module):
        def forward(self, x_in, t):
            seen.append(x_in)
            return torch.sin(x_in)

    c = sigma[:, None]
    x = Denoiser(Net(), schedule, "edm", sigma_data=sd)(x_t, t)
    torch.testing.assert_close(seen[0], x_t / (c**2 + sd**2).sqrt())
    f = torch.sin(seen[0])
    torch.testing.assert_close(x, sd**2 / (c**2 + sd**2) * x_t + c * sd / (c**2 + sd**2).sqrt() * f)
    # under VP: the same network in the chart x_t / alpha
    vp = VPLinear()
    t_vp = vp.time(-2 * sigma.log().clamp(max=4))
    alpha, s = vp.at(t_vp, x_t)
    same = Denoiser(Net(), vp, "edm", sigma_data=sd)(x_t, t_vp)
    r, y = s / alpha, x_t / alpha
    wanted = sd**2 / (r**2 + sd**2) * y + r * sd / (r**2 + sd**2).sqrt() * torch.sin(y / (r**2 + sd**2).sqrt())
    torch.testing.assert_close(same, wanted)


@every_chart
def test_finite_at_both_ends(schedule, prediction):
    denoiser = Denoiser(None, schedule, prediction)
    for dtype in (torch.float32, torch.float64):
        t, (x, x_t) = torch.tensor([0.0, 1.0], dtype=dtype), torch.randn(2, 2, 3, dtype=dtype)
        assert denoiser.to_x(x, x_t, t).isfinite().all()
        assert denoiser.from_x(x, x_t, t).isfinite().all()
        torch.testing.assert_close(denoiser.to_x(x, x_t, t)[0], x[0] if prediction == "x" else x_t[0])


@every
def test_eps_prediction_with_zero_terminal_snr_raises(schedule):
    if schedule.zero_terminal_snr:
        with pytest.raises(BadInput, match="set prediction to .v."):
            Denoiser(None, schedule, "eps")
    else:
        Denoiser(None, schedule, "eps")


def test_unknown_prediction_is_refused_with_a_suggestion():
    with pytest.raises(BadInput, match="Did you mean 'flow'"):
        Denoiser(None, VPLinear(), "flo")


def test_precision_is_the_weights_for_the_net_and_float32_around_it():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.seen = nn.Parameter(torch.ones(1, dtype=torch.bfloat16)), None

        def forward(self, x, t):
            self.seen = x.dtype, t.dtype
            return self.w * x

    net = Net()
    x = Denoiser(net, RectifiedFlow(), "flow")(torch.randn(4, 2), torch.rand(4).bfloat16())
    assert net.seen == (torch.bfloat16, torch.float32), "t must never lose its digits"
    assert x.dtype == torch.float32


# ---- the same model under another schedule


@every
@other
def test_prediction_is_unchanged_under_another_schedule(schedule, other):
    x_t, t = noisy(other, log_snrs)
    asked = mixture(schedule).with_schedule(other)
    assert asked.schedule == other
    torch.testing.assert_close(asked(x_t, t), mixture(other)(x_t, t), atol=1e-9, rtol=1e-9)
    label = torch.arange(40) % 4 - 1
    torch.testing.assert_close(asked(x_t, t, label=label), mixture(other)(x_t, t, label=label), atol=1e-9, rtol=1e-9)
    assert (asked.null({"label": label})["label"] == -1).all()


@every_chart
def test_every_prediction_of_a_perfect_network_is_exact_and_moves_between_schedules(schedule, prediction):
    denoiser = Denoiser(Perfect(schedule, prediction, 0.6), schedule, prediction, sigma_data=0.6)
    x_t, t = noisy(schedule, log_snrs)
    torch.testing.assert_close(denoiser(x_t, t), mixture(schedule)(x_t, t), atol=1e-9, rtol=1e-9)
    flow = RectifiedFlow(2.0)
    x_t, t = noisy(flow, log_snrs)
    torch.testing.assert_close(denoiser.with_schedule(flow)(x_t, t), mixture(flow)(x_t, t), atol=1e-9, rtol=1e-9)


@every
@other
def test_under_is_finite_at_both_ends(schedule, other):
    x = mixture(schedule).with_schedule(other)(torch.randn(2, 2), torch.tensor([0.0, 1.0]))
    assert x.isfinite().all()


def test_under_shares_weights():
    denoiser = Denoiser(nn.Linear(2, 2), VPLinear())
    assert list(denoiser.with_schedule(VE()).parameters())[0] is denoiser.net.weight


# ---- guidance


def test_guided_gaussians_are_the_gaussian_of_the_extrapolated_mean():
    """Equal variances: D_w is the denoiser of N(m_u + w (m_c - m_u), s^2)."""
    (m_c, m_u), std = torch.tensor([[1.0, -0.5], [0.2, 0.4]], dtype=torch.float64), 0.6
    for schedule in SCHEDULES.values():

        class Pair(Denoiser):
            def native(self, x_t, t, label):
                pair = [Gaussian(m, std, self.schedule)(x_t, t) for m in (m_u, m_c)]
                return torch.where(bcast(label >= 0, x_t), pair[1], pair[0])

        x_t, t = noisy(schedule, log_snrs)
        label = torch.zeros(40, dtype=torch.long)
        guided = Guided(Pair(None, schedule, "x"), 3.0)
        for w in (0.0, 1.0, 7.5):
            wanted = Gaussian(m_u + w * (m_c - m_u), std, schedule)(x_t, t)
            torch.testing.assert_close(guided(x_t, t, w=w, label=label), wanted, atol=1e-8, rtol=1e-8)
        wanted = Gaussian(m_u + 3 * (m_c - m_u), std, schedule)(x_t, t)
        torch.testing.assert_close(guided(x_t, t, label=label), wanted, atol=1e-8, rtol=1e-8)


@every
@pytest.mark.parametrize("w", [0.0, 1.0, 7.5, "per sample"])
def test_guided_mixture_is_the_linear_combination(schedule, w):
    x_t, t = noisy(schedule, log_snrs)
    label = torch.arange(40) % 3
    oracle = mixture(schedule)
    w = torch.linspace(0, 8, 40, dtype=torch.float64) if w == "per sample" else w
    uncond, cond = oracle(x_t, t), torch.stack([Gaussian(MEANS[k], STDS[k], schedule)(x_t, t) for k in range(3)])
    cond = cond[label, torch.arange(40)]
    wanted = uncond + (w[:, None] if torch.is_tensor(w) else w) * (cond - uncond)
    torch.testing.assert_close(Guided(oracle, w)(x_t, t, label=label), wanted, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(Guided(oracle)(x_t, t, w=w, label=label), wanted, atol=1e-9, rtol=1e-9)


def test_guidance_costs_one_call_and_at_w_1_one_evaluation():
    net = Perfect(RectifiedFlow(), "flow")
    denoiser = Denoiser(net, RectifiedFlow(), "flow")
    x_t, t, label = torch.randn(5, 2), torch.rand(5), torch.zeros(5, dtype=torch.long)
    guided = Guided(denoiser)
    torch.testing.assert_close(guided(x_t, t, label=label), denoiser(x_t, t, label=label))
    net.seen.clear()
    guided(x_t, t, label=label)
    guided(x_t, t, w=2.0, label=label)
    guided(x_t, t, w=torch.ones(5), label=label)
    assert [len(x) for x, _ in net.seen] == [5, 10, 10]


def test_guided_images_and_the_null_of_the_net():
    class Net(nn.Module):
        def forward(self, x, t, text):
            return x * 0 + text.mean((1, 2))[:, None, None, None]

        def null(self, cond):
            return {"text": torch.zeros_like(cond["text"])}

    guided = Guided(Denoiser(Net(), VPCosine(), "x"), w=torch.tensor([0.0, 1.0, 4.0]))
    out = guided(torch.randn(3, 3, 4, 4), torch.rand(3), text=torch.full((3, 5, 2), 2.0))
    assert out.shape == (3, 3, 4, 4)
    torch.testing.assert_close(out[:, 0, 0, 0], torch.tensor([0.0, 2.0, 8.0]))


def test_guidance_composes_with_a_change_of_schedule():
    label = torch.arange(40) % 3
    x_t, t = noisy(VE(), log_snrs)
    a = Guided(mixture(VPLinear()), 3.0).with_schedule(VE())(x_t, t, label=label)
    b = Guided(mixture(VPLinear()).with_schedule(VE()), 3.0)(x_t, t, label=label)
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(a, Guided(mixture(VE()), 3.0)(x_t, t, label=label), atol=1e-9, rtol=1e-9)


# ---- oracles


def oracles(schedule):
    return [Gaussian([0.5, -1.0], [0.4, 0.9], schedule), mixture(schedule)]


@every
def test_score_is_the_gradient_of_log_prob(schedule):
    x_t, t = noisy(schedule, log_snrs)
    for oracle in oracles(schedule):
        for label in (None, torch.arange(40) % 4 - 1):
            x = x_t.clone().requires_grad_()
            (grad,) = torch.autograd.grad(oracle.log_prob(x, t, label=label).sum(), x)
            score = schedule.score(oracle(x_t, t, label=label), x_t, t)
            torch.testing.assert_close(score, grad, atol=1e-8, rtol=1e-8)


@every
def test_log_prob_is_normalised(schedule):
    """The integral over the line is 1 and the mean is alpha_t E[x]."""
    oracle = GaussianMixture([[-1.0], [0.5]], [0.2, 0.4], [1.0, 3.0], schedule=schedule)
    for t in (0.0, 0.3, 0.9):
        alpha, sigma = schedule(torch.tensor([t], dtype=torch.float64))
        x = torch.linspace(-9, 9, 4_001, dtype=torch.float64)[:, None] * (alpha + sigma)
        p = oracle.log_prob(x, torch.full((len(x),), t, dtype=torch.float64)).exp()
        assert torch.trapezoid(p, x[:, 0]).item() == pytest.approx(1, abs=1e-6)
        mean = torch.trapezoid(p * x[:, 0], x[:, 0]).item()
        assert mean == pytest.approx(alpha.item() * (-0.25 + 0.375), abs=1e-6 * sigma.item() + 1e-6)


@every
def test_posterior_mean_by_quadrature(schedule):
    """E[x | x_t] = int x p(x) N(x_t; alpha x, sigma^2) dx / int p(x) N(x_t; alpha x, sigma^2) dx."""
    oracle = GaussianMixture([[-1.0], [0.5]], [0.2, 0.4], [0.25, 0.75], schedule=schedule)
    x = torch.linspace(-5, 5, 4_001, dtype=torch.float64)[:, None]
    p = oracle.log_prob(x, torch.zeros(len(x), dtype=torch.float64))
    x_t, t = noisy(schedule, torch.linspace(-4, 4, 7, dtype=torch.float64), dim=1)
    for y, time in zip(x_t, t):
        alpha, sigma = schedule(time[None])
        weight = (p - 0.5 * ((y - alpha * x[:, 0]) / sigma) ** 2).softmax(0)
        assert oracle(y[None], time[None]).item() == pytest.approx((weight * x[:, 0]).sum().item(), abs=1e-8)


def test_gaussian_is_a_mixture_of_one_and_works_on_images():
    x_t, t = noisy(VPLinear(), log_snrs)
    one, same = Gaussian([0.5, -1.0], 0.4, VPLinear()), GaussianMixture([[0.5, -1.0]], 0.4, schedule=VPLinear())
    torch.testing.assert_close(one(x_t, t), same(x_t, t))
    torch.testing.assert_close(one.log_prob(x_t, t), same.log_prob(x_t, t))
    images = Gaussian(torch.randn(3, 2, 2), 0.4, VPLinear())
    x = torch.randn(40, 3, 2, 2)
    assert images(x, t).shape == x.shape and images.log_prob(x, t).shape == (40,)
    assert images.flow_map(x, t, t / 2).shape == x.shape and images.sample(7)[0].shape == (7, 3, 2, 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exact_denoisers_keep_the_input_precision(dtype):
    for oracle in oracles(VE()):
        x, t = torch.randn(3, 2, dtype=dtype), torch.rand(3, dtype=dtype)
        assert oracle(x, t).dtype == oracle.log_prob(x, t).dtype == dtype
        assert oracle.sample(3, dtype=dtype)[0].dtype == dtype
        assert not list(oracle.parameters())


@every
def test_flow_map_keeps_quantiles(schedule):
    """In one dimension the flow carries the p-quantile of p_t to the p-quantile of p_s, in both tails too."""
    oracle = GaussianMixture([[-1.0], [0.5]], [0.2, 0.4], [0.25, 0.75], schedule=schedule)

    def cdf(x, t):
        alpha, sigma = schedule(t)
        v = ((alpha * oracle.stds[:, None]) ** 2 + sigma**2).sqrt()
        return (oracle.log_weights.exp()[:, None] * torch.special.ndtr((x[:, 0] - alpha * oracle.means) / v)).sum(0)

    alpha, sigma = schedule(torch.ones(1, dtype=torch.float64))
    x_t = torch.linspace(-3, 3, 25, dtype=torch.float64)[:, None] * (alpha**2 + sigma**2).sqrt()
    t, s = torch.ones(25, dtype=torch.float64), torch.linspace(0, 1, 25, dtype=torch.float64)
    x_s = oracle.flow_map(x_t, t, s)
    torch.testing.assert_close(cdf(x_s, s), cdf(x_t, t), atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(oracle.flow_map(x_s, s, t), x_t, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(oracle.flow_map(2 * x_t, t, t), 2 * x_t, atol=1e-9, rtol=1e-9)


@every
def test_flow_map_follows_the_velocity(schedule):
    """d/ds flow_map at s = t is the velocity, and the mixture's map is the Gaussian's when it has one component."""
    x_t, t = noisy(schedule, torch.linspace(-4, 4, 20, dtype=torch.float64), dim=1)
    one, pair = Gaussian([0.4], 0.7, schedule), GaussianMixture([[-1.0], [0.5]], [0.3, 0.4], schedule=schedule)
    h = 1e-5
    for oracle in (one, pair):
        slope = (oracle.flow_map(x_t, t, t + h) - oracle.flow_map(x_t, t, t - h)) / (2 * h)
        velocity = schedule.velocity(oracle(x_t, t), x_t, t)
        torch.testing.assert_close(slope, velocity, atol=1e-6, rtol=1e-6)
    same = GaussianMixture([[0.4]], 0.7, schedule=schedule)
    s = torch.rand(20, dtype=torch.float64)
    torch.testing.assert_close(same.flow_map(x_t, t, s), one.flow_map(x_t, t, s), atol=1e-9, rtol=1e-9)
    labels = torch.arange(20) % 2
    single = torch.where(
        labels[:, None] == 0, *(Gaussian([m], d, schedule).flow_map(x_t, t, s) for m, d in ((-1.0, 0.3), (0.5, 0.4)))
    )
    torch.testing.assert_close(pair.flow_map(x_t, t, s, label=labels), single, atol=1e-9, rtol=1e-9)


def test_samples_have_the_moments_of_the_law():
    n, g = 100_000, torch.Generator().manual_seed(0)
    x, label = mixture(VE()).sample(n, g, torch.float64)
    means, stds, weights = (torch.tensor(a, dtype=torch.float64) for a in (MEANS, STDS, WEIGHTS))
    assert (label.bincount() / n - weights).abs().max() < 5 * (0.25 / n) ** 0.5
    for k in range(3):
        own = x[label == k]
        assert (own.mean(0) - means[k]).abs().max() < 5 * stds[k] / len(own) ** 0.5
        assert (own.std(0) / stds[k] - 1).abs().max() < 5 / (2 * len(own)) ** 0.5
    x, label = Gaussian([0.5, -1.0], [0.4, 0.9], VE()).sample(n, g, torch.float64)
    std = torch.tensor([0.4, 0.9], dtype=torch.float64)
    assert ((x.mean(0) - torch.tensor([0.5, -1.0])) / std).abs().max() < 5 / n**0.5
    assert (x.std(0) / std - 1).abs().max() < 5 / (2 * n) ** 0.5
    assert (label == 0).all()


def test_sampling_repeats_with_its_generator():
    for oracle in oracles(VE()):
        a, b = (oracle.sample(16, torch.Generator().manual_seed(3)) for _ in range(2))
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1])


def test_ring():
    ring = GaussianMixture.ring(modes=4, radius=2.0, std=0.05, schedule=RectifiedFlow())
    wanted = torch.tensor([[2.0, 0], [0, 2], [-2, 0], [0, -2]], dtype=torch.float64)
    torch.testing.assert_close(ring.means, wanted, atol=1e-12, rtol=0)
    x, label = ring.sample(1000)
    assert ((x - wanted[label].float()).norm(dim=1) < 0.05 * 6).all()


@pytest.mark.parametrize(
    "build,words",
    [
        (lambda: Gaussian([0.0], 0.0, VE()), "std must be positive"),
        (lambda: GaussianMixture([[0.0]], [-1.0], schedule=VE()), "std must be positive"),
        (lambda: GaussianMixture([[0.0]], 1.0, [0.0], schedule=VE()), "weights must be positive"),
        (lambda: GaussianMixture([0.0, 1.0], 1.0, schedule=VE()), "one row per component"),
        (lambda: mixture(VE()).flow_map(torch.zeros(1, 2), torch.ones(1), torch.ones(1)), "one-dimensional"),
    ],
)
def test_invalid_parameters_of_exact_denoisers_raise(build, words):
    with pytest.raises(BadInput, match=words):
        build()


@every
def test_forward_mode_derivatives_in_x_and_t(schedule):
    """Continuous-time methods take the JVP of a denoiser along the flow: against central differences."""
    denoiser = Denoiser(Perfect(schedule, "v"), schedule, "v")
    x_t, t = noisy(schedule, torch.linspace(-3, 3, 8, dtype=torch.float64))
    d_x, d_t, h = torch.randn_like(x_t), torch.rand_like(t), 1e-6
    x, tangent = torch.func.jvp(denoiser, (x_t, t), (d_x, d_t))
    central = (denoiser(x_t + h * d_x, t + h * d_t) - denoiser(x_t - h * d_x, t - h * d_t)) / (2 * h)
    torch.testing.assert_close(x, mixture(schedule)(x_t, t), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(tangent, central, atol=1e-5, rtol=1e-5)


def test_score_far_from_the_data_is_finite():
    x_t = torch.tensor([[1e4, -1e4]], dtype=torch.float64)
    assert mixture(VPLinear())(x_t, torch.tensor([1e-4], dtype=torch.float64)).isfinite().all()
    assert math.isfinite(mixture(VPLinear()).log_prob(x_t, torch.tensor([1e-4], dtype=torch.float64)).item())
