"""Text and pixels at the border: the pipeline's own encoders and autoencoder, loaded only when they are asked."""

from __future__ import annotations

import inspect
from functools import cached_property
from pathlib import Path

import diffusers
import torch
from safetensors import safe_open
from torch import Tensor

from distill.errors import BadInput
from distill.nets.diffusers.folder import FAMILIES, folder_of, network_of, told_a_frame, weights
from distill.nets.diffusers.schedulers import read_json, stock_class

ENCODERS = ("text_encoder", "tokenizer", "projection_model", "scheduler")


def pipeline_with(folder: Path, parts: tuple[str, ...], bones: tuple[str, ...], dtype: str, device: str):
    """The stock pipeline of a folder with those parts alone whose names start so; `bones` are there without weights."""
    index = read_json(folder / "model_index.json")
    absent = {part: None for part, value in index.items() if isinstance(value, list) and not part.startswith(parts)}
    with torch.device("meta"):
        shapes = {part: stock_class(index[part][1]).from_config(read_json(folder / part / "config.json")) for part in bones}
    pipeline = diffusers.DiffusionPipeline.from_pretrained(
        folder, **absent | shapes, dtype=getattr(torch, dtype), use_safetensors=True)
    for part, module in pipeline.components.items():
        if isinstance(module, torch.nn.Module) and part not in bones:
            module.to(device)
    return pipeline


class Prompts:
    r"""Prompts of a diffusers folder to conditions, by the stock pipeline's `encode_prompt` and its call's defaults.

    `Prompts(path)(["a cat"])` is a dict of tensors with one row a prompt, on the CPU. Denoiser and autoencoder are not
    loaded. `kw` of a call go to `encode_prompt` (`max_sequence_length`).

    Raises:
        BadInput: for a folder whose network has no family here, or whose encoders cannot be loaded.
    """

    def __init__(self, path: str | Path, revision: str | None = None, dtype: str = "float32",
                 device: str = "cpu"):
        folder = folder_of(path, revision, ("*.txt", "*.model"))
        name = network_of(folder)[1]
        if name not in FAMILIES:
            raise BadInput(f"{folder}: its network {name} is not told text: {', '.join(FAMILIES)} are.")
        index = read_json(folder / "model_index.json")
        lack = [p for p, value in index.items() if p.startswith(ENCODERS) and isinstance(value, list) and value[0]
                and not (folder / p).is_dir()]
        if lack:
            raise BadInput(f"{folder} has no {lack[0]}, which its model_index.json names: copy that folder too.")
        try:
            self.pipeline = pipeline_with(folder, ENCODERS, FAMILIES[name].bones, dtype, device)
        except Exception as error:  # diffusers, transformers and tokenizers each raise their own
            raise BadInput(f"{folder}: its text encoders cannot be loaded, copy the folder again ({error}).") from error
        self.family, self.device = FAMILIES[name], device
        self.zeros = self.family.null_zero or bool(index.get("force_zeros_for_empty_prompt"))

    @torch.no_grad()
    def __call__(self, prompts: list[str], **kw) -> dict[str, Tensor]:
        stock = self.pipeline.encode_prompt
        call = inspect.signature(type(self.pipeline).__call__).parameters
        ours = {k: call[k].default for k in ("max_sequence_length", "clean_caption", "complex_human_instruction")
                if k in call and k in inspect.signature(stock).parameters}

        def encode(**asked):
            asked = asked | {"device": self.device} if "device" in asked else asked
            return stock(**ours | kw | asked)

        return {k: v.cpu() for k, v in self.family.prompt(encode, list(prompts), self.pipeline).items()}

    def null(self, **kw) -> dict[str, Tensor]:
        """The null condition, one row: that of the prompt "", or zeros where the pipeline takes zeros for it."""
        zeros = lambda k: self.zeros and k not in self.family.kept
        return {k: torch.zeros_like(v) if zeros(k) else v for k, v in self([""], **kw).items()}


def encode(path: str | Path, prompts: list[str], revision: str | None = None, **kw) -> dict[str, Tensor]:
    """`Prompts(path)(prompts)`: the conditions of a list of prompts. Keep a `Prompts` to ask more than once."""
    return Prompts(path, revision)(prompts, **kw)


