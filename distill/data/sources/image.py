"""Images: decoding, encoding, resizing and tiling of uint8 (C, H, W) with C = 1 (grey) or 3 (colour)."""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff")
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
_GREY = ("1", "L", "LA")
_MODES = {1: "L", 3: "RGB"}


def to_uint8(x: Tensor) -> np.ndarray:
    """uint8 of pixels in [-1, 1], of any shape: 127.5 (x + 1), rounded and clipped."""
    return ((x.detach().cpu().float() + 1) * 127.5).round().clamp(0, 255).byte().numpy()


def tile(
    images: np.ndarray,
    columns: int | None = None,
    scale: int | None = None,
    gap: int | None = None,
    below: int = 0,
    background: str | None = "#ffffff",
) -> tuple[Any, list[tuple[float, int]]]:
    """Images in a grid, row by row.

    Args:
        images: uint8 (B, C, H, W).
        columns: images in a row; None makes the grid nearly square.
        scale: the whole factor by which images grow, pixels staying square; None makes them about 48 pixels wide.
        gap: pixels between images; None takes two thirds of `scale`, at least 2.
        below: pixels left free below each image.
        background: colour of what no image covers; None makes it transparent.

    Returns:
        The grid as an RGB (RGBA if transparent) image of PIL, and the middle (x, y) of each image's lower edge in it.
    """
    from PIL import Image

    count, _, height, width = images.shape
    columns = min(columns or math.ceil(math.sqrt(count)), count)
    scale = scale or max(1, round(48 / max(height, width)))
    gap = max(2, 2 * scale // 3) if gap is None else gap
    step_x, step_y = width * scale + gap, height * scale + gap + below
    mode, fill = ("RGB", background) if background else ("RGBA", (0, 0, 0, 0))
    sheet = Image.new(mode, (columns * step_x - gap, math.ceil(count / columns) * step_y - gap), fill)
    edges = []
    for i, x in enumerate(images):
        left, top = i % columns * step_x, i // columns * step_y
        colour = np.broadcast_to(x, (3, height, width)).transpose(1, 2, 0)
        sheet.paste(Image.fromarray(colour.repeat(scale, 0).repeat(scale, 1)), (left, top))
        edges.append((left + width * scale / 2, top + height * scale))
    return sheet, edges


def encode(x: np.ndarray) -> bytes:
    """uint8 (C, H, W) as the bytes of a PNG file (lossless)."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(x[0] if len(x) == 1 else np.ascontiguousarray(x.transpose(1, 2, 0))).save(out, "PNG")
    return out.getvalue()


def decode(data: bytes | Path, channels: int | None = None, size: int | tuple[int, int] | None = None) -> np.ndarray:
    """Pixels of an image file.

    Args:
        data: the file's bytes, or its path.
        channels: 1 or 3; None gives grey images 1 and all others 3. Transparent pixels are blended with white.
        size: pixels of a side, or (H, W), see `fit`; None keeps the size.

    Returns:
        uint8 (C, H, W), rotated by the orientation tag of the camera.

    Raises:
        OSError, ValueError: not an image, truncated, with more than 8 bits a channel, or with more than
            `PIL.Image.MAX_IMAGE_PIXELS` (89 million), which a file of kilobytes can have.
    """
    from PIL import ImageOps

    with _open(data) as file:
        if file.mode.startswith(("I", "F")):
            raise ValueError(f"more than 8 bits a channel (mode {file.mode}); keep such data as arrays")
        image = ImageOps.exif_transpose(file)
        pixels = np.array(_opaque(image).convert(_MODES[channels or _channels(file)]))
    pixels = pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))
    return pixels if size is None else fit(pixels, size)


def _open(data: bytes | Path) -> Any:
    """The image, of which only the header is read."""
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(data) if isinstance(data, bytes) else data, formats=_FORMATS)
        except (Image.DecompressionBombWarning, Image.DecompressionBombError):
            most = f"{(Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} million"
            raise ValueError(f"more than {most} pixels, which take too much memory; shrink the image") from None


def fit(x: np.ndarray, size: int | tuple[int, int]) -> np.ndarray:
    """Resize images until they cover `size` and cut out the middle, with Lanczos' filter.

    Args:
        x: uint8 or floats (..., H, W).
        size: pixels of a side, or (H, W).

    Returns:
        (..., *size), of the same dtype, within the range of `x`.
    """
    from PIL import Image, ImageOps

    height, width = (size, size) if isinstance(size, int) else size
    if x.shape[-2:] == (height, width):
        return x
    planes = x.reshape(-1, *x.shape[-2:])
    if x.dtype != np.uint8:
        planes = planes.astype(np.float32)
    images = (Image.fromarray(np.ascontiguousarray(plane)) for plane in planes)
    fitted = np.stack([np.array(ImageOps.fit(i, (width, height), Image.Resampling.LANCZOS)) for i in images])
    if x.dtype != np.uint8:
        fitted = fitted.clip(planes.min(), planes.max())  # Lanczos' filter overshoots at edges
    return fitted.astype(x.dtype).reshape(*x.shape[:-2], height, width)


def probe(data: bytes | Path) -> tuple[int, int, int]:
    """(C, H, W) that `decode` would return, from the header only; raises the same errors."""
    with _open(data) as file:
        width, height = file.size
        if file.getexif().get(0x0112, 1) >= 5:  # orientation tag: rotated by 90 degrees
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
