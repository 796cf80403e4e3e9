from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from distill.denoise import Denoiser
from distill.errors import BadInput
from distill.export import export
from distill.export import verify as module
from distill.export.verify import STOCK, stock_differences, verify
from distill.models.diffusers import UNet2D, schedule_of


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def edit_tensors(file, **changes):
    stored = load_file(file)
    save_file({k: changes[k](v).contiguous() if k in changes else v for k, v in stored.items()}, file)


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """An honest export and copies of it, each damaged in one way, with what the fresh process says of each."""
    root = tmp_path_factory.mktemp("exports")
    torch.manual_seed(0)
    net = UNet2D(size=8, widths=(8, 16), classes=2)
    honest = export(Denoiser(net, schedule_of("DDIMScheduler"), "v"), 2, "ode", root / "honest")
    damage = {
        "prediction": lambda f: edit(f / "scheduler/scheduler_config.json", prediction_type="epsilon"),
        "clipping": lambda f: edit(f / "scheduler/scheduler_config.json", clip_sample=True, clip_sample_range=0.5),
        "grid": lambda f: edit(f / "scheduler/scheduler_config.json", timestep_spacing="leading"),
        "labels": lambda f: edit_tensors(f / "reference.safetensors", labels=lambda v: v.roll(1)),
        "nan": lambda f: edit_tensors(f / "reference.safetensors", samples=lambda v: v * torch.nan),
        "noise": lambda f: edit_tensors(f / "reference.safetensors", noise=lambda v: v.flip(0)),
        "gone": lambda f: (f / "model_index.json").unlink(),
    }
    for name, hurt in damage.items():
        hurt(shutil.copytree(honest, root / name))
    jobs = {name: (name, 2) for name in ("honest", *damage)} | {"other steps": ("honest", 4)}
    found = stock_differences([root / name for name, _ in jobs.values()], [steps for _, steps in jobs.values()])
    return dict(zip(jobs, found)), root


def test_the_difference_sees_every_damage(judged):
    found, _ = judged
    assert found["honest"] < 1e-5
    for name in ("prediction", "clipping", "grid", "labels", "other steps"):
        assert 1e-3 < found[name] < 1e3, name
    assert found["nan"] == float("inf")
    assert "torch draws other numbers" in found["noise"] and "model_index.json" in found["gone"]


@pytest.mark.parametrize(
    "name, words",
    [
        ("prediction", "other samples than the trainer"),
        ("nan", "inf > 0.0001"),
        ("gone", "stock code cannot sample from it"),
    ],
)
def test_verify_refuses_what_differs(judged, monkeypatch, name, words):
    found, root = judged
    monkeypatch.setattr(module, "stock_differences", lambda folders, steps, base, device: [found[name]])
    with pytest.raises(BadInput, match=words):
        verify(root / name)


def test_an_honest_export_passes(judged, monkeypatch, capsys):
    found, root = judged
    monkeypatch.setattr(
        module, "stock_differences", lambda folders, steps, base, device: [found["honest"]] if steps == [2] else []
    )
    assert verify(root / "honest") == found["honest"]
    assert "max |stock - ours|" in capsys.readouterr().out


def test_other_steps_warn_and_are_not_judged(judged, monkeypatch):
    found, root = judged
    monkeypatch.setattr(
        module, "stock_differences", lambda folders, steps, base, device: [found["other steps"]] if steps == [4] else []
    )
    with pytest.warns(UserWarning, match="made for 2 steps; with 4"):
        assert verify(root / "honest", steps=4) > 1e-3


def test_strange_folders_and_dead_processes(tmp_path, monkeypatch):
    with pytest.raises(BadInput, match="was not exported by distill"):
        verify(tmp_path)
    monkeypatch.setattr(module, "STOCK", "raise SystemExit('no torch here')")
    with pytest.raises(BadInput, match="no torch here"):
        stock_differences([tmp_path], [1])


def test_the_proof_is_independent_of_us():
    imported = [line for line in STOCK.splitlines() if line.strip().startswith(("import ", "from "))]
    assert imported and not any("distill" in line for line in imported)
    assert 'sys.modules["distill"] = None' in STOCK
