from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

from distill import config
from distill.denoise import Denoiser
from distill.errors import BadInput
from distill.inspect.frontier import _interpolation, interpolate_runs
from distill.models import MLP
from distill.models.diffusers import tiny_parts
from distill.models.lora import LoRAAdapter, SharedBase
from distill.noise import RectifiedFlow
from distill.training.load import load_experiment
from distill.training.run import train

RECIPE = Path(__file__).parents[1] / "configs" / "toy" / "diversity.yaml"
SMALL = [
    "log.wandb=disabled",
    "train.steps=4",
    "train.validate_every=0",
    "train.threads=1",
    "data.batch_size=8",
    "method.warm_start=0",
    "eval.samples=200",
    "eval.validation_samples=8",
]


@pytest.fixture(scope="module")
def students(tmp_path_factory):
    root = tmp_path_factory.mktemp("merge")
    for name, seed in (("a", 0), ("b", 1)):
        train(config.load([RECIPE], [*SMALL, f"seed={seed}"]), root / name)
    return root


def test_the_ends_of_the_tradeoff_are_the_students(students):
    front = interpolate_runs(students / "a", students / "b", students / "front", (0.0, 0.5, 1.0))
    assert [point["share"] for point in front] == [0.0, 0.5, 1.0]
    for name, point in (("a", front[0]), ("b", front[-1])):
        experiment = load_experiment(students / name)
        z, cond = experiment.noise(200, experiment.cfg.eval.seed)
        x = experiment.method.sample(z, cond, generator=torch.Generator().manual_seed(experiment.cfg.eval.seed))
        assert point["energy"] == pytest.approx(experiment.suite().score(x, cond)["energy"], rel=1e-5)
    assert front[0]["energy"] != front[1]["energy"] != front[2]["energy"]
    assert json.loads((students / "front" / "tradeoff.json").read_text()) == front
    assert (students / "front" / "tradeoff.md").read_text().count("\n") == 5


def test_what_cannot_be_mixed_is_refused(students):
    with pytest.raises(BadInput, match="exists"):
        interpolate_runs(students / "a", students / "b", students / "a", (0.5,))
    train(config.load([RECIPE], [*SMALL, "method.grid=2"]), students / "short")
    with pytest.raises(BadInput, match="different grids or samplers"):
        interpolate_runs(students / "a", students / "short", students / "none", (0.5,))
    assert not (students / "none").exists()


def test_adapters_of_one_base_are_mixed_by_their_product():
    torch.manual_seed(0)
    base = SharedBase(MLP(dim=2), rank=2, alpha=4)
    ours, theirs = (Denoiser(tiny_parts.shake(LoRAAdapter(base), 0.3, seed), RectifiedFlow()) for seed in (1, 2))
    ends = [copy.deepcopy(d.net).merged().state_dict() for d in (ours, theirs)]
    mix = _interpolation(ours, theirs)
    for share in (0.3, 1.0, 0.0):  # each from the ends, not from the last
        mix(share)
        for key, value in ours.net.merged().state_dict().items():
            torch.testing.assert_close(value, torch.lerp(ends[0][key], ends[1][key], share), rtol=1e-5, atol=1e-6)
    with pytest.raises(BadInput, match="an adapter and the other a whole network"):
        _interpolation(ours, Denoiser(MLP(dim=2), RectifiedFlow()))
