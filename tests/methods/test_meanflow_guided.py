"""MeanFlow's guidance in the target, from data: what the toy recipe must learn, by an ODE with the exact guided velocity."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distill import config
from distill.denoise import Denoiser, GaussianMixture, Guided
from distill.noise import RectifiedFlow
from distill.training.run import train

D = torch.float64
RECIPE = Path(__file__).parents[2] / "configs" / "toy" / "meanflow-guided.yaml"


def guided_ode(oracle: Denoiser, z: torch.Tensor, label: torch.Tensor, w: float, until: float, steps: int = 100):
    """Heun's method from t = 1 to 0 under rectified flow, guidance w for t up to `until` and 1 above."""
    guided, x = Guided(oracle, w), z.to(D)

    def velocity(x, t):
        model = guided if t <= until else oracle
        return (x - model(x, torch.full((len(x),), t, dtype=D), label=label)) / t

    for k in range(steps, 0, -1):
        t, s = k / steps, (k - 1) / steps
        v = velocity(x, t)
        x = x - (v + velocity(x - (t - s) * v, s)) / 2 * (t - s) if s else x - t * v
    return x


def test_the_ode_of_one_gaussian_is_its_flow_map():
    """With one component guidance changes nothing, and the map is affine."""
    oracle = GaussianMixture([[0.3]], 0.5, schedule=RectifiedFlow())
    z = torch.linspace(-2, 2, 9, dtype=D)[:, None]
    found = guided_ode(oracle, z, torch.zeros(9, dtype=torch.long), 3.0, 0.5)
    torch.testing.assert_close(found, 0.3 + 0.5 * z, atol=1e-3, rtol=0)


@pytest.mark.slow
def test_the_recipe_learns_guidance_up_to_its_time_and_not_beyond(tmp_path):
    """From the same noise it ends nearer to the ODE of its settings than to those without `guide_until` or without guidance."""
    cfg = config.load([RECIPE], ["log.wandb=disabled", "train.threads=1"])
    experiment = train(cfg, tmp_path / "run")
    z, cond = experiment.noise(1000, cfg.eval.seed)
    x, oracle = experiment.method.sample(z, cond), experiment.data.oracle
    w, until = cfg.method.guidance, cfg.method.guide_until
    exact, everywhere, nowhere = (
        guided_ode(oracle, z, cond["label"], *how) for how in ((w, until), (w, 1.0), (1.0, 1.0))
    )
    away = [float((x - end).square().mean().sqrt()) for end in (exact, everywhere, nowhere)]
    assert away[0] < 0.9 * away[1] and away[0] < 0.5 * away[2]
