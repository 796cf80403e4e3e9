"""Overshoot preserves the distribution of the noised data when its denoising steps are exact."""

import pytest
import torch

from distill.denoise import Denoiser, Gaussian
from distill.noise import RectifiedFlow, TrigFlow, VPCosine, VPLinear
from distill.solvers import DDIM, Overshoot

STD = 0.6


class Jump(Denoiser):
    """The x whose DDIM step of twice the length is the exact flow."""

    def __init__(self, schedule, length):
        super().__init__(None, schedule, "x")
        self.oracle, self.length = Gaussian([0.0], STD, schedule), length

    def native(self, x_t, t):
        u = (t - 2 * self.length).clamp(min=0)
        return DDIM().invert(self.schedule, self.oracle.flow_map(x_t, t, u), x_t, t, u)


@pytest.mark.parametrize("schedule", [RectifiedFlow(), VPCosine(), VPLinear(), TrigFlow()], ids=repr)
@pytest.mark.parametrize("k", [4, 3, 2])
def test_the_marginal_is_exact_after_every_step(schedule, k):
    t, s = torch.full((1,), k / 4, dtype=torch.float64), torch.full((1,), (k - 1) / 4, dtype=torch.float64)
    one, none = torch.ones(1, 1, dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64)
    step = lambda x, noise: Overshoot()(Jump(schedule, 0.25), x, t, s, noise=noise).squeeze()
    slope, fresh = step(one, none), step(none, one)
    v = lambda a: (schedule.alpha(a) * STD).square() + schedule.sigma(a).square()
    torch.testing.assert_close(slope**2 * v(t)[0] + fresh**2, v(s)[0], atol=1e-12, rtol=0)
    assert fresh > 0


def test_the_last_step_is_ddim_without_noise():
    oracle = Gaussian([0.3], STD, RectifiedFlow())
    x, t, s = torch.randn(5, 1), torch.full((5,), 0.25), torch.zeros(5)
    assert torch.equal(Overshoot()(oracle, x, t, s, noise=torch.randn(5, 1)), DDIM()(oracle, x, t, s))
