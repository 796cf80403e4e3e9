from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from distill import config, methods
from distill.inspect import bench as module
from distill.inspect.plan.cards import CARDS, card_of_device

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
    assert set(rows) == {"all", "student"} and set(rows["student"]) == {"forward", "backward", "optimizer", "average"}
    assert all(value >= 0 for row in rows.values() for value in row.values())
    text = module.bench_tables("toy", plain)
    assert f"{plain['ratio']:.3f}" in text and "| student |" in text and "| all |" in text


TINY = [
    "roles.teacher.net.size=8",
    "roles.teacher.net.width=32",
    "roles.teacher.net.depth=1",
    "roles.teacher.net.heads=2",
    "roles.teacher.net.classes=4",
    "data.shape=[16,8,8]",
    "data.classes=4",
    "log.wandb=disabled",
    "train.threads=1",
    "engine.accelerator=cpu",
]


def test_a_real_size_made_tiny_states_what_each_role_keeps_and_the_share_of_the_peak():
    found = {}
    for layout in ("full", "shared_base"):
        cfg = config.load([TOY.parents[1] / "bench" / "dit-2b.yaml"], [*TINY, f"roles.layout={layout}"])
        found[layout] = module.bench(cfg, 2, warm=1, peak=0.5)
    full, shared = (found[k]["resident"] for k in found)
    weights = found["full"]["parameters"]["teacher"] * 4
    assert set(full) == {"teacher", "student", "critic", "ema"} and full["teacher"][1] == full["ema"][1] == 0
    for role in ("student", "critic"):
        assert full[role][0] == full["teacher"][0] >= weights  # and buffers
        assert 2 * weights <= full[role][1] < 2.01 * weights  # two moments, and a count of steps a parameter
        assert shared[role][0] < 0.8 * full[role][0] and shared[role][1] < 0.8 * full[role][1]
    for each in found.values():
        assert each["share"] == pytest.approx(each["tflop"] / (each["step"] / 1e3) / 0.5)
    assert "of the peak" in module.bench_tables("x", found["full"]) and "| critic |" in module.bench_tables(
        "x", found["full"]
    )


def test_adapters_and_their_base_are_one_call():
    cfg = config.load([TOY.parents[1] / "bench" / "dit-2b.yaml"], [*TINY, "roles.layout=shared_base"])
    method = module.build_experiment(cfg).method
    profiler = module.StepProfiler(method, 0, 1)
    profiler.recording = True
    z, t = module.torch.zeros(2, 16, 8, 8), module.torch.rand(2)
    method.student(z, t, label=module.torch.zeros(2, dtype=module.torch.long))
    assert [net for _, net, *_ in profiler.calls] == [method.student.net]


@pytest.mark.parametrize(
    "device, name",
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("NVIDIA GeForce GT 710", None),
    ],
)
def test_a_device_has_the_card_of_its_longest_name(device, name):
    assert card_of_device(device) is (CARDS[name] if name else None)


@pytest.mark.slow
def test_bench_of_two_processes(tmp_path):
    keys = [*TINY, "engine.devices=2", "engine.strategy=fsdp"]
    command = [
        sys.executable,
        "-m",
        "distill.cli",
        "bench",
        str(TOY.parents[1] / "bench" / "dit-2b.yaml"),
        *keys,
        "--steps",
        "1",
    ]
    env = os.environ | {"PYTHONPATH": str(TOY.parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "| processes | 2 |" in done.stdout and list(tmp_path.iterdir()) == []
