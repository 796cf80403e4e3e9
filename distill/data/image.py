"""Codec of images: uint8 (C, H, W) with C = 1 (grey) or 3 (colour)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np

SUFFIXES = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_GREY = ("1", "L", "LA")
_MODES = {1: "L", 3: "RGB"}


def encode(x: np.ndarray) -> bytes:
    """uint8 (C, H, W) as PNG, without loss."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(x[0] if len(x) == 1 else np.ascontiguousarray(x.transpose(1, 2, 0))).save(out, "PNG")
    return out.getvalue()


def decode(
    data: bytes | Path, channels: int | None = None, size: int | tuple[int, int] | None = None
) -> np.ndarray:
    """Pixels of an image file.

    Args:
        data: the file's bytes, or its path.
        channels: 1 or 3; None keeps grey images grey and makes all others colour. Transparency is laid on white.
        size: pixels of a side, or (H, W); the image is resized until it covers this and the middle is cut out. None
            keeps the size.

    Returns:
        uint8 (C, H, W), turned as the camera's orientation tag says.

    Raises:
        OSError, ValueError: not an image, truncated, or with more than 8 bits a channel.
    """
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=_FORMATS) as file:
        if file.mode.startswith(("I", "F")):
            raise ValueError(f"more than 8 bits a channel (mode {file.mode}); keep such data as arrays")
        image = ImageOps.exif_transpose(file)
        image = _opaque(image).convert(_MODES[channels or _channels(file)])
        if size is not None:
            height, width = (size, size) if isinstance(size, int) else size
            image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)
        pixels = np.array(image)
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def probe(data: bytes | Path) -> tuple[int, int, int]:
    """(C, H, W) that `decode` would give, from the header only; the same errors."""
    from PIL import Image

    with Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=_FORMATS) as file:
        width, height = file.size
        if file.getexif().get(0x0112, 1) >= 5:  # the orientation tag: turned by a quarter
            width, height = height, width
        return _channels(file), height, width


def _channels(image: Any) -> int:
    return 1 if image.mode in _GREY else 3


def _opaque(image: Any) -> Any:
    from PIL import Image

    if not image.has_transparency_data:
        return image
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image)
