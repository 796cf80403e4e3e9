"""MMD-DDM: the gradient through K steps, the moments of an affine student's optimum, features, who gets gradient."""

import pytest
import torch
from affine import Affine, in_turn, of_gaussian, touched
from torch import nn

from distill.denoise import Denoiser
from distill.errors import BadInput
from distill.methods import MMD
from distill.models.small import MLP
from distill.noise import RectifiedFlow

D = torch.float64


def small(**options):
    teacher, student = (Denoiser(MLP(2, 16, 2), RectifiedFlow()).double() for _ in range(2))
    return MMD({"teacher": teacher, "student": student}, **options).double()


def test_the_gradient_through_all_steps_equals_finite_differences():
    method = small(grid=3)
    torch.manual_seed(0)
    z, data = torch.randn(16, 2, dtype=D), torch.randn(16, 2, dtype=D)
    in_turn(method, "student")
    method.loss(data, z, {}).backward()
    p = method.student.net.enter.weight
    for i in (0, 7):
        with torch.no_grad():
            values = []
            for step in (1e-5, -2e-5):
                p.view(-1)[i] += step
                values.append(method.loss(data, z, {}))
            p.view(-1)[i] += 1e-5
        assert ((values[0] - values[1]) / 2e-5).item() == pytest.approx(p.grad.view(-1)[i].item(), rel=1e-5, abs=1e-9)


def test_recomputing_changes_memory_and_nothing_else():
    method = small(grid=3)
    z, data, grads = torch.randn(16, 2, dtype=D), torch.randn(16, 2, dtype=D), []
    for method.recompute in (True, False):
        in_turn(method, "student")
        method.loss(data, z, {}).backward()
        grads.append(torch.cat([p.grad.flatten() for p in method.student.parameters() if p.grad is not None]))
    assert torch.equal(*grads)


def test_recomputing_evaluates_the_student_twice_in_training_and_k_times_in_sampling():
    method, calls = small(grid=3), []
    method.student.net.enter.register_forward_hook(lambda *_: calls.append(1))
    in_turn(method, "student")
    method.loss(torch.randn(4, 2, dtype=D), torch.randn(4, 2, dtype=D), {}).backward()
    assert len(calls) == 6


def test_an_affine_students_optimum_has_the_datas_moments():
    """z on Gauss quantiles; data N(.4, .7^2) on quantiles: descent on (m, g) ends there."""
    n = 400
    z = torch.special.ndtri((torch.arange(n, dtype=D) + 0.5) / n)[:, None]
    method = MMD({"teacher": of_gaussian(0, 1), "student": Affine(0.0, 1.0)}, grid=1)
    in_turn(method, "student")
    parameters = [method.student.m, method.student.g]
    optimizer = torch.optim.LBFGS(parameters, max_iter=60, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = method.loss(0.4 + 0.7 * z, z, {})
        loss.backward()
        return loss

    optimizer.step(closure)
    assert method.student.m.item() == pytest.approx(0.4, abs=0.02)
    assert method.student.g.item() == pytest.approx(0.7, abs=0.02)


def test_only_the_student_gets_gradient_also_through_features():
    features = nn.Sequential(nn.Linear(2, 5), nn.Tanh()).double()
    teacher, student = (Denoiser(MLP(2, 16, 2), RectifiedFlow()).double() for _ in range(2))
    method = MMD({"teacher": teacher, "student": student, "features": features}, grid=2).double()
    in_turn(method, "student")
    method.loss(torch.randn(8, 2, dtype=D), torch.randn(8, 2, dtype=D), {}).backward()
    assert touched(method) == {"student"}
    assert not any(p.requires_grad for p in method.features.parameters()) and not method.features.training


def test_features_that_clip_pass_no_gradient_outside_the_image_range():
    roles = {"teacher": of_gaussian(0, 1), "student": Affine(5.0, 0.1), "features": torch.nn.Hardtanh()}
    method = MMD(roles, grid=1)
    in_turn(method, "student")
    method.loss(torch.randn(8, 1, dtype=D), torch.randn(8, 1, dtype=D), {}).backward()
    assert method.student.m.grad.abs().sum() == 0


def test_an_unknown_kernel_is_refused():
    with pytest.raises(BadInput, match="kernel 'cubik'"):
        small(grid=2, kernel="cubik")
