"""Codecs of .npy and image members, and the errors of samples that cannot be decoded."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from distill.data.info import Info
from distill.data.shards import sample
from distill.data.shards.errors import BadSample
from distill.data.sources import array, image


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32", "float16", "float32", ">f4", "bool"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (3, 4, 5)])
def test_arrays_round_trip(dtype, shape):
    x = np.random.default_rng(0).integers(0, 2, shape).astype(dtype)
    data = array.encode(x)
    assert np.array_equal(array.decode(data), x) and array.decode(data).dtype == x.dtype
    assert np.array_equal(np.load(io.BytesIO(data)), x)


def test_arrays_written_by_numpy_are_read():
    out = io.BytesIO()
    x = np.asfortranarray(np.arange(12).reshape(3, 4))
    np.save(out, x)
    assert np.array_equal(array.decode(out.getvalue()), x)
    out = io.BytesIO()
    np.lib.format.write_array(out, x, version=(2, 0))
    assert np.array_equal(array.decode(out.getvalue()), x)


def test_nothing_is_unpickled():
    out = io.BytesIO()
    np.save(out, np.array([{}]), allow_pickle=True)
    with pytest.raises(ValueError, match="objects"):
        array.decode(out.getvalue())


@pytest.mark.parametrize("cut", [3, 20, -1])
def test_short_or_long_arrays_are_refused(cut):
    data = array.encode(np.arange(6.0))
    with pytest.raises(ValueError):
        array.decode(data[:cut])
    with pytest.raises(ValueError):
        array.decode(data + b"x")


@pytest.mark.parametrize("channels", [1, 3])
def test_images_round_trip(channels):
    x = np.random.default_rng(0).integers(0, 256, (channels, 7, 5), dtype=np.uint8)
    assert np.array_equal(image.decode(image.encode(x)), x)


def test_pixels_are_rounded_and_clipped_to_bytes():
    assert image.to_uint8(torch.tensor([-7.0, -1.0, 0.0, 0.25, 1.0, 7.0])).tolist() == [0, 0, 128, 159, 255, 255]


@pytest.mark.parametrize("channels", [1, 3])
def test_tiles_stand_row_by_row(channels):
    x = np.broadcast_to(np.array([0, 255, 100], np.uint8)[:, None, None, None], (3, channels, 4, 6))
    sheet, edges = image.tile(x, scale=1, gap=0)
    assert sheet.mode == "RGB" and sheet.size == (12, 8) and edges == [(3, 4), (9, 4), (3, 8)]
    assert [sheet.getpixel(p)[0] for p in ((0, 0), (6, 0), (0, 4), (6, 4))] == [0, 255, 100, 255]
    sheet, edges = image.tile(x, 3, scale=2, gap=1, below=5, background=None)
    assert sheet.mode == "RGBA" and sheet.size == (3 * 12 + 2, 8 + 5) and edges == [(6, 8), (19, 8), (32, 8)]
    assert sheet.getpixel((12, 0)) == sheet.getpixel((0, 8)) == (0, 0, 0, 0)


def saved(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def test_transparency_is_laid_on_white():
    clear = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    assert (image.decode(saved(clear)) == 255).all() and image.decode(saved(clear)).shape == (3, 4, 4)
    grey = Image.new("LA", (4, 4), (0, 0))
    assert (image.decode(saved(grey)) == 255).all() and image.decode(saved(grey)).shape == (1, 4, 4)


def test_the_camera_orientation_is_followed(tmp_path):
    tag = Image.Exif()
    tag[0x0112] = 6
    data = saved(Image.new("RGB", (8, 4)), "JPEG", exif=tag)
    assert image.decode(data).shape == (3, 8, 4)
    (tmp_path / "a.jpg").write_bytes(data)
    assert image.probe(tmp_path / "a.jpg") == (3, 8, 4)


def test_size_cuts_out_the_middle():
    x = np.zeros((1, 4, 12), np.uint8)
    x[:, :, 4:8] = 200
    assert (image.decode(image.encode(x), size=4) == 200).all()
    assert image.decode(image.encode(x), channels=3, size=2).shape == (3, 2, 2)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_images_and_frames_are_resized_alike(dtype):
    x = np.random.default_rng(0).integers(0, 256, (3, 5, 12, 20)).astype(dtype)
    fitted = image.fit(x, (6, 5))
    assert fitted.shape == (3, 5, 6, 5) and fitted.dtype == x.dtype and image.fit(x, (12, 20)) is x
    for frame in range(5):
        alone = image.decode(image.encode(x[:, frame].astype(np.uint8)), size=(6, 5))
        assert np.abs(fitted[:, frame].astype(int) - alone.astype(int)).max() <= 3
    assert fitted.min() >= x.min() and fitted.max() <= x.max()


INFO = Info((1, 2, 2), 3, dtype="uint8", range=(0.0, 255.0), captions=True)
GOOD = {"__key__": "k", "npy": array.encode(np.zeros((1, 2, 2), np.uint8)), "cls": b"2", "txt": b"words"}


def test_a_good_sample():
    good = sample.decode(GOOD, INFO)
    assert good.x.shape == (1, 2, 2) and good.label == 2 and good.caption == "words"


def test_the_byte_order_mark_of_a_caption_is_no_text():
    assert sample.decode(GOOD | {"txt": b"\xef\xbb\xbfwords"}, INFO).caption == "words"


@pytest.mark.parametrize(
    "change, words",
    [
        ({"npy": None}, "has no array or image member, only cls, txt"),
        ({"npy": b"junk"}, r"\.npy member cannot be decoded"),
        ({"npy": None, "png": b"junk"}, r"\.png member cannot be decoded"),
        ({"npy": array.encode(np.zeros((1, 2, 3), np.uint8))}, r"uint8 \(1, 2, 3\) where the set is uint8 \(1, 2, 2\)"),
        ({"npy": array.encode(np.zeros((1, 2, 2), np.int16))}, "is int16"),
        ({"cls": None}, r"has no \.cls"),
        ({"cls": b"3"}, "class 3 is outside 0 to 2"),
        ({"cls": b"-1"}, "outside"),
        ({"cls": b"two"}, "not a whole number"),
        ({"txt": None}, r"has no \.txt"),
        ({"txt": b"\xff"}, "UTF-8"),
    ],
)
def test_each_fault_of_a_sample_has_its_message(change, words):
    members = {k: v for k, v in (GOOD | change).items() if v is not None}
    with pytest.raises(BadSample, match=words):
        sample.decode(members, INFO)


def test_values_that_are_not_finite_are_bad():
    info = Info((2,), dtype="float32")
    with pytest.raises(BadSample, match="NaN"):
        sample.decode({"__key__": "k", "npy": array.encode(np.array([0, np.nan], np.float32))}, info)


def test_range_maps_its_ends_exactly():
    raw = torch.tensor([0, 255], dtype=torch.uint8)
    assert Info((), range=(0.0, 255.0)).to_x(raw).tolist() == [-1, 1]
    raw = torch.tensor([0.0, 8.0, 16.0])
    assert Info((), range=(0.0, 16.0)).to_x(raw).tolist() == [-1, 0, 1]
    assert raw.tolist() == [0, 8, 16]
