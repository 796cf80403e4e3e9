"""`distill score` of folders: sizes of images, and memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from distill.cli import main
from distill.metrics import distances


def folder(path, sizes, seed=0):
    path.mkdir()
    generator = np.random.default_rng(seed)
    for i, side in enumerate(sizes):
        Image.fromarray(generator.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(path / f"{i}.png")
    return str(path)


def test_images_of_several_sizes_are_refused_in_one_sentence(tmp_path):
    mixed, small, large = (folder(tmp_path / n, s) for n, s in (("m", [8, 8, 9, 8]), ("s", [8] * 4), ("l", [9] * 4)))
    for given, words in (
        ((mixed, small), "m holds images of 2 sizes (8x8, 9x9)"),
        ((small, mixed), "m holds images of 2 sizes"),
        ((small, large), "s and " + large + " hold 8x8 and 9x9"),
    ):
        for metric in ("fd", "mmd", "precision"):
            done = CliRunner().invoke(main, ["score", *given, "--metrics", metric])
            assert done.exit_code == 2 and words in done.output and "`features`" in done.output, done.output
            assert done.output.count("\n") == 1


def test_distances_of_large_pixels_fit_in_memory(tmp_path):
    """A covariance of 196,608 values a sample would take 309 GB."""
    a, b = (folder(tmp_path / str(seed), [256] * 6, seed) for seed in (0, 1))
    done = CliRunner().invoke(main, ["score", a, b, "--metrics", "fd,mmd,precision,recall"])
    assert done.exit_code == 0 and "fd: " in done.output, done.output
    assert CliRunner().invoke(main, ["score", a, a, "--metrics", "fd"]).output.startswith("fd: ")


@pytest.mark.parametrize("n, m", [(5, 9), (9, 5), (40, 12)])
def test_few_samples_of_many_values_have_the_same_frechet_distance(n, m):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, 30, generator=generator, dtype=torch.float64) @ torch.randn(30, 30, generator=generator).double()
    y = 2 * torch.randn(m, 30, generator=generator, dtype=torch.float64) + 1
    whole = distances.frechet_moments(*distances.moments(x), *distances.moments(y))
    assert n * m < 30**2 and distances.frechet(x, y) == pytest.approx(whole, rel=1e-6)
    assert abs(distances.frechet(x, x[torch.randperm(n, generator=generator)])) < 1e-8 * float(x.var(0).sum())
