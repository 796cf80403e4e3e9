"""Each method once under EDM's schedule with data of standard deviation 0.5: sigma up to 80, networks in the EDM chart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from test_contract import RECIPES, by_hand, same, small, state

from distill import config, methods
from distill.training.experiment import build_experiment

VE = {"_target_": "distill.noise.VE", "sigma_max": 80.0, "rho": 7.0}
FIRST: dict[str, Path] = {}  # one recipe a method
for recipe in RECIPES:
    FIRST.setdefault(str(config.load([recipe]).method[config.TARGET]).rsplit(".", 1)[1], recipe)


def under_edm(node):
    """Every schedule becomes VE, every network predicts in the EDM chart with sigma_data 0.5."""
    if isinstance(node, dict):
        out = {key: VE if key == "schedule" else under_edm(value) for key, value in node.items()}
        if "prediction" in out:
            out |= {"prediction": "edm", "sigma_data": 0.5}
        return out
    return node


@pytest.mark.parametrize("name", methods.names())
def test_a_method_trains_and_samples_from_noise_of_standard_deviation_80(name):
    cfg = small(FIRST[name])
    cfg.roles = under_edm(OmegaConf.to_container(cfg.roles, resolve=False))
    cfg.data = under_edm(OmegaConf.to_container(cfg.data, resolve=False))
    cfg.data.batch_size = 64
    if name == "SCM":
        cfg.method.sigma_data = 0.5
    experiment = build_experiment(cfg)
    method, starts, moved = experiment.method, [], set()
    update, inner = method._update, method.student.forward

    def asked(x_t, t, **cond):
        at_noise = t == 1
        if at_noise.sum() > 8:
            starts.append(x_t[at_noise].square().mean().sqrt().item())
        return inner(x_t, t, **cond)

    def watched(role, value):
        assert torch.isfinite(value), f"{role}'s loss is {value}"
        before = state(getattr(method, role))
        update(role, value)
        moved.add(role) if not same(before, state(getattr(method, role))) else None

    method.student.forward, method._update = asked, watched
    by_hand(experiment)
    assert moved == set(method.trainable)
    assert all(40 < size < 160 for size in starts), f"the student is asked at t = 1 with x_t of size {starts}"
    method.ema = method.student
    starts.clear()
    x = method.sample(torch.randn(64, *method.shape), {}, generator=torch.Generator().manual_seed(0))
    assert torch.isfinite(x).all() and starts and all(40 < size < 160 for size in starts)
