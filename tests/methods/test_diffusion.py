"""Training a teacher: its optimum is E[x | x_t] in every chart, and labels are dropped at the stated share."""

import pytest
import torch
from affine import of_gaussian
from points import D, at, columns, critic_of

from distill.denoise import Denoiser
from distill.methods import Diffusion
from distill.models.small import MLP
from distill.noise import VE, RectifiedFlow, VPLinear

MEAN, STD = 0.4, 0.7


@pytest.mark.parametrize("prediction", ["eps", "x", "v", "flow", "edm"])
@pytest.mark.parametrize("schedule", [RectifiedFlow(), VPLinear(), VE()], ids=lambda s: type(s).__name__)
def test_the_optimum_is_the_exact_denoiser(schedule, prediction):
    """Data MEAN + STD times a sign and noise of signs: the affine denoiser has no gradient, one beside it is sent back."""
    if prediction == "eps" and schedule.zero_terminal_snr:
        pytest.skip("eps does not determine x there")
    sign, z = columns(2)
    for log_snr in (3.0, 0.0, -2.0):
        t = schedule.time(torch.tensor([log_snr], dtype=D)).item()
        model = critic_of(of_gaussian(MEAN, STD, schedule=schedule), prediction)
        method = Diffusion({"student": model}, density=at(t))
        network = method.student.net
        slopes = lambda: torch.autograd.grad(method.loss(MEAN + STD * sign, z, {}), [network.off, network.gain])  # noqa: B023
        assert max(abs(float(slope)) for slope in slopes()) < 1e-12
        for off in (0.1, -0.1):
            with torch.no_grad():
                network.off.fill_(off)
            assert slopes()[0] * off > 0


def test_the_loss_is_the_mean_squared_error_of_the_native_output():
    """Flow matching by hand: |N - (z - x)|^2 at x_t = (1 - t) x + t z."""
    method = Diffusion({"student": Denoiser(MLP(2, 8, 1), RectifiedFlow(), "flow").double()}, density=at(0.3))
    x, z = torch.randn(2, 5, 2, dtype=D)
    with torch.no_grad():
        out = method.student.net(0.7 * x + 0.3 * z, torch.full((5,), 0.3, dtype=D))
    assert method.loss(x, z, {}).item() == pytest.approx((out - (z - x)).square().mean().item(), rel=1e-12)


def test_times_reach_noise_and_nearly_data():
    method = Diffusion({"student": Denoiser(MLP(2, 8, 1), RectifiedFlow())})
    t = method.density(10_000)
    assert 1e-3 <= t.min() < 3e-3 and t.max() > 0.998 and abs(t.mean() - 0.5) < 0.02


@pytest.mark.parametrize("share", [0.0, 0.25])
def test_labels_are_dropped_at_the_stated_share(share):
    method, seen = Diffusion({"student": Denoiser(MLP(1, 8, 1, classes=3), RectifiedFlow())}, drop_label=share), []
    method.student.net.register_forward_hook(lambda net, args, kw, out: seen.append(kw.get("label")), with_kwargs=True)
    method.loss(torch.randn(4000, 1), torch.randn(4000, 1), {"label": torch.full((4000,), 2)})
    dropped = (seen[0] < 0).float().mean()
    assert abs(dropped - share) < 0.03 and ((seen[0] < 0) | (seen[0] == 2)).all()
    assert (dropped == 0) == (share == 0)
    method.loss(torch.randn(4, 1), torch.randn(4, 1), {})  # data without labels


def test_default_share_and_grid():
    method = Diffusion({"student": Denoiser(MLP(1, 8, 1), RectifiedFlow())})
    assert (
        method.drop_label == 0.1
        and method.grid.steps == 50
        and method.trainable == ("student",)
        and method.frozen == ()
    )
