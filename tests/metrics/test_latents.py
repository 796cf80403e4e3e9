from __future__ import annotations

import math

import pytest
import torch

from distill.data.toy import Tensors
from distill.errors import BadInput
from distill.metrics.latents import LatentSuite, features


def normal(n, shift=0.0, scale=1.0, shape=(3, 8, 8), seed=0):
    return shift + scale * torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def test_features_are_means_of_parts_and_deviations():
    x = torch.zeros(1, 2, 4, 4)
    x[0, 0, :2, :2], x[0, 1] = 8.0, torch.arange(16.0).view(4, 4)
    out = features(x)[0]
    assert out[:4].tolist() == [8, 0, 0, 0] and out[4:8].tolist() == [2.5, 4.5, 10.5, 12.5]
    torch.testing.assert_close(out[8:], torch.stack([x[0, 0].std(), x[0, 1].std()]))
    assert features(torch.zeros(2, 3, 8)).shape == (2, 9) and features(torch.zeros(2, 3, 1, 4, 4)).shape == (2, 27)


def test_the_distance_is_that_of_known_gaussians():
    """A shift by d moves each of the 4 C means by d; half the scale, a mean's deviation and the deviations themselves."""
    tests, many = LatentSuite(normal(20_000)), normal(20_000, seed=1)
    assert tests.score(many, {}, quick=True)["latent_fd"] < 5e-3
    assert tests.score(many + 0.5, {}, quick=True)["latent_fd"] == pytest.approx(12 * 0.25, rel=0.02)
    part = 1 / 4  # of a mean over 4 x 4 normal numbers
    half = 12 * (part / 2) ** 2 + 3 * 0.5**2
    assert tests.score(many / 2, {}, quick=True)["latent_fd"] == pytest.approx(half, rel=0.05)
    full = LatentSuite(normal(200)).score(normal(200, seed=1), {})
    assert full["std"] == pytest.approx(1, abs=0.05) and abs(full["mean"]) < 0.05 and abs(full["latent_mmd"]) < 1
    assert LatentSuite(normal(200), held_out=normal(200, seed=2)).reference_vs_holdout()["latent_fd"] < 1


def test_a_reference_that_is_made_is_made_once_and_kept(tmp_path):
    calls, keep = [], tmp_path / "reference.safetensors"

    def made(ranks):
        calls.append(1)
        return normal(50)

    first = LatentSuite(made, keep, "w = 3")
    found = first.score(normal(50, seed=1), {}, quick=True)
    assert first.score(normal(50, seed=1), {}, quick=True) == found and len(calls) == 1
    assert LatentSuite(made, keep, "w = 3").score(normal(50, seed=1), {}, quick=True) == found and len(calls) == 1
    LatentSuite(made, keep, "w = 4").prepare()
    assert len(calls) == 2 and [f.name for f in tmp_path.iterdir()] == [keep.name]


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 8, 8), (4, 3, 8, 8), (4, 16)])
def test_pictures_of_images_video_and_sound(shape, tmp_path):
    tests = LatentSuite(normal(4, shape=shape))
    tests.picture({"a": normal(20, shape=shape), "b": normal(2, shape=shape)}, tmp_path / "a.png")
    seen = []
    decoded = LatentSuite(normal(4, shape=shape), decode=lambda x: seen.append(x.shape) or torch.tanh(x[:, :3]))
    if shape[0] >= 3 and len(shape) > 2:
        decoded.picture({"a": normal(20, shape=shape)}, tmp_path / "b.png")
        assert seen == [(16, *shape)]
    assert (tmp_path / "a.png").stat().st_size > 500


def test_random_tensors_have_the_names_and_shapes_of_a_run():
    data = Tensors([4, 8, 8], {"text": [6, 5], "text_mask": [6], "pooled": [3]}, batch_size=7)
    batch, again = next(data.loader(start=3)), list(zip(range(4), data.loader()))[3][1]
    assert all(torch.equal(batch[k], again[k]) for k in batch) and set(batch) == {"x", "text", "text_mask", "pooled"}
    assert (
        batch["x"].shape == (7, 4, 8, 8) and batch["text"].shape == (7, 6, 5) and batch["text"].dtype == torch.float32
    )
    mask = batch["text_mask"]
    assert mask.dtype == torch.long and set(mask.unique().tolist()) <= {0, 1} and (mask[:, 0] == 1).all()
    assert (mask.diff(dim=1) <= 0).all()  # ones come first
    assert not torch.equal(batch["x"], next(data.loader(rank=1, start=3))["x"])
    assert "x" not in Tensors([4, 8, 8], {"text": [6, 5]}, 2, samples=False).all(3)
    with pytest.raises(BadInput, match="batch_size=0"):
        Tensors([1], {}, 0)
    assert math.isclose(float(data.all(2000)["text"].std()), 1, abs_tol=0.02)
