"""Losses of flow maps: identity, adaptive weight, bounded length, guidance inside the target."""

import pytest
import torch

from distill.losses.flowmap import adaptive_loss, average_velocity, guided_velocity, normalised_direction_loss

STD = 0.5


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_the_identity_of_a_gaussian_under_rectified_flow():
    t, s, x = f64(0.9, 1.0, 0.5), f64(0.2, 0.0, 0.49), f64(1.3, -0.7, 0.2)
    v_of = lambda a: ((1 - a).square() * STD**2 + a.square()).sqrt()
    u_of = lambda x, t: (1 - v_of(s) / v_of(t)) / (t - s) * x
    v = (t - (1 - t) * STD**2) / v_of(t).square() * x
    u, du = torch.func.jvp(u_of, (x, t), (v, torch.ones_like(t)))
    torch.testing.assert_close(average_velocity(v, du, t - s), u, atol=1e-15, rtol=0)
    torch.testing.assert_close(average_velocity(v, du, t - s, share=0.0), v)


def test_the_average_tends_to_the_velocity_as_the_times_meet():
    t, x = f64(0.7), f64(1.1)
    v_of = lambda a: ((1 - a).square() * STD**2 + a.square()).sqrt()
    v = (t - (1 - t) * STD**2) / v_of(t).square() * x
    errors = [abs(((1 - v_of(t - h) / v_of(t)) / h * x - v).item()) for h in (1e-2, 1e-3, 1e-4)]
    assert errors[0] / errors[1] == pytest.approx(10, rel=0.05) and errors[2] < 2e-4


def test_adaptive_weighs_by_the_error_it_does_not_differentiate():
    u, target = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.randn(5, 3, dtype=torch.float64)
    square = (u - target).square().sum(1)
    expected = 2 * (u - target) / (square + 0.01)[:, None] / 5
    torch.testing.assert_close(torch.autograd.grad(adaptive_loss(u, target), u)[0], expected)
    torch.testing.assert_close(adaptive_loss(u, target, power=0.0), square.mean())


def test_normalised_moves_towards_the_target_by_a_bounded_length():
    u, g = torch.randn(6, 4, dtype=torch.float64, requires_grad=True), torch.randn(6, 4, dtype=torch.float64)
    size = f64(1e-3, 1e-2, 0.1, 1, 10, 1e6)[:, None]
    gradient = torch.autograd.grad(normalised_direction_loss(u, u.detach() + size * g), u)[0]
    direction = size * g / ((size * g).norm(dim=1, keepdim=True) + 0.1)
    torch.testing.assert_close(gradient, -2 * direction / 24)
    assert (direction.norm(dim=1) < 1).all()
    assert normalised_direction_loss(u, u.detach()) == 0


@pytest.mark.parametrize("w, kappa", [(1.0, 0.5), (2.5, 0.92), (3.0, 0.0)])
def test_guidance_in_the_target_has_its_fixed_point_at_the_extrapolation(w, kappa):
    v, u_null = torch.randn(2, 4, 2, dtype=torch.float64)
    u_cond = u_null + w * (v - u_null)
    torch.testing.assert_close(guided_velocity(v, u_null, u_cond, w, kappa), u_cond)
    omega = w * (1 - kappa)
    assert omega / (1 - kappa) == pytest.approx(w)


def test_the_adaptive_weight_finds_the_mean_of_symmetric_targets_only():
    """In one dimension power 1 is log(S + c), which leans to where targets crowd; power 0 is the mean."""
    skewed = f64(0.0, 0.0, 0.0, 4.0)[:, None]
    mean = torch.ones(4, 1, dtype=torch.float64, requires_grad=True)
    slope = lambda power: torch.autograd.grad(adaptive_loss(mean, skewed, power), mean)[0].sum().item()
    assert slope(0.0) == pytest.approx(0, abs=1e-12) and slope(1.0) > 0.1
    assert torch.autograd.grad(adaptive_loss(mean, f64(0.0, 0.0, 2.0, 2.0)[:, None]), mean)[0].sum().abs() < 1e-12


def test_the_defaults_are_those_of_the_papers():
    """MeanFlow's power 1 with c = 0.01, Align Your Flow's c = 0.1."""
    u, target = torch.randn(2, 5, 3, dtype=torch.float64)
    square = (u - target).square().sum(1)
    torch.testing.assert_close(adaptive_loss(u, target), (square / (square + 0.01)).mean())
    torch.testing.assert_close(adaptive_loss(u, target, 0.5, 0.2), (square / (square + 0.2).sqrt()).mean())
    size = square.sqrt()
    torch.testing.assert_close(normalised_direction_loss(u, target), ((size / (size + 0.1)).square() / 3).mean())
    torch.testing.assert_close(normalised_direction_loss(u, target, 0.7), ((size / (size + 0.7)).square() / 3).mean())


def test_guidance_weighs_its_three_velocities_by_hand():
    """w = 3, kappa = 0.25: omega = 2.25, so 2.25 v - 1.5 u(null) + 0.25 u(cond)."""
    v, u_null, u_cond = f64(1.0, 0.0, 0.0), f64(0.0, 1.0, 0.0), f64(0.0, 0.0, 1.0)
    torch.testing.assert_close(guided_velocity(v, u_null, u_cond, 3.0, 0.25), f64(2.25, -1.5, 0.25))
