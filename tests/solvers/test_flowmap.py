"""Flow maps: the step is exact for the exact map, and straight-path coordinates agree for all schedules."""

import pytest
import torch

from distill.denoise import Denoiser, Gaussian
from distill.errors import BadInput
from distill.noise import VE, RectifiedFlow, Table, TrigFlow, VPCosine, VPLinear
from distill.solvers import DDIM, solve
from distill.solvers.flowmap import FlowMap, path_tangent, predicted_flow, straight_time

SCHEDULES = {
    "flow": RectifiedFlow(),
    "shift": RectifiedFlow(3.0),
    "cosine": VPCosine(),
    "linear": VPLinear(),
    "trig": TrigFlow(0.5),
    "ve": VE(),
    "table": Table([0.9, 0.6, 0.3, 0.05]),
}
every = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
MEAN, STD = 0.3, 0.6


class Exact(Denoiser):
    """The flow map of a Gaussian: the x whose DDIM step to s is the exact flow."""

    def __init__(self, schedule):
        super().__init__(None, schedule, "x")
        self.oracle = Gaussian([MEAN], STD, schedule)

    def native(self, x_t, t, s):
        jump = DDIM().invert(self.schedule, self.oracle.flow_map(x_t, t, s), x_t, t, s)
        return torch.where((s == t)[:, None], self.oracle(x_t, t), jump)


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


@every
@pytest.mark.parametrize("times", [[1, 0], [1, 0.6, 0.1, 0]])
def test_any_number_of_steps_is_exact(schedule, times):
    model = Exact(schedule)
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None] * schedule.sigma(f64(1.0))
    exact = model.oracle.flow_map(z, torch.ones(9).double(), torch.zeros(9).double())
    torch.testing.assert_close(solve(model, z, times, FlowMap()), exact, atol=1e-11, rtol=0)


@every
@pytest.mark.parametrize("gamma", [0.3, 1.0])
def test_gamma_keeps_the_marginal(schedule, gamma):
    model, t, s = Exact(schedule), f64(0.9), f64(0.4)
    m = lambda a: schedule.alpha(a) * MEAN
    one, none = torch.ones(1, 1).double(), torch.zeros(1, 1).double()
    step = lambda x, noise: FlowMap(gamma)(model, x, t, s, noise=noise).squeeze()
    base, fresh = step(none + m(t), none), 0
    slope, fresh = step(one + m(t), none) - base, step(none + m(t), one) - base
    v = lambda a: (schedule.alpha(a) * STD).square() + schedule.sigma(a).square()
    torch.testing.assert_close(base, m(s)[0], atol=1e-12, rtol=0)
    torch.testing.assert_close(slope**2 * v(t)[0] + fresh**2, v(s)[0], atol=1e-12, rtol=1e-12)


def test_gamma_outside_its_range_or_without_noise_is_refused():
    with pytest.raises(BadInput, match=r"within \[0, 1\]"):
        FlowMap(1.5)
    with pytest.raises(BadInput, match="stochastic"):
        FlowMap(0.5)(Exact(RectifiedFlow()), torch.ones(1, 1), torch.ones(1), torch.zeros(1))


@every
def test_the_output_is_the_average_velocity_in_the_chart(schedule):
    model, t, s = Exact(schedule), f64(0.9, 0.5, 1.0), f64(0.2, 0.1, 0.0)
    x_t = f64(1.0, -0.7, 0.4)[:, None]
    y = lambda x, a: x / sum(schedule.at(a, x))
    x_s = FlowMap()(model, x_t, t, s)
    gap = (straight_time(schedule, t) - straight_time(schedule, s))[:, None]
    torch.testing.assert_close(y(x_s, s), y(x_t, t) - gap * predicted_flow(model, x_t, t, s=s), atol=1e-12, rtol=1e-12)


@every
def test_along_is_the_derivative_on_a_straight_path(schedule):
    x, z, t = f64(0.7)[:, None], f64(-0.4)[:, None], f64(0.6)
    x_t = schedule.add_noise(x, t, z)
    dx, dt = path_tangent(schedule, z - x, x_t, t)
    h = 1e-6
    r = (straight_time(schedule, t + h) - straight_time(schedule, t - h)) / (2 * h)
    moved = (schedule.add_noise(x, t + h, z) - schedule.add_noise(x, t - h, z)) / (2 * h)
    torch.testing.assert_close(dt, 1 / r, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(dx, moved / r, atol=1e-6, rtol=1e-6)


@every
@pytest.mark.parametrize("prediction", ["x", "v", "flow"])
def test_flow_reads_any_prediction(schedule, prediction):
    class Net(torch.nn.Module):
        def forward(self, x, t):
            return x / 3 + t[:, None]

    model, t, x_t = Denoiser(Net(), schedule, prediction), f64(0.3, 0.8), f64(1.0, -2.0)[:, None]
    x = model(x_t, t)
    torch.testing.assert_close(predicted_flow(model, x_t, t), schedule.eps(x, x_t, t) - x, atol=1e-12, rtol=1e-12)
