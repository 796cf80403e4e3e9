"""Grids and time densities."""

import math

import pytest
import torch

from distill.errors import BadInput
from distill.noise import VE, RectifiedFlow, VPLinear
from distill.times import Grid, LogitNormal, LogNormalSigma, Mixture, Uniform, halving_steps


def test_uniform_grid():
    grid = Grid.uniform(4)
    assert grid.times == (1.0, 0.75, 0.5, 0.25, 0.0)
    assert grid.steps == 4
    assert Grid.of(4) == grid == Grid.of(grid) == Grid.of([1, 0.75, 0.5, 0.25, 0])
    assert hash(grid) == hash(Grid.of(4))
    assert grid.tensor(dtype=torch.float64).tolist() == list(grid.times)


def test_segment_k_runs_from_t_k_down_to_the_next():
    grid = Grid([1.0, 0.6, 0.1, 0.0])
    t, s = grid.segment(torch.tensor([3, 1, 2, 3]), dtype=torch.float64)
    assert t.tolist() == [1.0, 0.1, 0.6, 1.0]
    assert s.tolist() == [0.6, 0.0, 0.1, 0.6]
    for k in (0, 4):
        with pytest.raises(IndexError):
            grid.segment(torch.tensor([k]))


def test_draw_is_uniform_over_the_segments():
    k = Grid.uniform(3).draw(30_000, torch.Generator().manual_seed(0))
    counts = k.bincount()
    assert counts[0] == 0 and len(counts) == 4
    assert (counts[1:] - 10_000).abs().max() < 5 * (30_000 * 2 / 9) ** 0.5
    assert torch.equal(k, Grid.uniform(3).draw(30_000, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    "times,mend",
    [
        ([0.99, 0.5, 0.0], "make the first time 1"),
        ([1.0, 0.5, 0.1], "append 0"),
        ([1.0, 0.5, 0.5, 0.0], "decrease strictly"),
        ([0.0, 0.5, 1.0], "decrease strictly"),
        ([1.0, math.nan, 0.0], "decrease strictly"),
        ([1.0], "at least"),
        (0, "1 or more"),
        ("four", "list of times"),
        (True, "list of times"),
        (0.5, "list of times"),
    ],
)
def test_invalid_grids_raise_with_a_suggestion(times, mend):
    with pytest.raises(BadInput, match=mend):
        Grid.of(times)


@pytest.mark.parametrize(
    "density",
    [Uniform(), LogitNormal(-0.4, 1.2), LogNormalSigma(VE()), Mixture([Uniform(), LogitNormal()])],
    ids=lambda d: type(d).__name__,
)
def test_densities_draw_inside_and_repeat(density):
    for dtype in (torch.float32, torch.float64):
        t = density(1000, torch.Generator().manual_seed(1), dtype=dtype)
        assert t.shape == (1000,) and t.dtype == dtype
        assert (t > 0).all() and (t < 1).all()
        assert torch.equal(t, density(1000, torch.Generator().manual_seed(1), dtype=dtype))


def test_extreme_draws_stay_strictly_inside():
    for density in (LogitNormal(200.0), LogitNormal(-200.0), LogNormalSigma(RectifiedFlow(), 90.0), Uniform(0, 0)):
        t = density(8)
        assert (t > 0).all() and (t < 1).all()


def test_density_moments():
    n, draw = 100_000, lambda d: d(100_000, torch.Generator().manual_seed(0), dtype=torch.float64)
    t = draw(Uniform(0.2, 0.6))
    assert abs(t.mean() - 0.4) < 0.002 and t.min() >= 0.2 and t.max() <= 0.6
    logits = draw(LogitNormal(-0.4, 1.2)).logit()
    assert abs(logits.mean() + 0.4) < 5 * 1.2 / n**0.5 and abs(logits.std() - 1.2) < 0.02
    for schedule in (VE(), RectifiedFlow(3.0)):
        log_sigma = -schedule.log_snr(draw(LogNormalSigma(schedule, -1.2, 1.1))) / 2
        assert abs(log_sigma.mean() + 1.2) < 5 * 1.1 / n**0.5 and abs(log_sigma.std() - 1.1) < 0.02


def test_a_mixture_draws_from_each_density_equally_often():
    law = Mixture([Uniform(0.1, 0.2), Uniform(0.6, 0.9)])
    t = law(20_000, torch.Generator().manual_seed(0), dtype=torch.float64)
    low = t < 0.5
    assert low.double().mean().item() == pytest.approx(0.5, abs=0.02)
    assert t[low].mean().item() == pytest.approx(0.15, abs=0.002) and t[low].max() <= 0.2
    assert t[~low].mean().item() == pytest.approx(0.75, abs=0.005) and t[~low].min() >= 0.6
    with pytest.raises(BadInput, match="at least one density"):
        Mixture([])


def test_log_normal_sigma_stays_within_a_schedule_that_never_gets_so_noisy():
    t = LogNormalSigma(VPLinear(), 10.0, 1.0)(64)
    assert (t > 0.99).all() and (t < 1).all()


def test_a_ladder_halves_down_to_the_grid():
    assert halving_steps(32, Grid.uniform(4)) == (16, 8, 4)
    assert halving_steps(2, Grid.uniform(1)) == (1,)
    wrong = (4, Grid.uniform(4), "halve"), (24, Grid.uniform(5), "halve"), (8, Grid.of([1, 0.7, 0]), "uniform")
    for start, grid, text in wrong:
        with pytest.raises(BadInput, match=text):
            halving_steps(start, grid)
