"""MMD against its value in moments, its unbiasedness, and finite differences."""

import math

import pytest
import torch

from distill.errors import BadInput
from distill.losses.mmd import mmd

D = torch.float64


def quantiles(n, mean=0.0, std=1.0):
    p = (torch.arange(n, dtype=D) + 0.5) / n
    return mean + std * torch.special.ndtri(p)[:, None]


def moments(x):
    return torch.stack([x.pow(i).mean() for i in (1, 2, 3)])


def test_the_cubic_kernel_sees_three_raw_moments():
    """In one dimension MMD^2 = 3 dm1^2 + 3 dm2^2 + dm3^2: N(0, 1) against N(.5, .8^2) is 1.963525."""
    m, s = 0.5, 0.8
    dm1, dm2, dm3 = m, m**2 + s**2 - 1, m**3 + 3 * m * s**2
    exact = 3 * dm1**2 + 3 * dm2**2 + dm3**2
    assert exact == pytest.approx(1.963525, abs=5e-7)
    x, y = quantiles(800), quantiles(800, m, s)
    assert mmd(x, y).item() == pytest.approx(exact, rel=3e-2)
    # on given samples: the plain (biased) estimate equals the moments' formula to rounding
    d = moments(x) - moments(y)
    biased = 3 * d[0] ** 2 + 3 * d[1] ** 2 + d[2] ** 2
    own = [((a @ a.T + 1) ** 3) for a in (x, y)]
    shift = sum((k.sum() - k.diagonal().sum()) / (len(k) * (len(k) - 1)) - k.mean() for k in own)
    assert mmd(x, y).item() == pytest.approx((biased + shift).item(), abs=1e-9)


def test_sampled_estimates_average_to_the_exact_value():
    torch.manual_seed(0)
    draw = lambda: torch.randn(64, 1, dtype=D)
    values = torch.stack([mmd(draw(), 0.5 + 0.8 * draw()) for _ in range(1000)])
    error = (values.mean() - 1.963525) / (values.std() / len(values) ** 0.5)
    assert abs(error) < 3.5


@pytest.mark.parametrize("kernel", ["cubic", "rbf"])
def test_equal_laws_average_to_zero_and_single_estimates_may_be_negative(kernel):
    torch.manual_seed(1)
    values = torch.stack([mmd(torch.randn(16, 3), torch.randn(16, 3), kernel) for _ in range(500)])
    assert abs(values.mean()) < 3.5 * values.std() / len(values) ** 0.5
    assert (values < 0).any()


def test_the_rbf_kernel_by_its_gaussian_integral():
    """E exp(-(a-b)^2/2h^2) for a - b ~ N(m, v): h/sqrt(h^2+v) exp(-m^2/2(h^2+v))."""
    torch.manual_seed(2)
    h, m, s = 0.7, 0.5, 0.8

    def k(mean, var):
        mean, var = torch.tensor(mean, dtype=D), torch.tensor(var, dtype=D)
        return h / (h**2 + var).sqrt() * torch.exp(-(mean**2) / (2 * (h**2 + var)))

    exact = (k(0.0, 2.0) + k(0.0, 2 * s**2) - 2 * k(m, 1 + s**2)).item()
    x, y = quantiles(800), quantiles(800, m, s)
    assert mmd(x, y, "rbf", (h,)).item() == pytest.approx(exact, abs=5e-3)
    assert mmd(x, y, "rbf", (h, h)).item() == pytest.approx(mmd(x, y, "rbf", (h,)).item())


def test_the_rbf_default_is_the_papers():
    torch.manual_seed(3)
    x, y = torch.randn(5, 7, dtype=D), torch.randn(6, 7, dtype=D)
    k = lambda a, b: torch.exp(-torch.cdist(a, b).square() / 7)
    off = lambda a: (a.sum() - a.diagonal().sum()) / (len(a) * (len(a) - 1))
    assert mmd(x, y, "rbf").item() == pytest.approx((off(k(x, x)) + off(k(y, y)) - 2 * k(x, y).mean()).item())


@pytest.mark.parametrize("kernel", ["cubic", "rbf"])
def test_gradients_against_finite_differences(kernel):
    torch.manual_seed(4)
    x, y = torch.randn(4, 2, dtype=D, requires_grad=True), torch.randn(5, 2, dtype=D)
    assert torch.autograd.gradcheck(lambda a: mmd(a, y, kernel), (x,))
    same = x.detach()[:1].expand(3, 2).clone().requires_grad_()
    mmd(same, y, kernel).backward()
    assert torch.isfinite(same.grad).all(), "coinciding samples"


def test_bad_input_is_refused():
    x = torch.zeros(3, 2)
    with pytest.raises(BadInput, match="Did you mean 'cubic'"):
        mmd(x, x, "cubc")
    for y in (torch.zeros(3, 1), torch.zeros(1, 2)):
        with pytest.raises(BadInput, match="two or more samples of one shape"):
            mmd(x, y)


def test_two_samples_each_by_hand():
    """x = (1, 1), (0, 2) and y = (2, 0), (-1, 1), so <x, x'> = 2, <y, y'> = -2 and <x, y> = 2, 0, 0, 2; d = 2."""
    x, y = torch.tensor([[1.0, 1.0], [0.0, 2.0]], dtype=D), torch.tensor([[2.0, 0.0], [-1.0, 1.0]], dtype=D)
    assert mmd(x, y).item() == pytest.approx(2.0**3 + 0.0**3 - 2 * (8 + 1 + 1 + 8) / 4)
    # |x - x'|^2 = 2, |y - y'|^2 = 10, |x - y|^2 = 2, 4, 8, 2
    for h in (0.5, 1.0, 2.0):
        k = lambda square: math.exp(-square / (2 * h * h * 2))  # noqa: B023
        assert mmd(x, y, "rbf", (h,)).item() == pytest.approx(k(2) + k(10) - 2 * (k(2) + k(4) + k(8) + k(2)) / 4)


def test_the_refusal_names_both_batches():
    with pytest.raises(BadInput, match=r"got 3 of \(2, 5\) and 4 of \(5,\)"):
        mmd(torch.zeros(3, 2, 5), torch.zeros(4, 5))
