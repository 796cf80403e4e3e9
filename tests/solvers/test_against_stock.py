"""Solver steps against stock diffusers schedulers, to float32 precision."""

import pytest
import torch

from distill.denoise import GaussianMixture
from distill.noise import RectifiedFlow, Table
from distill.solvers import solve, solver
from distill.times import Grid

diffusers = pytest.importorskip("diffusers")


def walk(scheduler, schedule, times, steps):
    """The scheduler's own loop, with the exact denoiser; and the denoiser and z it started from."""
    model = GaussianMixture([[-1.0], [1.0]], [0.3, 0.2], schedule=schedule)
    z = x = torch.randn(16, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for n, t in zip(scheduler.timesteps, times):
        t = torch.full((16,), t, dtype=torch.float64)
        out = model(x, t)
        if isinstance(schedule, RectifiedFlow):
            out = schedule.eps(out, x, t) - out
        x = scheduler.step(out, n, x).prev_sample
    assert len(scheduler.timesteps) == steps
    return model, z, x


@pytest.mark.parametrize("steps", [1, 4, 20])
@pytest.mark.parametrize(
    "name,stock,options",
    [
        ("ddim", "DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": True}),
        ("dpmpp_2m", "DPMSolverMultistepScheduler", {"final_sigmas_type": "zero"}),
    ],
)
def test_vp_solvers_equal_stock_schedulers_on_a_uniform_grid(name, stock, options, steps):
    scheduler = getattr(diffusers, stock)(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="sample",
        timestep_spacing="trailing",
        **options,
    )
    scheduler.set_timesteps(steps)
    schedule, grid = Table(scheduler.alphas_cumprod.double().tolist()), Grid.uniform(steps)
    assert scheduler.timesteps.tolist() == [round(t * 1000) - 1 for t in grid.times[:-1]]
    model, z, x = walk(scheduler, schedule, grid.times, steps)
    torch.testing.assert_close(solve(model, z, grid, solver(name)), x, atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [1, 4, 20])
def test_euler_equals_the_stock_flow_scheduler(steps):
    schedule, grid = RectifiedFlow(), Grid.uniform(steps)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(sigmas=list(grid.times[:-1]))
    model, z, x = walk(scheduler, schedule, grid.times, steps)
    for name in ("euler", "ddim"):
        torch.testing.assert_close(solve(model, z, grid, solver(name)), x.double(), atol=1e-5, rtol=0)
