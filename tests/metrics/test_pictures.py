from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from distill.denoise import Gaussian, GaussianMixture
from distill.errors import BadInput
from distill.metrics import pictures
from distill.noise import RectifiedFlow

RF = RectifiedFlow()
GREY = torch.tensor([-1.0, -0.5, 0.0, 0.5, 1.0, 7.0]).view(6, 1, 1, 1).expand(6, 1, 4, 4)


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def near(array, colour, reach=40):
    return (np.abs(array - np.array(colour)).max(-1) < reach).sum()


# --- images


def test_grid_places_images_row_by_row_with_square_pixels(tmp_path):
    path = pictures.grid(GREY, 3, tmp_path / "a" / "grid.png", scale=3)
    image = pixels(path)
    side, gap = 12, 2
    assert image.shape == (2 * side + gap, 3 * side + 2 * gap, 3)
    for i, value in enumerate([0, 64, 128, 191, 255, 255]):
        top, left = i // 3 * (side + gap), i % 3 * (side + gap)
        assert (image[top : top + side, left : left + side] == value).all()
    assert (image[side : side + gap] == 255).all() and (image[:, side : side + gap] == 255).all()


def test_upscaling_keeps_every_pixel_and_colour(tmp_path):
    x = torch.rand(1, 3, 5, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
    image = pixels(pictures.grid(x, 1, tmp_path / "x.png", scale=4))
    exact = ((x[0].permute(1, 2, 0) + 1) * 127.5).round().int().numpy()
    assert (image == exact.repeat(4, 0).repeat(4, 1)).all()


def test_scale_and_columns_find_themselves(tmp_path):
    assert pixels(pictures.grid(GREY, None, tmp_path / "x.png")).shape[:2] == (2 * 48 + 8, 3 * 48 + 2 * 8)
    assert pixels(pictures.grid(torch.zeros(1, 1, 64, 64), 8, tmp_path / "y.png")).shape[:2] == (64, 64)


def test_labels_are_written_below(tmp_path):
    plain = pixels(pictures.grid(GREY, 3, tmp_path / "x.png", scale=12))
    named = pixels(pictures.grid(GREY, 3, tmp_path / "y.png", labels=torch.arange(6), scale=12))
    row = (named.shape[0] - plain.shape[0]) // 2
    assert row > 10 and (named[:48] == plain[:48]).all()
    below = named[48 : 48 + row, :48]
    assert near(below, (0x65, 0x6D, 0x76), 60) > 5
    assert (
        pixels(pictures.grid(GREY, 3, tmp_path / "z.png", labels=[7] * 6, scale=12))[48 : 48 + row, :48] != below
    ).any()


def test_panels_are_side_by_side_under_their_titles(tmp_path):
    dark, light = -torch.ones(4, 1, 8, 8), 0.5 * torch.ones(4, 1, 8, 8)
    long = "a title that is longer than four little images"
    image = pixels(pictures.side_by_side({long: dark, "student": light}, tmp_path / "x.png", columns=2, scale=2))
    black, grey = (image == 0).all(-1), (image == 191).all(-1)
    assert black.sum() == grey.sum() == 4 * 16 * 16
    assert black.any(0).nonzero()[0].max() < grey.any(0).nonzero()[0].min()  # left and right
    assert (black.any(1) == grey.any(1)).all()  # on one line
    top = black.any(1).nonzero()[0].min()
    inked = (image[:top] < 128).all(-1).any(0).nonzero()[0]
    assert 0 < inked.min() and inked.max() < image.shape[1] - 1 and inked.max() - inked.min() > 300


def test_pictures_refuse_bad_images(tmp_path):
    path = tmp_path / "x.png"
    for bad in (
        torch.zeros(4, 2, 8, 8),
        torch.zeros(1, 8, 8),
        torch.zeros(0, 1, 8, 8),
        torch.full((1, 1, 2, 2), math.nan),
    ):
        with pytest.raises(BadInput):
            pictures.grid(bad, 2, path)
        with pytest.raises(BadInput):
            pictures.side_by_side({"x": bad}, path)
    with pytest.raises(BadInput, match="5 labels for 6 images"):
        pictures.grid(GREY, 3, path, labels=range(5))
    for draw in (pictures.side_by_side, pictures.scatter, pictures.histogram):
        with pytest.raises(BadInput, match="no panels"):
            draw({}, path)
    assert not path.exists()


# --- points


def test_a_panel_without_a_title_leaves_no_room_for_one(tmp_path):
    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0))
    first_row_with_ink = [
        int((pixels(pictures.scatter({title: x}, tmp_path / f"{title}.png")) < 250).any(2).any(1).argmax())
        for title in ("", "title")
    ]
    assert pixels(tmp_path / ".png").shape[0] < pixels(tmp_path / "title.png").shape[0]
    assert first_row_with_ink[0] < 40


