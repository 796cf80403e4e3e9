"""The wheel alone, in a folder without a clone: recipes by name, a toy run, the demo's start."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from distill.config import recipes

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel of the files that git tracks, so that no build folder is left in the clone."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.check_output(listed, cwd=ROOT, text=True).split("\0")
    for name in filter(None, names):
        if name.split("/")[0] not in ("docs", "tests") and (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(source),
    ]
    subprocess.run(build, check=True)
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The wheel's files in a folder of their own."""
    target = tmp_path_factory.mktemp("site")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run(install, check=True)
    return target


def run(installed: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    command = [sys.executable, "-m", "distill.cli", *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=900)


def test_the_wheel_holds_what_the_package_finds_by_name(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for name in recipes.names():
        assert f"distill/shipped_configs/{name}.yaml" in names
    assert "distill/shipped_configs/latents.yaml" in names
    assert any(n.startswith("distill/shipped_configs/digits/") and n.endswith(".json") for n in names)
    for part in ("model_index.json", "transformer/diffusion_pytorch_model.safetensors", "distill.json"):
        assert f"distill/shipped_checkpoints/digits-teacher/{part}" in names
    assert any(n.startswith("distill/inspect/report/page/") for n in names)
    assert not any(n.startswith(("tests", "configs", "checkpoints")) for n in names)


def test_recipes_and_training_work_from_any_folder(installed, tmp_path):
    env = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", "import distill; print(distill.__file__)"]
    assert subprocess.check_output(command, cwd=tmp_path, env=env, text=True).startswith(str(installed))
    listed = run(installed, tmp_path, "recipes")
    assert listed.returncode == 0 and "toy/tdm" in listed.stdout and "digits/tdm" in listed.stdout, listed
    trained = run(installed, tmp_path, "train", "toy/tdm", "train.steps=5", "log.wandb=disabled")
    assert trained.returncode == 0 and "5 of 5 steps done" in trained.stdout, trained
    assert (tmp_path / "runs" / "toy-tdm" / "config.yaml").exists()


def test_the_demo_runs_from_any_folder(installed, tmp_path):
    """Until it has trained; what follows takes minutes, and test_demo.py runs it."""
    command = [sys.executable, "-u", "-m", "distill.cli", "demo", "--steps", "2", "--out", "mine"]
    env = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as demo:
        lines = []
        for line in demo.stdout:
            lines.append(line)
            if line.startswith("trained in"):
                break
        demo.kill()
    assert lines[-1].startswith("trained in"), "".join(lines)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine"]
    assert {"data", "run"} <= {p.name for p in (tmp_path / "mine").iterdir()}
    assert (tmp_path / "mine" / "run" / "config.yaml").exists()
