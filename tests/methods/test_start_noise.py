"""Every network that is asked at t = 1 gets noise of the schedule's own scale: 80 under VE, sigma_data under TrigFlow."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_contract import RECIPES, by_hand, small

from distill.denoise import Denoiser, Gaussian, GaussianMixture
from distill.training.experiment import build_experiment

EDM = {"_target_": "distill.noise.VE", "sigma_min": 0.002}
SCHEDULES = {"edm": (EDM, 80.0), "trigflow": ({"_target_": "distill.noise.TrigFlow", "sigma_data": 0.5}, 0.5)}


def under(recipe: Path, schedule: dict, *overrides: str):
    """A toy recipe whose networks are EDM networks of sigma_data 0.5 under another schedule."""
    cfg = small(recipe, "data.batch_size=64", *overrides)
    for role in cfg.roles.values():
        if "schedule" in role:
            role.schedule = schedule
        if str(role["_target_"]).endswith("Denoiser"):
            role.prediction, role.sigma_data = "edm", 0.5
    cfg.data.batch_size = 64
    return build_experiment(cfg)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_networks_are_evaluated_with_the_schedules_own_noise_at_its_start(recipe, schedule, monkeypatch):
    node, scale = SCHEDULES[schedule]
    experiment, inputs = under(recipe, node), []
    for cls in (Denoiser, Gaussian, GaussianMixture):
        inner = cls.native

        def native(self, x_t, t, *args, inner=inner, **cond):
            inputs.append(x_t.detach()[t == 1].flatten())
            return inner(self, x_t, t, *args, **cond)

        monkeypatch.setattr(cls, "native", native)
    torch.manual_seed(0)
    by_hand(experiment)
    at_start = torch.cat(inputs)
    assert torch.isfinite(at_start).all()
    if len(at_start) >= 20:
        assert at_start.std().item() == pytest.approx(scale, rel=0.2 if len(at_start) > 100 else 0.5)
