"""Regression losses: values, limits, weights and gradients by hand."""

import pytest
import torch

from distill.denoise import Denoiser
from distill.losses.regression import huber, huber_norm, mae, mse, native_mse, reduce
from distill.noise import RectifiedFlow

D = torch.float64


def test_reduce_is_the_mean_of_per_sample_means():
    value = torch.tensor([[1.0, 3.0], [5.0, 7.0]], dtype=D)
    assert reduce(value).item() == 4.0
    assert reduce(value, per_sample=True).tolist() == [2.0, 6.0]
    weight = torch.tensor([0.5, 2.0], dtype=D)
    assert reduce(value, weight, per_sample=True).tolist() == [1.0, 12.0]
    assert reduce(value, weight).item() == 6.5, "the weight is not normalised away"


def test_mse_by_hand_and_its_gradient():
    a = torch.tensor([[1.0, 2.0], [0.0, -1.0]], dtype=D, requires_grad=True)
    b = torch.tensor([[0.0, 0.0], [0.0, 1.0]], dtype=D)
    loss = mse(a, b)
    assert loss.item() == pytest.approx((2.5 + 2.0) / 2)
    loss.backward()
    assert torch.allclose(a.grad, 2 * (a - b).detach() / 4)


@pytest.mark.parametrize("prediction, factor", [("x", 1.0), ("flow", 16.0), ("v", 2.5**2)])
def test_native_mse_is_the_error_of_x_in_the_charts_scale(prediction, factor):
    """At alpha = 3/4, sigma = 1/4: |d flow / dx| = (alpha + sigma) / sigma = 4, |dv / dx| = (alpha^2 + sigma^2) / sigma = 2.5."""

    class Off(Denoiser):
        def native(self, x_t, t, shift):
            return self.from_x(x + shift, x_t, t)

    x, x_t, t = torch.ones(2, 3, dtype=D), torch.full((2, 3), 0.7, dtype=D), torch.full((2,), 0.25, dtype=D)
    denoiser, weight = Off(None, RectifiedFlow(), prediction), torch.tensor([1.0, 0.5], dtype=D)
    assert native_mse(denoiser, x, x_t, t, {"shift": 2.0}).item() == pytest.approx(4 * factor)
    assert native_mse(denoiser, x, x_t, t, {"shift": 2.0}, weight).item() == pytest.approx(3 * factor)


@pytest.mark.parametrize("form", [huber, huber_norm])
def test_huber_is_square_near_zero_and_linear_far_away(form):
    c, zero = 0.1, torch.zeros(1, 1, dtype=D)
    near, far = torch.full((1, 1), 1e-4, dtype=D), torch.full((1, 1), 1e4, dtype=D)
    assert form(near, zero, c).item() == pytest.approx(1e-8 / (2 * c), rel=1e-5)
    assert form(far, zero, c).item() == pytest.approx(1e4 - c, rel=1e-9)


def test_the_two_hubers_differ_by_where_the_norm_is_taken():
    a, b = torch.tensor([[3.0, 4.0]], dtype=D), torch.zeros(1, 2, dtype=D)
    assert huber(a, b, 1e-9).item() == pytest.approx(3.5)  # mean |.|
    assert huber_norm(a, b).item() == pytest.approx(5.0)  # |.|_2


def test_huber_norm_has_no_gradient_at_its_minimum():
    a = torch.zeros(2, 3, dtype=D, requires_grad=True)
    huber_norm(a, torch.zeros(2, 3, dtype=D)).backward()
    assert torch.equal(a.grad, torch.zeros(2, 3, dtype=D)), "0/0 at a = b"


@pytest.mark.parametrize("form", [mse, huber, huber_norm])
def test_weights_and_per_sample(form):
    torch.manual_seed(0)
    a, b, w = torch.randn(4, 2, 3, dtype=D), torch.randn(4, 2, 3, dtype=D), torch.rand(4, dtype=D)
    each = form(a, b, per_sample=True)
    assert each.shape == (4,)
    assert form(a, b, weight=w).item() == pytest.approx((w * each).mean().item())


def test_values_between_two_points_that_are_not_zero():
    """a - b is (2, -1) and (0, 3)."""
    a, b = torch.tensor([[5.0, 3.0], [1.0, -1.0]], dtype=D), torch.tensor([[3.0, 4.0], [1.0, -4.0]], dtype=D)
    assert mse(a, b, per_sample=True).tolist() == pytest.approx([2.5, 4.5])
    assert mae(a, b, per_sample=True).tolist() == pytest.approx([1.5, 1.5])
    by_hand = [(5**0.5 + 2**0.5) / 2 - 1, (1 + 10**0.5) / 2 - 1]  # c = 1
    assert huber(a, b, 1.0, per_sample=True).tolist() == pytest.approx(by_hand)
    assert huber_norm(a, b, 2.0, per_sample=True).tolist() == pytest.approx([9**0.5 - 2, 13**0.5 - 2])
    assert huber(a, b).item() == pytest.approx(mae(a, b).item(), abs=1e-3), "c is 1e-3, the value of LCM and TDM"
    assert huber_norm(a, b).item() == pytest.approx((5**0.5 + 3) / 2, rel=1e-12), "c is 0"
    assert huber(a, b, weight=torch.tensor([2.0, 0.0], dtype=D), c=1.0).item() == pytest.approx(by_hand[0])
    assert huber_norm(a, b, weight=torch.tensor([2.0, 0.0], dtype=D)).item() == pytest.approx(5**0.5)


def test_the_default_width_of_huber_is_a_thousandth():
    a, b = torch.full((1, 1), 2e-3, dtype=D), torch.zeros(1, 1, dtype=D)
    assert huber(a, b).item() == pytest.approx(1e-3 * (5**0.5 - 1), rel=1e-9)


def test_huber_norm_between_its_limits():
    """The derivative in |a - b| is |a - b| / sqrt(|a - b|^2 + c^2)."""
    a = torch.tensor([[3.0, 4.0]], dtype=D, requires_grad=True)
    huber_norm(a, torch.zeros(1, 2, dtype=D), 12.0).backward()
    assert a.grad.tolist() == [pytest.approx([3 / 13, 4 / 13])]
    assert huber_norm(torch.ones(1, 1, dtype=D), torch.ones(1, 1, dtype=D), 0.5).item() == 0.0


def test_masked_elements_count_neither_in_the_sum_nor_in_the_mean():
    a, b = torch.tensor([[3.0, 9.0, 5.0], [2.0, 7.0, 7.0]], dtype=D), torch.ones(2, 3, dtype=D)
    mask = torch.tensor([[1, 0, 1], [1, 0, 0]])
    assert mse(a, b, mask=mask, per_sample=True).tolist() == [10.0, 1.0]
    assert mae(a, b, mask=mask, per_sample=True).tolist() == [3.0, 1.0]
    assert mse(a, b, mask=mask, weight=torch.tensor([1.0, 4.0], dtype=D)).item() == 7.0
    assert mse(a, b, mask=torch.zeros(2, 3), per_sample=True).tolist() == [0.0, 0.0], "nothing to compare"
    image, inside = torch.full((1, 2, 2, 2), 4.0, dtype=D), torch.zeros(1, 1, 2, 2)
    inside[..., 0] = 1
    image[..., 1] = 100.0
    assert mse(image, torch.ones_like(image), mask=inside).item() == 9.0, "a mask without channels is for all of them"
