"""Sampling with stock schedulers: equal to our solvers where both exist, exact in the limit, at the stated cost."""

import diffusers
import pytest
import torch

from distill.denoise import Gaussian, GaussianMixture, Guided
from distill.errors import BadInput
from distill.metrics.training_free import Counted
from distill.models.diffusers.sampling import FLOWS, TABLES, as_table, sample_stock, stock_solvers
from distill.noise import VE, RectifiedFlow, Table, VPLinear
from distill.solvers import DDIM, solve, solver
from distill.times import Grid

LINEAR, SILENT = (
    Table.of(VPLinear()),
    Table.of(RectifiedFlow()),
)  # the second ends without signal, as the digits teacher


def noise(n: int = 64, dim: int = 1) -> torch.Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(0))


def mixture(schedule) -> GaussianMixture:
    return GaussianMixture([[-1.0], [1.0]], [0.3, 0.2], schedule=schedule)


@pytest.mark.parametrize("calls", [1, 4, 20])
@pytest.mark.parametrize(
    "schedule, name",
    [
        (LINEAR, "DDIM"),
        (SILENT, "DDIM"),
        (LINEAR, "Euler"),
        (RectifiedFlow(), "Flow Euler"),
        (RectifiedFlow(3.0), "Flow Euler"),
    ],
    ids=["linear", "silent", "euler", "flow", "shifted"],
)
def test_stock_ddim_and_euler_equal_ours(schedule, name, calls):
    model, z = mixture(schedule), noise()
    ours = solve(model, schedule.start(z), Grid.uniform(calls), DDIM())
    torch.testing.assert_close(
        sample_stock(model, z, name, calls), ours, atol=2e-3 if schedule is SILENT else 2e-5, rtol=0
    )


def test_stock_dpm_solver_equals_ours():
    model, z = mixture(LINEAR), noise()
    ours = solve(model, z, Grid.uniform(10), solver("dpmpp_2m"))
    torch.testing.assert_close(sample_stock(model, z, "DPM-Solver++ 2M", 10), ours, atol=1e-4, rtol=0)


@pytest.mark.parametrize("schedule", [LINEAR, VE(), RectifiedFlow()], ids=lambda s: type(s).__name__)
def test_every_solver_converges_to_the_exact_flow(schedule):
    """A Gaussian's flow map is affine; stochastic solvers keep its law instead."""
    model, z = Gaussian([0.5], 0.7, schedule), noise(1000)
    one = torch.ones(len(z), dtype=torch.float64)
    exact = model.flow_map(schedule.start(z).double(), one, 0 * one)
    for name in stock_solvers(schedule):
        x = sample_stock(model, z, name, 32, torch.Generator().manual_seed(1)).double()
        if name in ("SA-Solver", "Euler ancestral"):
            assert abs(float(x.mean()) - 0.5) < 0.12 and abs(float(x.std()) - 0.7) < 0.12, name
        else:
            assert float((x - exact).square().mean().sqrt()) < 0.08, name


@pytest.mark.parametrize("names, schedule", [(TABLES, LINEAR), (FLOWS, RectifiedFlow())], ids=["tables", "flows"])
def test_no_solver_costs_more_than_it_was_given(names, schedule):
    counted, z = Counted(mixture(schedule)), noise(4)
    counted.with_schedule = lambda schedule: counted
    for name in names:
        for calls in (1, 2, 5):
            counted.evaluations = 0
            x = sample_stock(counted, z, name, calls, torch.Generator().manual_seed(0))
            assert x.shape == z.shape and torch.isfinite(x).all(), name
            twice = name in ("Heun", "DPM2", "Flow Heun", "PNDM")
            assert counted.evaluations in ((calls - 1, calls) if twice and calls > 1 else (calls,)), (name, calls)


def test_conditions_and_guidance_reach_the_network():
    seen = []

    class Net(torch.nn.Module):
        def forward(self, x, t, label):
            seen.append(label)
            return x * 0 + label[:, None]

    from distill.denoise import Denoiser

    model = Guided(Denoiser(Net(), LINEAR, "x"), 3.0)
    x = sample_stock(model, noise(4), "DDIM", 2, label=torch.tensor([1, 2, 3, 4]))
    torch.testing.assert_close(x[:, 0], 3.0 * torch.tensor([1.0, 2, 3, 4]) - 2 * -1, atol=1e-3, rtol=0)
    assert len(seen) == 2 and seen[0].tolist() == [-1, -1, -1, -1, 1, 2, 3, 4]


def test_a_solver_that_does_not_apply_is_named():
    with pytest.raises(BadInput, match="no stock solver 'DIMM'.*Did you mean 'DDIM'"):
        sample_stock(mixture(LINEAR), noise(), "DIMM", 4)
    with pytest.raises(BadInput, match="PNDM"):
        sample_stock(mixture(RectifiedFlow()), noise(), "PNDM", 4)


@pytest.mark.parametrize("name", ["DEISMultistepScheduler", "SASolverScheduler"])
def test_schedulers_left_out_of_flows_stop_before_data(name):
    scheduler = getattr(diffusers, name)(use_flow_sigmas=True, prediction_type="flow_prediction")
    scheduler.set_timesteps(4)
    assert scheduler.sigmas[-1] > 0.2  # where diffusers mends this, it belongs into FLOWS


def test_ve_table_has_karras_spacing():
    table, schedule = as_table(VE()), VE()
    ratio = lambda t: torch.exp(-table.log_snr(t) / 2)
    t = torch.tensor([1e-3, 0.5, 1.0], dtype=torch.float64)
    low, high = 0.002 ** (1 / 7), 80 ** (1 / 7)
    wanted = [0.002, (low + 499 / 999 * (high - low)) ** 7, 80.0]
    torch.testing.assert_close(ratio(t), torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=0)
    assert schedule.sigma_max == 80
