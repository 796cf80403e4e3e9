"""Diversity-rewarded distillation: guidance as mean extrapolation, on-policy, the reward's direction, gradients."""

import pytest
import torch
from affine import Affine, Labelled, in_turn, touched
from torch import nn

from distill.denoise import Denoiser
from distill.losses.diversity import diversity
from distill.methods import DiversityRewarded
from distill.models.small import MLP
from distill.noise import RectifiedFlow

D = torch.float64


class Shift(Affine):
    """The exact guided denoiser of a labelled Gaussian, plus a trainable shift m."""

    def __init__(self, mean, std):
        super().__init__(0.0, 0.0)
        self.exact = [Labelled([mean], mean, std)]

    def forward(self, x_t, t, **cond):
        return self.exact[0](x_t, t) + self.m

    native = forward


def test_guidance_extrapolates_the_mean():
    """m_c = .5, m_u = .2, w = 3: the student that denoises N(1.1, s^2) has no loss and no gradient."""
    for w, still in ((3.0, True), (2.0, False), (4.0, False)):
        roles = {"teacher": Labelled([0.5], 0.2, 0.8), "student": Shift(1.1, 0.8)}
        method = DiversityRewarded(roles, grid=4, guidance=w)
        in_turn(method, "student")
        cond = {"label": torch.zeros(64, dtype=torch.long)}
        loss = method.loss(*method.draw(None, torch.randn(64, 1, dtype=D), cond))
        loss.backward()
        assert (loss.item() < 1e-20 and abs(method.student.m.grad.item()) < 1e-10) == still


def small(**options):
    roles = {role: Denoiser(MLP(2, 16, 2, classes=3), RectifiedFlow()).double() for role in ("teacher", "student")}
    for role in roles.values():
        nn.init.normal_(role.net.leave.weight, std=0.3)
    return DiversityRewarded(roles, **({"grid": 3, "guidance": 2.0} | options)).double()


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_only_the_student_gets_gradient_and_the_path_has_none(reward):
    method = small(reward=reward)
    path, cond, conditions = method.draw(None, torch.randn(4, 2, dtype=D), {"label": torch.tensor([0, 1, 2, -1])})
    assert path.shape == (4, 8, 2) and not path.requires_grad
    assert cond["label"].tolist() == [0, 1, 2, -1] * 2, "pairs share their condition"
    in_turn(method, "student")
    method.loss(path, cond, conditions).backward()
    assert touched(method) == {"student"}


def test_the_path_is_the_students_own_and_its_last_prediction_the_sample():
    method = small()
    z = torch.randn(4, 2, dtype=D)
    path, cond, conditions = method.draw(None, z, {})
    method.ema = method.student
    assert torch.allclose(path[-1][:4], method.sample(z, {}))
    with torch.no_grad():
        t = torch.full((8,), 1 / 3, dtype=D)
        assert torch.allclose(method.student(path[-2], t), path[-1])


def test_the_reward_makes_pairs_differ():
    method = small(reward=100.0)
    shared = method.draw(None, torch.randn(32, 2, dtype=D), {})

    def found():
        with torch.no_grad():
            x = method.student(shared[0][-2], torch.full((64,), 1 / 3, dtype=D))
        return diversity(*x.chunk(2)).mean()

    before = found()
    in_turn(method, "student")
    method.loss(*shared).backward()
    with torch.no_grad():
        for p in method.student.parameters():
            if p.grad is not None:
                p -= 1e-4 * p.grad
    assert found() > before


def test_features_are_frozen_and_used():
    features = nn.Linear(2, 5).double()
    roles = {role: Denoiser(MLP(2, 16, 2), RectifiedFlow()).double() for role in ("teacher", "student")}
    method = DiversityRewarded(roles | {"features": features}, grid=2, reward=1.0).double()
    in_turn(method, "student")
    method.loss(*method.draw(None, torch.randn(4, 2, dtype=D), {})).backward()
    assert touched(method) == {"student"} and not features.weight.requires_grad
