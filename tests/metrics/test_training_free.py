from __future__ import annotations

import pytest
import torch
from torch import nn

from distill import noise
from distill.denoise import Denoiser, Gaussian, GaussianMixture, Guided
from distill.errors import BadInput
from distill.metrics import training_free as b
from distill.solvers import DDIM, SOLVERS, solve, solver

SCHEDULES = [
    noise.VPLinear(),
    noise.VPScaledLinear(),
    noise.VPCosine(),
    noise.VE(),
    noise.RectifiedFlow(),
    noise.RectifiedFlow(3.0),
    noise.TrigFlow(0.5),
    noise.Table(torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0).tolist()),
]
NAMES = [type(s).__name__ + str(i) for i, s in enumerate(SCHEDULES)]


class Net(nn.Module):
    """Counts rows on its own, as an independent book."""

    def __init__(self):
        super().__init__()
        self.gain, self.rows = nn.Parameter(torch.tensor(0.5)), 0

    def forward(self, x, t, label=None):
        self.rows += len(x)
        return self.gain * x if label is None else self.gain * x + 0.1 * label[:, None]


def unit(n=8, d=2):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


# --- where in time


@pytest.mark.parametrize("steps", [1, 2, 5, 50])
@pytest.mark.parametrize("name", b.GRIDS)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
def test_every_grid_suits_every_schedule(schedule, name, steps):
    grid = b.GRIDS[name](schedule, steps)  # Grid itself checks 1 = t_K > ... > t_0 = 0
    assert grid.steps == steps
    if isinstance(schedule, noise.Table):
        assert grid.times[-2] >= 1e-3 - 1e-9  # the network has not been trained between node 0 and clean data


def test_karras_is_the_published_formula():
    schedule, steps = noise.VE(sigma_max=80.0), 10
    sigma = schedule.sigma(b.karras(schedule, steps).tensor(dtype=torch.float64))
    exact = [(80 ** (1 / 7) + i / 9 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(10)]
    assert sigma.tolist() == pytest.approx([*exact, 0.0], rel=1e-9)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
def test_logsnr_is_evenly_spaced(schedule):
    times = b.logsnr(schedule, 9).tensor(dtype=torch.float64)[1:-1]
    gaps = schedule.log_snr(times).diff()
    assert gaps.min() > 0.5
    assert gaps.tolist() == pytest.approx([float(gaps[0])] * 7, rel=1e-6)
    assert float(schedule.log_snr(times)[-1]) == pytest.approx(8, abs=1e-6) or isinstance(schedule, noise.Table)


def test_uniform_is_uniform():
    assert b.uniform(noise.VPLinear(), 4).times == (1.0, 0.75, 0.5, 0.25, 0.0)


# --- at what cost


@pytest.mark.parametrize("w, cost", [(1.0, 1), (2.0, 2), (0.0, 2), (torch.full((6,), 1.0), 2)])
def test_counted_counts_network_evaluations_per_sample(w, cost):
    net = Net()
    counted = b.Counted(Guided(Denoiser(net, noise.RectifiedFlow()), w))
    x, t = torch.zeros(6, 2), torch.ones(6)
    for _ in range(3):
        counted(x, t, label=torch.arange(6))
    assert counted.evaluations == 3 * cost == net.rows / 6
    counted.evaluations = 0
    counted(x[:2], t[:2], label=torch.arange(2), w=1.0)
    assert counted.evaluations == 1
    assert counted.schedule == noise.RectifiedFlow() and counted.null({"label": t.long()})["label"].eq(-1).all()


def test_counted_sees_through_another_schedule_and_leaves_no_hook():
    inner = Denoiser(Net(), noise.RectifiedFlow())
    counted = b.Counted(inner.with_schedule(noise.VPLinear()))
    counted(torch.zeros(4, 2), torch.full((4,), 0.5))
    assert counted.evaluations == 1
    assert not inner._forward_pre_hooks


@pytest.mark.parametrize("w, call", [(1.0, 1), (3.0, 2)])
@pytest.mark.parametrize("name", SOLVERS)
def test_every_baseline_costs_exactly_what_it_says(name, w, call):
    net = Net()
    teacher, cond = Guided(Denoiser(net, noise.RectifiedFlow()), w), {"label": torch.arange(8) % 3}
    for nfe in (1, 2, 3, 4, 5, 8):
        net.rows = 0
        made = b.baseline(teacher, unit().float(), cond, (nfe,), (name,), ("uniform",))
        asked = 1 * call  # one row, to learn what a call costs
        calls = nfe // call
        fits = calls >= (3 if SOLVERS[name]().evaluations == 2 else 1)
        assert net.rows == asked + (8 * calls * call if fits else 0)
        assert list(made[nfe]) == ([f"{name}/uniform"] if fits else [])


def test_plan_spends_all_calls_and_steps_first_order_where_second_is_impossible():
    heun = solver("heun")
    kinds = lambda calls: "".join("H" if s is heun else "D" for s in b.plan(heun, calls))
    assert [kinds(n) for n in range(1, 8)] == ["", "", "HD", "DHD", "HHD", "DHHD", "HHHD"]
    assert b.plan(solver("ddim"), 0) == [] and len(b.plan(solver("ddim"), 5)) == 5


def test_the_last_step_of_ddim_is_what_two_evaluation_solvers_do_at_data():
    oracle = GaussianMixture.ring(schedule=noise.VPLinear())
    z = unit()
    for name in ("heun", "dpmpp_2s"):
        made = b.baseline(oracle, z, evaluations=(5,), solvers=(name,), grids=("uniform",))[5][f"{name}/uniform"]
        torch.testing.assert_close(made, solve(oracle, z, [1, 2 / 3, 1 / 3, 0], solver(name)))


def test_baseline_is_the_sampling_loop_and_batches_change_nothing():
    teacher = Guided(GaussianMixture.ring(schedule=noise.RectifiedFlow()), 2.0)
    z, cond = unit(), {"label": torch.arange(8) % 6}
    whole = b.baseline(teacher, z, cond, (8,), ("ddim", "dpmpp_2m"))[8]
    torch.testing.assert_close(whole["ddim/uniform"], solve(teacher, z, [1, 0.75, 0.5, 0.25, 0], DDIM(), **cond))
    torch.testing.assert_close(
        whole["dpmpp_2m/karras"], solve(teacher, z, b.karras(teacher.schedule, 4), solver("dpmpp_2m"), **cond)
    )
    for name, x in b.baseline(teacher, z, cond, (8,), ("ddim", "dpmpp_2m"), batch=3)[8].items():
        torch.testing.assert_close(x, whole[name])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAMES)
