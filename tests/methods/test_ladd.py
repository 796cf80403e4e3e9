"""LADD: who gets gradient, where its inputs come from, the distillation term of ADD without the teacher's Jacobian."""

import copy

import pytest
import torch
from affine import Affine, in_turn, of_gaussian, pull, touched

from distill.denoise import Denoiser
from distill.errors import BadInput
from distill.methods import LADD
from distill.models.small import MLP
from distill.noise import RectifiedFlow
from distill.times import Uniform

D = torch.float64


def net():
    d = Denoiser(MLP(2, 16, 2), RectifiedFlow()).double()
    torch.nn.init.normal_(d.net.leave.weight)
    return d


def small(features=False, **options):
    roles = {"teacher": net(), "student": net()} | ({"features": net()} if features else {})
    return LADD(roles, layers="leave.input", **options).double()


@pytest.mark.parametrize("features", [False, True])
@pytest.mark.parametrize("simulate", [False, True])
def test_each_turn_reaches_its_own_role_alone(features, simulate):
    method = small(features, grid=3, r1=0.1, r1_step=None, simulate=simulate, distillation=1.0)
    shared = method.draw(torch.randn(8, 2, dtype=D), torch.randn(8, 2, dtype=D), {})
    for role, call in (("head", method.head_loss), ("student", method.student_loss)):
        in_turn(method, role)
        call(*shared).backward()
        assert touched(method) == {role}


def test_the_student_moves_towards_what_the_head_calls_real():
    method = small(grid=1)
    shared = method.draw(torch.randn(64, 2, dtype=D), torch.randn(64, 2, dtype=D), {})
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        in_turn(method, "student")
        losses.append(method.student_loss(*shared))
        losses[-1].backward()
        with torch.no_grad():
            for p in method.student.parameters():
                if p.grad is not None:
                    p -= 1e-2 * p.grad
    assert losses[1] < losses[0]


def test_inputs_are_noised_data_at_the_grids_times_and_pure_noise_at_its_start():
    method = small(grid=3)
    x, z = torch.randn(300, 2, dtype=D), torch.randn(300, 2, dtype=D)
    x_t, t = method.from_data(x, z)
    assert {round(a, 4) for a in t.tolist()} == {1.0, 0.6667, 0.3333}
    assert torch.equal(x_t[t == 1], z[t == 1])
    assert torch.allclose(x_t, torch.where((t == 1)[:, None], z, RectifiedFlow().add_noise(x, t, z)))


def test_distillation_alone_contracts_the_variance_and_has_no_jacobian():
    """ADD's check: E-gradient on x is 2 alpha (1 - k)(x - mu) for a Gaussian teacher, so the scale must fall."""
    roles = {"teacher": of_gaussian(0.3, 1), "student": Affine(0.3, 1)}
    roles |= {"features": net(), "head": torch.nn.Linear(1, 1)}
    method = LADD(roles, grid=1, layers="leave.input", distillation=1.0, density=Uniform(0.4, 0.4 + 1e-9))
    method.logit = lambda x_u, u, cond: torch.zeros(len(x_u), 1, dtype=D)
    torch.manual_seed(0)
    z = torch.randn(20_000, 1, dtype=D)
    z = torch.cat([z, -z])

    def loss():
        return method.student_loss(*method.draw(torch.zeros_like(z), z, {}))

    m, g = pull(method, loss)
    alpha, sigma = 0.6, 0.4
    k = alpha**2 / (alpha**2 + sigma**2)
    assert g == pytest.approx(2 * alpha * (1 - k), rel=0.05) and g > 0
    assert abs(m) < 0.02


def test_the_student_waits_for_its_turn_and_bad_options_are_refused():
    method = small(grid=1, head_turns=3)
    turns = [[role for role, _ in method.turns(step)] for step in range(3)]
    assert turns == [["head"], ["head"], ["head", "student"]]
    with pytest.raises(BadInput, match="form 'hing'"):
        small(grid=1, form="hing")
    with pytest.raises(BadInput, match="no network"):
        LADD({"teacher": of_gaussian(0, 1), "student": copy.deepcopy(net())}, grid=1)
