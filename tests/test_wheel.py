"""The wheel alone, in a folder without a clone: recipes by name, a toy run, the demo's start."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
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
def python(wheel, tmp_path_factory):
    """The interpreter of a fresh environment that has the wheel, and the dependencies of this one."""
    folder = tmp_path_factory.mktemp("fresh")
    venv.create(folder, system_site_packages=True, symlinks=True)
    binary = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(binary), "install", "-q", "--no-deps", str(wheel)]
    subprocess.run(install, check=True)
    # `system_site_packages` means those of the base interpreter. Paths in a .pth file are added after the environment's own,
    # and .pth files in them, such as that of an editable distill, are not read.
    (site,) = folder.glob("lib/python*/site-packages")
    folders = sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})
    (site / "dependencies.pth").write_text("\n".join(folders) + "\n")
    return binary


def environment() -> dict[str, str]:
    """Without PYTHONPATH, so that only the environment's own distill is found."""
    kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return kept | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}


def run(python: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """The command that the wheel installs."""
    command = [str(python.with_name("distill")), *arguments]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=900)


def test_the_wheel_holds_what_the_package_finds_by_name(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    for name in recipes.names():
        assert f"distill/shipped_configs/{name}.yaml" in names
    assert "distill/shipped_configs/latents.yaml" in names
    assert any(n.startswith("distill/shipped_configs/digits/") and n.endswith(".json") for n in names)
    for part in ("model_index.json", "transformer/diffusion_pytorch_model.safetensors", "distill.json"):
        assert f"distill/shipped_checkpoints/digits-teacher/{part}" in names
    assert any(n.startswith("distill/inspect/report/page/") for n in names)
    assert {"distill/py.typed", "distill/__init__.pyi"} <= set(names), "type checkers read them"
    assert not any(n.startswith(("tests", "configs", "checkpoints")) for n in names)


def test_recipes_and_training_work_from_any_folder(python, tmp_path):
    command = [str(python), "-c", "import distill, sys; print(distill.__file__); print(sys.prefix)"]
    where, prefix = subprocess.check_output(command, cwd=tmp_path, env=environment(), text=True).split()
    assert Path(prefix) in Path(where).parents and ROOT not in Path(where).parents
    listed = run(python, tmp_path, "recipes")
    assert listed.returncode == 0 and "toy/tdm" in listed.stdout and "digits/tdm" in listed.stdout, listed
    trained = run(python, tmp_path, "train", "toy/tdm", "train.steps=5", "log.wandb=disabled")
    assert trained.returncode == 0 and "5 of 5 steps done" in trained.stdout, trained
    assert (tmp_path / "runs" / "toy-tdm" / "config.yaml").exists()


def test_the_demo_runs_from_any_folder(python, tmp_path):
    """Until it has trained; what follows takes minutes, and test_demo.py runs it."""
    command = [str(python), "-u", "-m", "distill.cli", "demo", "--steps", "2", "--out", "mine"]
    env = environment()
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
