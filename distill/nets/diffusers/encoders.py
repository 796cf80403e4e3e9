"""What a folder's autoencoder and text encoders are: their fingerprints, and the sizes that go through them."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

from distill.errors import BadInput
from distill.nets.diffusers.folder import FAMILIES, folder_of, network_of, told_a_frame
from distill.nets.diffusers.prompts import scaling
from distill.nets.diffusers.schedulers import read_json

PARTS = {"vae": ("vae",), "text": ("text_encoder", "text_encoder_2", "text_encoder_3", "projection_model"),
         "image": ("image_encoder",)}
_PIECE = 4096  # bytes
_NOTES = ("_", "transformers_version", "torch_dtype", "dtype", "architectures")  # of a config, that change no output


def fingerprints(path: str | Path, revision: str | None = None) -> dict[str, str]:
    """Twelve hex digits for the autoencoder (`vae`), the text encoders (`text`) and the image encoder (`image`), as far as the
    folder has them.

    SHA-256 of the configs and of every weight's name, type, shape and first, middle and last 4 KiB: another training
    changes all weights, and 10 GB of a text encoder are told apart without being read.
    """
    folder = folder_of(path, revision)
    found = {}
    for name, parts in PARTS.items():
        digest, any_of_them = hashlib.sha256(), False
        for part in parts:
            if (folder / part / "config.json").is_file():
                for piece in _pieces(folder / part):
                    digest.update(piece)
                any_of_them = True
        if any_of_them:
            found[name] = digest.hexdigest()[:12]
    return found


def _pieces(part: Path) -> Iterator[bytes]:
    config = {k: v for k, v in read_json(part / "config.json").items() if not k.startswith(_NOTES)}
    yield json.dumps([part.name, config], sort_keys=True).encode()
    tensors = {}
    for file in part.glob("*.safetensors"):
        if ".fp16." in file.name or ".non_ema." in file.name:  # copies that nothing here loads
            continue
        with open(file, "rb") as weights:
            start = int.from_bytes(weights.read(8), "little")
            header = json.loads(weights.read(start))
        header.pop("__metadata__", None)
        tensors |= {k: (file, v, 8 + start) for k, v in header.items()}
    for name in sorted(tensors):
        file, facts, start = tensors[name]
        first, end = (start + offset for offset in facts["data_offsets"])
        yield f"{name}{facts['dtype']}{facts['shape']}".encode()
        with open(file, "rb") as weights:
            for at in sorted({first, (first + end) // 2, max(first, end - _PIECE)}):
                weights.seek(at)
                yield weights.read(min(_PIECE, end - at))


@dataclass
class Geometry:
    """How sizes go through a pipeline.

    Attributes:
        shape: of the latents that the network makes by default, (C, H, W), (C, F, H, W) or (C, L).
        pixels: a side of a latent in pixels; 1 for sound.
        multiple: of which pixel sides must be multiples, so that autoencoder and network take them.
        frames: frames of video a latent frame, after the first; 1 for images.
        text: whether the network is told text.
        framed: names of what an image-to-video network is told of the first frame.
    """

    shape: tuple[int, ...]
    pixels: int
    multiple: int
    frames: int
    text: bool
    framed: tuple[str, ...] = ()

    @classmethod
    def of(cls, path: str | Path, revision: str | None = None) -> Geometry:
        folder = folder_of(path, revision)
        part, name = network_of(folder)
        stock, family = SimpleNamespace(**read_json(folder / part / "config.json")), FAMILIES.get(name)
        side = stock.sample_size if family is None else None
        shape = family.default_shape(stock) if family else (stock.in_channels, side, side)
        pixels = scaling(folder)[2] or getattr(family, "pixels", 1)
        patch = getattr(stock, "patch_size", 1)
        patch = patch[-1] if isinstance(patch, (list, tuple)) else patch
        levels = getattr(stock, "block_out_channels", None)  # of a U-Net, which halves the sides between them
        patch = 2 ** (len(levels) - 1) if levels else max(patch, getattr(family, "patch", 1))
        pixels = pixels if len(shape) > 2 else 1
        return cls(tuple(shape), pixels, pixels * patch if len(shape) > 2 else 1, _frames(folder, family), family is not None,
                   family.framed if told_a_frame(folder) else ())

    def size(self, stated: tuple[int, int] | None) -> tuple[int, int] | None:
        """(H, W) in pixels, the network's own if none is stated; None for sound.

        Raises:
            BadInput: not a multiple of what autoencoder and network take.
        """
        if len(self.shape) < 3:
            return None
        size = stated or tuple(n * self.pixels for n in self.shape[-2:])
        if any(n < 1 or n % self.multiple for n in size):
            good = tuple(max(1, round(n / self.multiple)) * self.multiple for n in size)
            raise BadInput(f"size {size[0]}x{size[1]}: both sides must be multiples of {self.multiple} for this pipeline; "
                           f"give {good[0]}x{good[1]}.")
        return size

    def latents(self, pixels: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the latents of pixels (3, H, W) or (3, F, H, W).

        Raises:
            BadInput: a number of frames that does not go into latent frames.
        """
        *frames, height, width = pixels[1:]
        if frames and (frames[0] - 1) % self.frames:
            good = (frames[0] - 1) // self.frames * self.frames + 1
            raise BadInput(f"{frames[0]} frames: this pipeline takes 1 and a multiple of {self.frames} more; "
                           f"give --frames {good}.")
        inner = [(f - 1) // self.frames + 1 for f in frames]
        return self.shape[0], *inner, height // self.pixels, width // self.pixels


def _frames(folder: Path, family: type | None) -> int:
    path = folder / "vae" / "config.json"
    stock = read_json(path) if path.is_file() else {}
    halved = 2 ** sum(map(bool, stock.get("temperal_downsample") or ()))
    stated = stock.get("scale_factor_temporal") or stock.get("temporal_compression_ratio") or getattr(family, "frames", 0)
    return math.ceil(stated or halved or 1)