def test_more_evaluations_come_nearer_to_the_exact_flow(schedule):
    oracle = Gaussian([0.5, -1.0], [0.3, 1.2], schedule)
    z, t = unit(64), torch.ones(64, dtype=torch.float64)
    exact = oracle.flow_map(schedule.start(z), t, 0 * t)
    made = b.baseline(oracle, z, evaluations=(4, 40))
    error = {n: {k: float((x - exact).square().mean().sqrt()) for k, x in each.items()} for n, each in made.items()}
    for name in error[40]:
        # A clipped range of log-SNR leaves an error that no number of steps removes.
        assert error[40][name] < error[4][name] and error[40][name] < 0.1, name
    best = lambda family: min(v for k, v in error[40].items() if k.startswith(family))
    assert max(best("heun"), best("dpmpp_2s"), best("dpmpp_2m")) < best("ddim") / 2


def test_one_step_has_one_grid_and_no_room_for_two_evaluations():
    oracle = GaussianMixture.ring(schedule=noise.RectifiedFlow())
    assert list(b.baseline(oracle, unit(), evaluations=(1,))[1]) == ["ddim/uniform", "dpmpp_2m/uniform"]
    guided = Guided(oracle, 2.0)
    assert b.baseline(guided, unit(), {"label": torch.zeros(8).long()}, evaluations=(1,)) == {1: {}}


def test_stochastic_solvers_take_their_noise_from_the_generator():
    oracle = GaussianMixture.ring(schedule=noise.RectifiedFlow())
    draw = lambda seed: b.baseline(
        oracle, unit(), None, (4,), ("ancestral",), ("uniform",), torch.Generator().manual_seed(seed)
    )[4]["ancestral/uniform"]
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


def test_baseline_refuses_what_it_cannot_run():
    oracle = GaussianMixture.ring(schedule=noise.RectifiedFlow())
    z = unit()
    for message, kw in (
        ("Did you mean 'karras'", {"grids": ("karas",)}),
        ("Did you mean 'heun'", {"solvers": ("heunn",)}),
        ("at least 1", {"evaluations": (0,)}),
        ("condition 'label'", {"cond": {"label": torch.zeros(7).long()}}),
    ):
        with pytest.raises(BadInput, match=message):
            b.baseline(oracle, z, **kw)
    with pytest.raises(BadInput, match="z is empty"):
        b.baseline(oracle, z[:0])
