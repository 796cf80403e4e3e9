"""SiD with exact critics: sign, optimum, guidance, gradient through frozen scores to the student alone."""

import copy

import pytest
import torch
from affine import Affine, Labelled, in_turn, of_gaussian, pull, touched

from distill.denoise import Denoiser
from distill.methods import SiD
from distill.models.small import MLP
from distill.noise import RectifiedFlow

D = torch.float64


def exact(mean, std, teacher=None, **options):
    roles = {"teacher": teacher or of_gaussian(0, 1), "student": Affine(mean, std), "critic": of_gaussian(mean, std)}
    return SiD(roles, **options)


def loss(method, cond=None, n=20_000):
    torch.manual_seed(0)
    return method.student_loss(*method.draw(None, torch.randn(n, 1, dtype=D), cond or {}))


def test_the_optimum_has_exactly_no_gradient():
    method = exact(0.0, 1.0)
    assert pull(method, lambda: loss(method)) == (0.0, 0.0)


@pytest.mark.parametrize("alpha", [0.5, 1.0])
@pytest.mark.parametrize(("mean", "std"), [(0.4, 1), (-0.4, 1), (0, 1.5), (0, 0.6)])
def test_descent_undoes_a_perturbation(mean, std, alpha):
    method = exact(mean, std, alpha=alpha)
    m, g = pull(method, lambda: loss(method))
    if mean:
        assert m * mean > 0.02
    else:
        assert g * (std - 1) > 0.02


def test_guidance_extrapolates_the_mean():
    cond = {"label": torch.zeros(500, dtype=torch.long)}
    for w, still in ((3.0, True), (2.0, False), (4.0, False)):
        method = exact(1.1, 0.8, Labelled([0.5], 0.2, 0.8), guidance=w)
        m, _ = pull(method, lambda: loss(method, cond, 500))  # noqa: B023
        assert (abs(m) < 1e-10) == still


def small(**options):
    net = Denoiser(MLP(2, 16, 2), RectifiedFlow()).double()
    roles = {role: copy.deepcopy(net) for role in ("teacher", "student", "critic")}
    for role in ("student", "critic"):
        torch.nn.init.normal_(roles[role].net.leave.weight)
    return SiD(roles, **options).double()


@pytest.mark.parametrize("grid", [1, 3])
def test_each_turn_reaches_its_own_role_alone(grid):
    method = small(grid=grid)
    shared = method.draw(None, torch.randn(8, 2, dtype=D), {})
    for role, call in (("critic", method.critic_loss), ("student", method.student_loss)):
        in_turn(method, role)
        call(*shared).backward()
        assert touched(method) == {role}


def test_the_student_sees_through_both_scores():
    """Blocking either network's input gradient changes what the student is told."""
    method = small()
    z = torch.randn(64, 2, dtype=D)

    def grads():
        torch.manual_seed(0)
        in_turn(method, "student")
        method.student_loss(None, z, {}).backward()
        return torch.cat([p.grad.flatten() for p in method.student.parameters() if p.grad is not None])

    whole = grads()
    for name in ("guided", "critic"):
        net = getattr(method, name)
        forward = net.forward
        net.forward = lambda x, t, forward=forward, **c: forward(x.detach(), t, **c)
        assert not torch.allclose(whole, grads(), rtol=1e-3)
        net.forward = forward
    assert torch.allclose(whole, grads())


def test_the_students_turn_draws_fresh_noise():
    method, z = small(), torch.randn(8, 2, dtype=D)
    seen = []
    simulate = method.simulate
    method.simulate = lambda z, cond: (seen.append(z), simulate(z, cond))[1]
    method.critic_loss(None, z, {})
    method.student_loss(None, z, {})
    assert torch.equal(seen[0], z) and not torch.equal(seen[1], z)
