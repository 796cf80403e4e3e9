"""The sampling loop."""

import pytest
import torch

from distill.denoise import Denoiser, Gaussian, GaussianMixture
from distill.errors import BadInput
from distill.noise import RectifiedFlow, VPCosine, VPLinear
from distill.solvers import DDIM, SOLVERS, DPMSolverPP2M, Renoise, solve, solver
from distill.times import Grid


def test_solve_chains_the_steps():
    model = GaussianMixture([[-1.0], [1.0]], 0.4, schedule=RectifiedFlow())
    z = torch.randn(5, 1, dtype=torch.float64)
    states, x = [z], z
    for t, s in [(1.0, 0.6), (0.6, 0.2), (0.2, 0.0)]:
        x = DDIM()(model, x, *(torch.full((5,), a, dtype=torch.float64) for a in (t, s)))
        states.append(x)
    assert torch.equal(solve(model, z, [1.0, 0.6, 0.2, 0.0], DDIM()), x)
    assert torch.equal(solve(model, z, Grid([1.0, 0.6, 0.2, 0.0]), DDIM()), x)
    assert torch.equal(solve(model, z, (1.0, 0.6, 0.2, 0.0), DDIM(), trajectory=True), torch.stack(states))


def test_solve_keeps_the_history_of_one_trajectory_only():
    model, step = Gaussian([0.3], 0.5, VPCosine()), DPMSolverPP2M()
    z, times = torch.randn(5, 1, dtype=torch.float64), [1.0, 0.7, 0.4, 0.1]
    once, again = (solve(model, z, times, step) for _ in range(2))
    assert torch.equal(once, again)
    assert not torch.allclose(once, solve(model, z, times, DDIM()), atol=1e-3), "the memory is used"


@pytest.mark.parametrize("name", [n for n in SOLVERS if solver(n).stochastic])
def test_noise_comes_from_the_generator_and_is_fresh_at_every_step(name):
    model, z = Gaussian([0.3, 0.1], 0.5, VPLinear()), torch.randn(4, 2)
    run = lambda seed: solve(
        model, z, [1.0, 0.7, 0.4], solver(name), generator=torch.Generator().manual_seed(seed), trajectory=True
    )
    assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
    g, step, x = torch.Generator().manual_seed(0), solver(name), z
    for t, s in [(1.0, 0.7), (0.7, 0.4)]:
        x = step(model, x, torch.full((4,), t), torch.full((4,), s), noise=torch.randn(4, 2, generator=g))
    assert torch.equal(run(0)[-1], x)


@pytest.mark.parametrize("name", [n for n in SOLVERS if n != "renoise"])
@pytest.mark.parametrize("schedule", [VPLinear(), RectifiedFlow()], ids=["vp", "flow"])
def test_many_steps_reach_the_law_of_the_data(name, schedule):
    n, g = 8_000, torch.Generator().manual_seed(0)
    model = GaussianMixture([[-1.0], [1.0]], [0.3, 0.2], [0.3, 0.7], schedule=schedule)
    z = torch.randn(n, 1, generator=g)
    x = solve(model, z, Grid.uniform(50), solver(name), generator=g).sort(0).values
    data = model.sample(n, g)[0].sort(0).values
    assert (x - data).abs().mean() < 0.06, "Wasserstein-1"


def test_renoise_of_a_consistency_function_keeps_the_law():
    """f carries p_t to the data's law, so predict and re-noise does too, in any number of steps."""
    n, schedule = 100_000, RectifiedFlow()
    data = Gaussian([0.5], 0.4, schedule)

    class Consistency(Denoiser):
        def native(self, x_t, t):
            return data.flow_map(x_t, t, torch.zeros_like(t))

    g = torch.Generator().manual_seed(0)
    z = torch.randn(n, 1, generator=g, dtype=torch.float64)
    x = solve(Consistency(None, schedule, "x"), z, [1.0, 0.6, 0.3, 0.0], Renoise(), generator=g)
    assert abs(x.mean() - 0.5) < 5 * 0.4 / n**0.5
    assert abs(x.std() / 0.4 - 1) < 5 / (2 * n) ** 0.5


def test_images_conditions_precision_and_gradients_pass_through():
    model = Gaussian(torch.zeros(3, 2, 2), 0.5, RectifiedFlow())
    for dtype, out in [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)]:
        x = solve(model, torch.randn(2, 3, 2, 2).to(dtype), Grid.uniform(3), solver("heun"), label=torch.zeros(2))
        assert x.shape == (2, 3, 2, 2) and x.dtype == out
    mixture = GaussianMixture([[-3.0], [3.0]], 0.1, schedule=RectifiedFlow())
    x = solve(mixture, torch.randn(4, 1), Grid.uniform(8), DDIM(), label=torch.tensor([0, 0, 1, 1]))
    assert (x.sign() == torch.tensor([[-1.0], [-1], [1], [1]])).all()
    z = torch.randn(2, 1, requires_grad=True)
    solve(mixture, z, Grid.uniform(2), DDIM()).sum().backward()
    assert z.grad.isfinite().all()


@pytest.mark.parametrize("times", [[1.0], [0.0, 1.0], [1.0, 0.5, 0.5], [1.2, 0.0], [1.0, -0.1], [1.0, float("nan")]])
def test_times_that_do_not_decrease_raise(times):
    with pytest.raises(BadInput, match="decreasing"):
        solve(Gaussian([0.0], 1.0, VPLinear()), torch.randn(1, 1), times, DDIM())


def test_a_function_gives_a_stochastic_solver_its_noise():
    """Renoise of a consistency function that maps all to c: x_s = alpha_s c + sigma_s noise, with the k-th noise drawn."""

    class Constant(Denoiser):
        def native(self, x_t, t):
            return torch.full_like(x_t, 2.0)

    denoiser, drawn = Constant(None, RectifiedFlow(), "x"), []

    def draw(x_t):
        drawn.append(torch.full_like(x_t, float(len(drawn) + 1)))
        return drawn[-1]

    z = torch.zeros(3, 1, dtype=torch.float64)
    path = solve(denoiser, z, [1.0, 0.5, 0.25, 0.0], Renoise(), generator=draw, trajectory=True)
    wanted = [0.0, 0.5 * 2 + 0.5 * 1, 0.75 * 2 + 0.25 * 2, 2.0]
    assert torch.allclose(path[:, :, 0], torch.tensor(wanted, dtype=torch.float64)[:, None].expand(-1, 3))
    solve(denoiser, z, [1.0, 0.5, 0.0], DDIM(), generator=draw)
    assert len(drawn) == 3  # a deterministic solver draws none
