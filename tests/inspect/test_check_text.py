"""`distill check` of a text-to-image pipeline whose scheduler is DDIM, on data that were encoded with it, in both layouts."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from checks import look
from click.testing import CliRunner
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from distill import config
from distill.cli import main
from distill.models.diffusers import tiny
from distill.training.experiment import build_experiment

CONFIGS = Path(__file__).parents[2] / "configs"

CONFIG = """
name: text
roles: {{layout: {layout}, teacher: {{_target_: distill.models.diffusers.load, path: {root}/sd, "null": null}}}}
method: {{_target_: distill.methods.TDM, grid: 4, guidance: 3.0}}
data: {{_target_: distill.data.shards.Shards, path: {root}/data/train, batch_size: 8}}
optim: {{student: {{lr: 1.0e-5}}, critic: {{lr: 1.0e-5}}}}
train: {{steps: 2, validate_every: 0}}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A pipeline's folder and 24 captioned pictures, encoded by it."""
    root = tmp_path_factory.mktemp("text")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        patch.setattr(os, "fsync", lambda file: None)
        pipeline = StableDiffusionPipeline.from_pretrained(tiny.folder("sd15"), safety_checker=None)
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
        pipeline.save_pretrained(root / "sd")
        (root / "photos").mkdir()
        for i in range(24):
            pixels = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "photos" / f"{i}.png")
            (root / "photos" / f"{i}.txt").write_text(f"picture {i}")
        out = CliRunner().invoke(main, ["data", "encode", f"{root}/photos", f"{root}/data", "--pipeline", f"{root}/sd"])
        assert out.exit_code == 0, out.output
    return root


@pytest.mark.parametrize("layout", ["full", "shared_base"])
def test_the_teacher_is_compared_with_its_scheduler(layout, root, tmp_path):
    """Under the data's conditions; the same findings with and without adapters."""
    (tmp_path / "c.yaml").write_text(CONFIG.format(layout=layout, root=root))
    out = CliRunner().invoke(main, ["check", str(tmp_path / "c.yaml")]).output
    levels = {line[8:19].strip(): line[:8].strip() for line in out.splitlines()}
    assert levels["pipeline"] == "ok" and "repeats what its stock scheduler makes of the network" in out, out
    assert levels["guidance"] == "ok" and "changes the teacher's estimate" in out, out
    assert levels["conditions"] == "ok" and "gradients change with the condition (text) and with guidance" in out, out
    assert levels["start"] == levels["grid"] == levels["finite"] == "ok" and "failed to run" not in out, out


@pytest.mark.parametrize("prediction, level", [("flow", "ok"), ("v", "FAIL")])
def test_a_flow_pipeline_is_compared_with_its_schedulers_estimate(prediction, level, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    experiment = build_experiment(config.load([CONFIGS / "sd3" / "tdm.yaml"], ["model=tiny"]))
    for role in ("teacher", "student", "critic"):
        getattr(experiment.method, role).prediction = prediction
    (found,) = look(experiment, tmp_path / "run", "pipeline")
    assert found.level == level, found
