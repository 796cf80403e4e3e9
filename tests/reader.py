"""What a reader of the documentation has before the first command: photos, prompts, arrays, a trained run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from distill.config.recipes import CHECKPOINTS, PACKAGE

DASHBOARD = "docs/pictures/dashboard.py"
PAGES = {  # page -> files that it takes for granted; each name is a key of FILES or a run made by `Library`
    "README.md": ("photos", "runs/demo/student"),
    "docs/benchmarks.md": ("fashion_mnist", "data/digits"),
    "docs/check.md": ("data/digits",),
    "docs/dashboard.md": ("data/digits", DASHBOARD),
    "docs/data.md": ("photos", "clips", "prompts.txt", "arrays.npz"),
    "docs/export.md": ("runs/digits-tdm", "runs/digits-mmd"),
    "docs/methods/ayf.md": ("data/digits",),
    "docs/methods/meanflow.md": ("data/digits",),
    "docs/methods/scm.md": ("data/digits",),
    "docs/metrics.md": ("runs/digits-tdm", "photos", "samples"),
    "docs/models.md": ("photo.png",),
    "docs/plan.md": ("data/digits",),
    "docs/recipes.md": ("photos", "prompts.txt"),
    "docs/report.md": ("runs/digits-tdm", "runs/digits-dmd2"),
    "docs/strategies.md": ("data/digits",),
    "docs/survival.md": ("data/digits",),
    "docs/howto/sweep.md": (),
    "docs/start/demo.md": ("runs/demo/student",),
    "docs/troubleshooting.md": ("runs/digits-tdm",),
}


def photos(path: Path) -> None:
    """Two classes of eight images with captions."""
    random = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (path / name).mkdir(parents=True)
        for i in range(8):
            Image.fromarray(random.integers(0, 255, (64, 64, 3), np.uint8)).save(path / name / f"{i}.png")
            (path / name / f"{i}.txt").write_text(f"a {name}, number {i}")


def samples(path: Path) -> None:
    """Eight images in one folder."""
    path.mkdir(parents=True)
    for i, file in enumerate(range(8)):
        noise = np.random.default_rng(100 + i).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(noise).save(path / f"{file}.png")


def photo(path: Path) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(path)


def clips(path: Path) -> None:
    path.mkdir(parents=True)
    for i in range(2):
        np.save(path / f"{i}.npy", np.random.default_rng(i).integers(0, 255, (9, 64, 64, 3), np.uint8))
        (path / f"{i}.txt").write_text(f"a clip, number {i}")


def prompts(path: Path) -> None:
    path.write_text("".join(f"a picture of {i} cats\n" for i in range(16)))


def arrays(path: Path) -> None:
    random = np.random.default_rng(0)
    np.savez(path, x=random.integers(0, 255, (64, 8, 8, 3), np.uint8), y=random.integers(0, 2, 64))


def fashion(path: Path) -> None:
    """MNIST's four files, of 64 and 16 images."""
    path.mkdir(parents=True)
    random = np.random.default_rng(0)
    for split, count in (("train", 64), ("t10k", 16)):
        pixels = random.integers(0, 255, (count, 28, 28), np.uint8)
        head = np.array([0x803, count, 28, 28], ">i4").tobytes()
        (path / f"{split}-images-idx3-ubyte").write_bytes(head + pixels.tobytes())
        labels = np.arange(count, dtype=np.uint8) % 10
        (path / f"{split}-labels-idx1-ubyte").write_bytes(np.array([0x801, count], ">i4").tobytes() + labels.tobytes())


def teacher(path: Path) -> None:
    """The shipped teacher stands for the demo's student: a folder of the same pipeline."""
    shutil.copytree(CHECKPOINTS / "digits-teacher", path)


FILES: dict[str, Callable[[Path], object]] = {
    "photos": photos,
    "samples": samples,
    "photo.png": photo,
    "clips": clips,
    "prompts.txt": prompts,
    "arrays.npz": arrays,
    "fashion_mnist": fashion,
    "runs/demo/student": teacher,
    DASHBOARD: lambda path: shutil.copy(Path(__file__).parents[1] / DASHBOARD, path),
}
RUNS = {"runs/digits-tdm": "digits/tdm", "runs/digits-dmd2": "digits/dmd2", "runs/digits-mmd": "digits/mmd"}


class Library:
    """Makes each file once, and puts copies of a page's own into its folder."""

    def __init__(self, root: Path, run: Callable[[list[str], Path], None]):
        self.root, self.run = root, run  # run(arguments of distill, folder to run in)

    def put(self, page: str, folder: Path) -> None:
        if (launch := PACKAGE.parent / "launch").is_dir():
            shutil.copytree(launch, folder / "launch")
        for name in PAGES.get(page, ()):
            self.make(name)
            for part in ("data/digits", name) if name.startswith("runs/digits") else (name,):
                source, copy = self.root / part, folder / part
                copy.parent.mkdir(parents=True, exist_ok=True)
                if source.is_dir():
                    shutil.copytree(source, copy, dirs_exist_ok=True)
                else:
                    shutil.copy(source, copy)

    def make(self, name: str) -> None:
        path = self.root / name
        if path.exists():
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if name == "data/digits":
            self.run(["data", "digits", name], self.root)
        elif name in RUNS:
            self.make("data/digits")
            self.run(["train", RUNS[name], "--no-check"], self.root)
        else:
            FILES[name](path)
