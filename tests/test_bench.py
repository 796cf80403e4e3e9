from __future__ import annotations

import time
from pathlib import Path

import pytest

from distill import bench as module
from distill import config, methods

TOY = Path(__file__).parents[1] / "configs" / "toy" / "teacher.yaml"
SMALL = ["log.wandb=disabled", "train.threads=1", "data.batch_size=256"]


def measured(*overrides, steps=6):
    return module.bench(config.load([TOY], [*SMALL, *overrides]), steps, warm=2)


@pytest.fixture(scope="module")
def plain():
    return measured("engine.accelerator=cpu")


def test_the_floor_is_the_steps_own_work(plain):
    """Linear layers cost 2 B n_in n_out forward and twice that backward, but for the input's gradient."""
    net = config.build(config.load([TOY], SMALL).roles, (), "roles")["student"].net
    forward = 0
    for name, p in net.named_parameters():
        if p.ndim == 2 and "label" not in name:
            forward += 2 * 256 * p.numel()
    assert 2 * forward < plain["tflop"] * 1e12 <= 3 * forward
    assert plain["parameters"]["student"] == sum(p.numel() for p in net.parameters())
    assert plain["samples_per_second"] == pytest.approx(256 / plain["step"] * 1e3)


def test_time_lost_in_a_method_is_seen(plain, monkeypatch):
    draw = methods.Diffusion.draw

    def slow(self, *shared):
        time.sleep(0.1)
        return draw(self, *shared)

    monkeypatch.setattr(methods.Diffusion, "draw", slow)
    found = measured()
    assert found["phases"]["all"]["draw"] > 100 > plain["phases"]["all"]["draw"]
    assert found["ratio"] > plain["ratio"] and found["step"] - found["floor"] > 100


def test_the_phases_make_up_the_step(plain):
    rows = plain["phases"]
    assert set(rows) == {"all", "student"} and set(rows["student"]) == {"forward", "backward", "optimiser", "average"}
    assert all(value >= 0 for row in rows.values() for value in row.values())
    text = module.markdown("toy", plain)
    assert f"{plain['ratio']:.3f}" in text and "| student |" in text and "| all |" in text