def test_scatter_draws_every_panel_over_the_reference(tmp_path):
    ring = GaussianMixture.ring(schedule=RF)
    x, _ = ring.sample(300, generator=torch.Generator().manual_seed(0))
    bare = pixels(pictures.scatter({"a": x, "b": x}, tmp_path / "a.png"))
    exact = pixels(pictures.scatter({"a": x[:1], "b": x[:1]}, tmp_path / "b.png", reference=ring))
    dots = pixels(pictures.scatter({"a": x[:1], "b": x[:1]}, tmp_path / "c.png", reference=x))
    half = bare.shape[1] // 2
    for part in (slice(half), slice(half, None)):
        assert near(bare[:, part], (0x09, 0x69, 0xDA), 90) > 200  # samples
        assert near(exact[:, part], (0xDF, 0xE4, 0xEA), 4) > 500  # contours
        assert near(dots[:, part], (0xB6, 0xBE, 0xC8), 12) > 300  # reference points
    assert bare.shape == (600, 1088, 3)


def test_axes_are_equal_and_set_by_the_reference(monkeypatch, tmp_path):
    seen = []
    dress = pictures._dress
    monkeypatch.setattr(pictures, "_dress", lambda ax, *a: (dress(ax, *a), seen.append(ax)))
    y = torch.tensor([[0.0, 0.0], [2.0, 1.0]])
    x = torch.tensor([[1.0, 0.5], [50.0, 0.0], [1.0, -50.0]])
    pictures.scatter({"student": x}, tmp_path / "x.png", reference=y)
    (ax,) = seen
    assert ax.get_xlim() == pytest.approx((1 - 1.16, 1 + 1.16)) and ax.get_ylim() == pytest.approx(
        (0.5 - 1.16, 0.5 + 1.16)
    )
    assert ax.get_aspect() == 1 and ax.get_title() == "student"
    assert [text.get_text() for text in ax.texts] == ["2 of 3 outside"]


def test_contours_hold_the_stated_masses(monkeypatch, tmp_path):
    from matplotlib.axes import Axes

    seen = {}
    monkeypatch.setattr(Axes, "contourf", lambda self, u, v, p, levels, **kw: seen.update(levels=levels))
    pictures.scatter({"x": torch.zeros(1, 2)}, tmp_path / "x.png", reference=Gaussian([0.0, 0.0], 1.0, RF))
    peak = 1 / (2 * math.pi)  # the level set of N(0, I) with mass m has the density peak (1 - m)
    assert [v / peak for v in seen["levels"][:4]] == pytest.approx([0.01, 0.1, 0.4, 0.7], rel=0.05)


def test_histogram_is_a_density_over_the_reference(monkeypatch, tmp_path):
    from matplotlib.axes import Axes

    oracle = GaussianMixture([[-1.0], [1.0]], 0.3, schedule=RF)
    x, _ = oracle.sample(2000, generator=torch.Generator().manual_seed(0))
    image = pixels(pictures.histogram({"student": x, "flat": x[:, 0]}, tmp_path / "x.png", reference=oracle))
    assert near(image, (0xCC, 0xD4, 0xDD), 4) > 5000 and near(image, (0x09, 0x69, 0xDA), 60) > 500
    seen = []
    monkeypatch.setattr(Axes, "stairs", lambda self, values, edges, **kw: seen.append((values, edges)))
    pictures.histogram({"student": torch.cat([x, x + 100])}, tmp_path / "y.png", reference=x)
    reference, student = (float((values * edges.diff()).sum()) for values, edges in seen)
    assert reference == pytest.approx(1) and student == pytest.approx(0.5)


def test_plots_refuse_bad_points(tmp_path):
    for bad in (torch.zeros(3, 3), torch.zeros(0, 2), torch.full((2, 2), math.nan), torch.zeros(4)):
        with pytest.raises(BadInput, match="'x'"):
            pictures.scatter({"x": bad}, tmp_path / "x.png")
    with pytest.raises(BadInput, match="'reference'"):
        pictures.scatter({"x": torch.zeros(3, 2)}, tmp_path / "x.png", reference=torch.zeros(3, 1))
    with pytest.raises(BadInput, match="'x'"):
        pictures.histogram({"x": torch.zeros(3, 2)}, tmp_path / "x.png")


def test_no_interactive_backend_is_touched(tmp_path):
    before = "matplotlib.pyplot" in sys.modules
    pictures.scatter({"x": torch.zeros(3, 2)}, tmp_path / "x.png")
    assert ("matplotlib.pyplot" in sys.modules) == before
