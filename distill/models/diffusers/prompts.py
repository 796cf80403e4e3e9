"""Encoders of a pipeline: prompts and first frames to conditions, pixels to latents. Components are loaded on first use."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import safe_open
from torch import Tensor

from distill.errors import BadInput
from distill.files import read_json
from distill.models.diffusers.folder import (
    dtype_of,
    folder_of,
    load_weights,
    network_part,
    pipeline_variant,
    read_config,
    takes_first_frame,
    without_loading_bars,
)
from distill.models.diffusers.schedulers import stock_class
from distill.models.families.registry import FAMILIES

ENCODERS = ("text_encoder", "tokenizer", "projection_model", "scheduler")
Scale = float | tuple[float, ...]
PROMPT_OPTIONS = ("max_sequence_length", "clean_caption", "complex_human_instruction")


def partial_pipeline(
    folder: Path, parts: tuple[str, ...], config_parts: tuple[str, ...], dtype: str, device: str
) -> Any:
    """The stock pipeline of a folder with only some of its components.

    Args:
        folder: a diffusers folder.
        parts: prefixes of the names of the components to load.
        config_parts: components to build on the meta device, without weights.
        dtype, device: of the loaded components.
    """
    index = read_json(folder / "model_index.json")
    absent = {part: None for part, value in index.items() if isinstance(value, list) and not part.startswith(parts)}
    with torch.device("meta"):
        shapes = {part: stock_class(index[part][1]).from_config(read_config(folder, part)) for part in config_parts}
    import transformers.utils.logging  # noqa: F401  # so that its bars can be switched off

    with without_loading_bars():
        pipeline = diffusers.DiffusionPipeline.from_pretrained(
            folder, **absent | shapes, dtype=dtype_of(dtype), use_safetensors=True, variant=pipeline_variant(folder)
        )
    for part, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module) and part not in config_parts:
            module.to(device)
    return pipeline


@dataclass
class Encode:
    """A pipeline's `encode_prompt` with options, such as max_sequence_length, and on a device where the call names one."""

    stock: Callable[..., Any]
    options: dict[str, Any]
    device: str

    def __call__(self, **arguments: Any) -> Any:
        if "device" in arguments:
            arguments["device"] = self.device
        return self.stock(**self.options | arguments)


class Prompts:
    r"""Encodes prompts as conditions, with the stock pipeline's `encode_prompt` and the defaults of its call.

    `Prompts(path)(["a cat"])` is a dict of tensors with one row per prompt, on the CPU. The denoising network and the
    autoencoder are not loaded.

    Args:
        path: a diffusers folder, a model of the hub, or "tiny:FAMILY".
        revision: of a model of the hub.
        dtype, device: of the text encoders.

    Raises:
        BadInput: if the network is not conditioned on text, or its encoders cannot be loaded.
    """

    def __init__(self, path: str | Path, revision: str | None = None, dtype: str = "float32", device: str = "cpu"):
        folder = folder_of(path, revision, ("*.txt", "*.model"))
        name = network_part(folder)[1]
        if name not in FAMILIES:
            raise BadInput(f"{folder}: its network {name} is not conditioned on text; {', '.join(FAMILIES)} are.")
        index = read_json(folder / "model_index.json")
        for part, value in index.items():
            named = part.startswith(ENCODERS) and isinstance(value, list) and value[0]
            if named and not (folder / part).is_dir():
                raise BadInput(f"{folder} has no {part}, which its model_index.json names: copy that folder too.")
        self.family, self.device = FAMILIES[name], device
        try:
            self.pipeline = partial_pipeline(folder, ENCODERS, self.family.prompt_config_parts, dtype, device)
        except Exception as error:  # diffusers, transformers and tokenizers raise different classes
            raise BadInput(f"{folder}: its text encoders cannot be loaded, copy the folder again ({error}).") from error
        self.zeros = self.family.null_is_zero or bool(index.get("force_zeros_for_empty_prompt"))

    @torch.no_grad()
    def __call__(self, prompts: list[str], **kw: Any) -> dict[str, Tensor]:
        """The conditions of prompts, one row each; `kw` go to `encode_prompt` (`max_sequence_length`)."""
        conditions = self.family.encode_prompt(self._encoder(kw), list(prompts), self.pipeline)
        return {name: value.cpu() for name, value in conditions.items()}

    def _encoder(self, options: dict[str, Any]) -> Encode:
        """`encode_prompt` of the pipeline, with the defaults of the pipeline's call, `options`, and this device."""
        stock = self.pipeline.encode_prompt
        call, accepted = inspect.signature(type(self.pipeline).__call__).parameters, inspect.signature(stock).parameters
        defaults = {k: call[k].default for k in PROMPT_OPTIONS if k in call and k in accepted}

        return Encode(stock, defaults | options, self.device)

    def null(self, **kw: Any) -> dict[str, Tensor]:
        """The null condition, one row: that of the prompt "", or zeros where the pipeline uses zeros for it."""
        null = self([""], **kw)
        for name, value in null.items():
            if self.zeros and name not in self.family.null_keeps:
                null[name] = torch.zeros_like(value)
        return null


def encode(path: str | Path, prompts: list[str], revision: str | None = None, **kw: Any) -> dict[str, Tensor]:
    """`Prompts(path)(prompts)`: the conditions of a list of prompts. Keep a `Prompts` to encode several lists."""
    return Prompts(path, revision)(prompts, **kw)


