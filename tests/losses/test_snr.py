"""Weights by signal-to-noise ratio against the errors they stand for."""

import pytest
import torch

from distill.errors import BadInput
from distill.losses import snr
from distill.noise import RectifiedFlow, VPCosine

T = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)


def test_snr_is_the_larger_of_the_errors_in_x_and_eps():
    for schedule in (VPCosine(), RectifiedFlow()):
        x_t, x, y = torch.randn(3, len(T), 1, dtype=torch.float64)
        in_x = (x - y).square().squeeze(1)
        in_eps = (schedule.eps(x, x_t, T) - schedule.eps(y, x_t, T)).square().squeeze(1)
        weighed = snr.weight("snr", schedule.log_snr(T)) * in_x
        torch.testing.assert_close(weighed, torch.maximum(in_x, in_eps), atol=1e-10, rtol=1e-10)


def test_v_is_the_error_in_v_of_a_variance_preserving_schedule():
    schedule = VPCosine()
    x_t, x, y = torch.randn(3, len(T), 1, dtype=torch.float64)
    a, s = schedule.at(T, x_t)
    v = [a * schedule.eps(c, x_t, T) - s * c for c in (x, y)]
    weighed = snr.weight("v", schedule.log_snr(T)) * (x - y).square().squeeze(1)
    torch.testing.assert_close(weighed, (v[0] - v[1]).square().squeeze(1), atol=1e-9, rtol=1e-9)


def test_flow_is_the_error_in_noise_minus_data():
    for schedule in (VPCosine(), RectifiedFlow(3.0)):
        x_t, x, y = torch.randn(3, len(T), 1, dtype=torch.float64)
        flow = [schedule.eps(c, x_t, T) - c for c in (x, y)]
        weighed = snr.weight("flow", schedule.log_snr(T)) * (x - y).square().squeeze(1)
        torch.testing.assert_close(weighed, (flow[0] - flow[1]).square().squeeze(1), atol=1e-9, rtol=1e-9)


def test_the_ends_of_time_are_finite_and_unknown_names_refused():
    ends = torch.tensor([torch.inf, -torch.inf])
    assert torch.equal(
        snr.weight("snr", ends), torch.tensor([20.0]).exp().expand(2) * torch.tensor([1.0, 0]) + torch.tensor([0.0, 1])
    )
    assert torch.equal(snr.weight("x", ends), torch.ones(2))
    with pytest.raises(BadInput, match="Did you mean 'snr'"):
        snr.weight("snrr", ends)