class FirstFrames:
    r"""First frames to the conditions of an image-to-video network, by the stock pipeline's own preprocessing and encoders.

    `FirstFrames(path)([image, ...], (F, H, W))` is a dict of tensors with one row a PIL image, on the CPU, for latents of
    that size. Denoiser and text encoders are not loaded. Where the stock pipeline draws from the autoencoder's posterior
    (CogVideoX), it is drawn from `generator`.

    Raises:
        BadInput: for a folder whose network is not told a first frame, or whose encoders cannot be loaded.
    """

    def __init__(self, path: str | Path, revision: str | None = None, dtype: str = "float32", device: str = "cpu"):
        folder = folder_of(path, revision)
        self.family, self.device = FAMILIES.get(network_of(folder)[1]), device
        if not told_a_frame(folder):
            kind = read_json(folder / "model_index.json")["_class_name"]
            raise BadInput(f"{folder}: {kind} is told no first frame: take an image-to-video pipeline of Wan 2.1 "
                           "or CogVideoX.")
        try:
            self.pipeline = pipeline_with(folder, self.family.seen + ("scheduler",), self.family.bones_seen, dtype, device)
        except Exception as error:  # diffusers and transformers each raise their own
            raise BadInput(f"{folder}: its image encoders cannot be loaded, copy the folder again ({error}).") from error

    @torch.no_grad()
    def __call__(self, images: list, size: tuple[int, int, int],
                 generator: torch.Generator | None = None) -> dict[str, Tensor]:
        stock, rows = self.pipeline, []
        frames = (size[0] - 1) * stock.vae_scale_factor_temporal + 1
        height, width = (stock.vae_scale_factor_spatial * side for side in size[1:])
        for image in images:  # the stock pipelines take one a call
            pixels = stock.video_processor.preprocess(image, height=height, width=width).to(self.device, torch.float32)
            rows.append(self.family.frame(stock, image, pixels, frames, generator))
        return {key: torch.cat([row[key] for row in rows]).float().cpu() for key in rows[0]}


class Latent:
    r"""The autoencoder of a diffusers folder, x = (a - shift) scale with a its own latents; loaded at the first use.

    `scale` and `shift` are numbers, or one a channel. Pixels are in [-1, 1], (B, 3, H, W) or (B, 3, F, H, W).
    """

    def __init__(self, path: str | Path, revision: str | None = None, dtype: str = "float32", device: str = "cpu"):
        self.folder, self.dtype, self.device = folder_of(path, revision), dtype, device
        self.scale, self.shift, self.pixels = scaling(self.folder)

    @cached_property
    def vae(self):
        name = (read_json(self.folder / "model_index.json").get("vae") or [None, None])[1]
        if name is None:
            raise BadInput(f"{self.folder} has no autoencoder (vae), so nothing is encoded or decoded by it: give the "
                           "folder of a latent model, or train on its pixels.")
        model = weights(stock_class(name), self.folder / "vae", dtype=getattr(torch, self.dtype))
        return model.to(self.device).eval()

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Latents x of pixels, the mean of the autoencoder's posterior."""
        out = self.vae.encode(pixels.to(self.device, self.vae.dtype))
        a = out.latent_dist.mode() if hasattr(out, "latent_dist") else out.latent
        return ((a - self._row(self.shift, a)) * self._row(self.scale, a)).to(pixels)

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        """Pixels of latents x."""
        a = x.to(self.device, self.vae.dtype)
        return self.vae.decode(a / self._row(self.scale, a) + self._row(self.shift, a)).sample.to(x)

    @staticmethod
    def _row(value, a: Tensor) -> Tensor:
        return torch.as_tensor(value, dtype=a.dtype, device=a.device).reshape(-1, *(1,) * (a.ndim - 2))


def decode(path: str | Path, x: Tensor, revision: str | None = None) -> Tensor:
    """`Latent(path).decode(x)`: latents to pixels in [-1, 1]. Keep a `Latent` to decode more than once."""
    return Latent(path, revision).decode(x)


def scaling(folder: Path) -> tuple:
    """(scale, shift, pixels a side of a latent) of a folder's autoencoder: x = (a - shift) scale."""
    if not (folder / "vae" / "config.json").is_file():
        return 1.0, 0.0, None
    stock = read_json(folder / "vae" / "config.json")
    factor = stock.get("scaling_factor") or 1.0
    mean, std = (stock.get(f"latents_{name}") or _buffer(folder / "vae", f"latents_{name}") for name in ("mean", "std"))
    scale = tuple(factor / s for s in std) if std else factor
    shift = tuple(mean) if mean else stock.get("shift_factor") or 0.0
    widths = stock.get("block_out_channels") or stock.get("encoder_block_out_channels")
    sides = 2 ** (len(widths) - 1) if widths and "spatio_temporal_scaling" not in stock else None  # LTX: the family's
    return scale, shift, stock.get("scale_factor_spatial") or sides


def _buffer(folder: Path, name: str) -> list[float] | None:
    """Numbers that an autoencoder keeps with its weights, as LTX does."""
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            if name in weights.keys():  # noqa: SIM118, it is no mapping
                return weights.get_tensor(name).tolist()
    return None
