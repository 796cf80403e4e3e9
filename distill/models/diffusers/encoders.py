"""Fingerprints of a pipeline's encoders, and the sizes of samples and latents that a pipeline accepts."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from distill.errors import BadInput
from distill.files import read_json
from distill.models.diffusers.folder import (
    folder_of,
    network_part,
    read_config,
    takes_first_frame,
    weight_variant,
)
from distill.models.diffusers.prompts import scaling
from distill.models.families.registry import FAMILIES, LABEL_FAMILIES

PARTS = {
    "vae": ("vae",),
    "text": ("text_encoder", "text_encoder_2", "text_encoder_3", "projection_model"),
    "image": ("image_encoder",),
}
PIECE_BYTES = 4096
IGNORED_KEYS = ("_", "transformers_version", "torch_dtype", "dtype", "architectures")  # they do not change outputs


def fingerprints(path: str | Path, revision: str | None = None) -> dict[str, str]:
    """Fingerprints of the autoencoder ("vae"), the text encoders ("text") and the image encoder ("image") of a pipeline.

    A fingerprint is the first 12 hex digits of a SHA-256 over the configs and over the name, type, shape and first,
    middle and last 4 KiB of every weight. Different training changes all weights, so large encoders need not be read
    completely.

    Args:
        path: a diffusers folder, a model of the hub, or "tiny:FAMILY".
        revision: of a model of the hub.

    Returns:
        The fingerprints of the parts that the pipeline has.
    """
    folder = folder_of(path, revision)
    prints = {}
    for name, parts in PARTS.items():
        present = [part for part in parts if (folder / part / "config.json").is_file()]
        if present:
            digest = hashlib.sha256()
            for part in present:
                for piece in _pieces(folder / part):
                    digest.update(piece)
            prints[name] = digest.hexdigest()[:12]
    return prints


def _pieces(part: Path) -> Iterator[bytes]:
    """The bytes that a fingerprint covers: the config, and per weight its name, type, shape and three pieces."""
    config = {k: v for k, v in read_json(part / "config.json").items() if not k.startswith(IGNORED_KEYS)}
    yield json.dumps([part.name, config], sort_keys=True).encode()
    tensors = {}
    variant = weight_variant(part)
    for file in part.glob("*.safetensors"):
        if (".fp16" in file.name and not variant) or ".non_ema" in file.name:  # copies that are not loaded
            continue
        with open(file, "rb") as stream:
            start = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(start))
        header.pop("__metadata__", None)
        tensors |= {name: (file, entry, 8 + start) for name, entry in header.items()}
    for name in sorted(tensors):
        file, entry, start = tensors[name]
        first, end = (start + offset for offset in entry["data_offsets"])
        yield f"{name}{entry['dtype']}{entry['shape']}".encode()
        with open(file, "rb") as stream:
            for position in sorted({first, (first + end) // 2, max(first, end - PIECE_BYTES)}):
                stream.seek(position)
                yield stream.read(min(PIECE_BYTES, end - position))


@dataclass
class Geometry:
    """Sizes of samples and latents of a pipeline.

    Attributes:
        shape: default shape of the latents, (C, H, W), (C, F, H, W) or (C, L).
        pixels: side of a latent in pixels; 1 for audio.
        multiple: the sides of an image in pixels must be multiples of this number.
        frames: video frames per latent frame, after the first; 1 for images.
        text: whether the network is conditioned on text.
        frame_conditions: names of the conditions that encode the first frame; empty unless image to video.
    """

    shape: tuple[int, ...]
    pixels: int
    multiple: int
    frames: int
    text: bool
    frame_conditions: tuple[str, ...] = ()

    @classmethod
    def of(cls, path: str | Path, revision: str | None = None) -> Geometry:
        """The geometry of a diffusers folder, a model of the hub, or "tiny:FAMILY"."""
        folder = folder_of(path, revision)
        part, name = network_part(folder)
        config = read_json(folder / part / "config.json")
        family = FAMILIES.get(name) or LABEL_FAMILIES[name]
        shape = family.default_shape(SimpleNamespace(**config))
        spatial = len(shape) > 2
        pixels = (scaling(folder)[2] or family.pixels) if spatial else 1
        return cls(
            tuple(shape),
            pixels,
            pixels * _patch(config, family.patch) if spatial else 1,
            _frames(read_config(folder, "vae"), family.frames),
            name in FAMILIES,
            family.frame_conditions if takes_first_frame(folder) else (),
        )

    def size(self, stated: tuple[int, int] | None) -> tuple[int, int] | None:
        """The size (H, W) in pixels: `stated`, or the network's default; None for audio.

        Raises:
            BadInput: if a side is not a positive multiple of `multiple`.
        """
        if len(self.shape) < 3:
            return None
        size = stated or (self.shape[-2] * self.pixels, self.shape[-1] * self.pixels)
        if any(n < 1 or n % self.multiple for n in size):
            nearest = [max(1, round(n / self.multiple)) * self.multiple for n in size]
            raise BadInput(
                f"size {size[0]}x{size[1]}: both sides must be multiples of {self.multiple} for this pipeline; "
                f"give {nearest[0]}x{nearest[1]}."
            )
        return size

    def latents(self, pixels: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of the latents of pixels (3, H, W) or (3, F, H, W).

        Raises:
            BadInput: if the number of frames is not 1 plus a multiple of `frames`.
        """
        *frames, height, width = pixels[1:]
        if frames and (frames[0] - 1) % self.frames:
            fitting = (frames[0] - 1) // self.frames * self.frames + 1
            raise BadInput(
                f"{frames[0]} frames: this pipeline needs 1 frame plus a multiple of {self.frames}; "
                f"give --frames {fitting}."
            )
        latent_frames = [(f - 1) // self.frames + 1 for f in frames]
        return self.shape[0], *latent_frames, height // self.pixels, width // self.pixels


def _patch(config: dict[str, Any], family_patch: int) -> int:
    """The number of latents that the sides of latents must be multiples of."""
    if levels := config.get("block_out_channels"):  # a U-Net halves the sides between its levels
        return 2 ** (len(levels) - 1)
    patch = config.get("patch_size", 1)
    return max(patch[-1] if isinstance(patch, (list, tuple)) else patch, family_patch)


def _frames(vae: dict[str, Any], family_frames: int) -> int:
    """Video frames per latent frame, from the config of the autoencoder; 1 for images."""
    stated = vae.get("scale_factor_temporal") or vae.get("temporal_compression_ratio")
    halvings = sum(map(bool, vae.get("temperal_downsample") or ()))
    return math.ceil(stated or (2**halvings if halvings else max(family_frames, 1)))