class FirstFrames:
    r"""Encodes first frames as conditions of an image-to-video network, with the stock pipeline's own functions.

    `FirstFrames(path)([image, ...], (F, H, W))` is a dict of tensors with one row per PIL image, on the CPU, for latents
    of that size. The denoising network and the text encoders are not loaded.

    Args:
        path: a diffusers folder, a model of the hub, or "tiny:FAMILY".
        revision: of a model of the hub.
        dtype, device: of the encoders.

    Raises:
        BadInput: if the pipeline takes no first frame, or its encoders cannot be loaded.
    """

    def __init__(self, path: str | Path, revision: str | None = None, dtype: str = "float32", device: str = "cpu"):
        folder = folder_of(path, revision)
        if not takes_first_frame(folder):
            pipeline = read_json(folder / "model_index.json")["_class_name"]
            known = ", ".join(name for name, family in FAMILIES.items() if family.frame_conditions)
            raise BadInput(
                f"{folder}: {pipeline} takes no first frame; use an image-to-video pipeline of a network among {known}."
            )
        self.family, self.device = FAMILIES[network_part(folder)[1]], device
        parts = (*self.family.frame_parts, "scheduler")
        try:
            self.pipeline = partial_pipeline(folder, parts, self.family.frame_config_parts, dtype, device)
        except Exception as error:  # diffusers and transformers raise different classes
            raise BadInput(
                f"{folder}: its image encoders cannot be loaded, copy the folder again ({error})."
            ) from error

    @torch.no_grad()
    def __call__(
        self, images: list[Any], size: tuple[int, int, int], generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """The conditions of PIL images, one row each, for latents of `size` (F, H, W).

        `generator` is used where the stock pipeline samples from the autoencoder's posterior .
        """
        stock, rows = self.pipeline, []
        frames = (size[0] - 1) * stock.vae_scale_factor_temporal + 1
        height, width = (stock.vae_scale_factor_spatial * side for side in size[1:])
        for image in images:  # the stock pipelines accept one image per call
            pixels = stock.video_processor.preprocess(image, height=height, width=width).to(self.device, torch.float32)
            rows.append(self.family.encode_frame(stock, image, pixels, frames, generator))
        return {name: torch.cat([row[name] for row in rows]).float().cpu() for name in rows[0]}


class Latent:
    r"""The autoencoder of a diffusers folder, with scaled latents x = (a - shift) scale; loaded on first use.

    Pixels are in [-1, 1], (B, 3, H, W) or (B, 3, F, H, W).

    Attributes:
        scale, shift: numbers, or one per channel.
        pixels: side of a latent in pixels, None if the config does not state it.
    """

    def __init__(self, path: str | Path, revision: str | None = None, dtype: str = "float32", device: str = "cpu"):
        self.folder, self.dtype, self.device = folder_of(path, revision), dtype, device
        self.scale, self.shift, self.pixels = scaling(self.folder)

    @cached_property
    def vae(self) -> Any:
        """The autoencoder; raises BadInput if the folder has none."""
        name = (read_json(self.folder / "model_index.json").get("vae") or [None, None])[1]
        if name is None:
            raise BadInput(
                f"{self.folder} has no autoencoder (vae): give the folder of a latent model, or train on pixels."
            )
        model = load_weights(stock_class(name), self.folder / "vae", dtype=dtype_of(self.dtype))
        return model.to(self.device).eval()

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Latents x of pixels: the mean of the posterior, where the autoencoder has one."""
        out = self.vae.encode(pixels.to(self.device, self.vae.dtype))
        a = out.latent_dist.mode() if "latent_dist" in out else out.latent
        return ((a - self._row(self.shift, a)) * self._row(self.scale, a)).to(pixels)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Pixels of latents x."""
        a = x.to(self.device, self.vae.dtype)
        # A decoder with a timestep, which is 0 by the defaults of the stock pipeline.
        time = {"temb": a.new_zeros(len(a))} if self.vae.config.get("timestep_conditioning") else {}
        return self.vae.decode(a / self._row(self.scale, a) + self._row(self.shift, a), **time).sample.to(x)

    @staticmethod
    def _row(value: Scale, a: Tensor) -> Tensor:
        """`value` as (1 or C, 1, ...), to broadcast over latents `a` (B, C, ...)."""
        return torch.as_tensor(value, dtype=a.dtype, device=a.device).reshape(-1, *(1,) * (a.ndim - 2))


def decode(path: str | Path, x: Tensor, revision: str | None = None) -> Tensor:
    """`Latent(path).decode(x)`: latents to pixels in [-1, 1]. Keep a `Latent` to decode several batches."""
    return Latent(path, revision).decode(x)


def scaling(folder: Path) -> tuple[Scale, Scale, int | None]:
    """(scale, shift, side of a latent in pixels) of a folder's autoencoder, x = (a - shift) scale.

    (1, 0, None) without an autoencoder. The side is None where the config does not state it.
    """
    config = read_config(folder, "vae")
    if not config:
        return 1.0, 0.0, None
    factor = config.get("scaling_factor") or 1.0
    mean = config.get("latents_mean") or _buffer(folder / "vae", "latents_mean")
    std = config.get("latents_std") or _buffer(folder / "vae", "latents_std")
    scale = tuple(factor / s for s in std) if std else factor
    shift = tuple(mean) if mean else config.get("shift_factor") or 0.0
    pixels = config.get("scale_factor_spatial")
    widths = config.get("block_out_channels") or config.get("encoder_block_out_channels")
    if not pixels and widths and "spatio_temporal_scaling" not in config:
        pixels = 2 ** (len(widths) - 1)
    return scale, shift, pixels


def _buffer(folder: Path, name: str) -> list[float] | None:
    """Numbers that some autoencoders store with their weights."""
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as stored:
            if name in list(stored.keys()):
                return stored.get_tensor(name).tolist()
    return None
