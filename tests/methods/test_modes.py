"""A student that starts with one of two modes: the Jensen-Shannon divergence must find the other."""

from __future__ import annotations

import pytest
import torch

from distill.data.toy import Samples
from distill.denoise import Denoiser, GaussianMixture
from distill.losses.regression import mse
from distill.methods import DMD2
from distill.models.small import MLP
from distill.noise import RectifiedFlow
from distill.training.trainer import fit

FLOW = RectifiedFlow()


def learn(network, loss, steps=300):
    optimizer = torch.optim.Adam(network.parameters(), 1e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


@pytest.mark.slow
def test_js_finds_the_mode_that_its_student_never_draws():
    torch.manual_seed(0)
    teacher = GaussianMixture([[-1.0], [1.0]], 0.2, schedule=FLOW)
    student, critic = (Denoiser(MLP(dim=1, width=64, depth=2), FLOW, "flow") for _ in range(2))

    def right_alone():
        z = torch.randn(256, 1)
        return mse(student(z, torch.ones(256)), 1 + 0.2 * z)

    def its_law():
        x, t = 1 + 0.2 * torch.randn(256, 1), 0.02 + 0.96 * torch.rand(256)
        return mse(critic(FLOW.add_noise(x, t, torch.randn(256, 1)), t), x)

    learn(student, right_alone)
    learn(critic, its_law)
    optim = {r: {"lr": lr, "betas": [0, 0.95]} for r, lr in (("critic", 1e-3), ("head", 1e-3), ("student", 5e-4))}
    method = DMD2(
        {"teacher": teacher, "student": student, "critic": critic},
        grid=1,
        student_every=2,
        divergence="js",
        critic_adversarial=0.0,
        layers="leave.input",
        ema=0.99,
        optim=optim,
    )
    left = lambda: float((method.sample(torch.randn(4000, 1), {}) < 0).float().mean())  # noqa: E731
    assert left() == 0
    fit(method, Samples(teacher, batch_size=256, classes=0), steps=600)
    assert 0.4 < left() < 0.6
