"""A diffusers folder, here or on the hub, becomes a Denoiser: configs and safetensors are read, no code."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import torch

from distill.denoise import Denoiser
from distill.errors import BadInput
from distill.nets.diffusers.audio import StableAudio
from distill.nets.diffusers.backbones import DiT, UNet2D
from distill.nets.diffusers.conditioned import Conditioned
from distill.nets.diffusers.schedulers import prediction_of, read_json, schedule_of, scheduler_of, stock_class
from distill.nets.diffusers.text import SD3, Flux, PixArt, Sana, TextUNet
from distill.nets.diffusers.video import LTX, CogVideoX, Wan
from distill.noise import Table

# Stock class of the denoising network -> its family: told a class number, or told tensors such as `text`.
CLASSES = {"UNet2DModel": UNet2D, "DiTTransformer2DModel": DiT}
FAMILIES: dict[str, type[Conditioned]] = {
    "UNet2DConditionModel": TextUNet, "PixArtTransformer2DModel": PixArt, "SD3Transformer2DModel": SD3,
    "FluxTransformer2DModel": Flux, "SanaTransformer2DModel": Sana, "WanTransformer3DModel": Wan,
    "CogVideoXTransformer3DModel": CogVideoX, "StableAudioDiTModel": StableAudio,
    "LTXVideoTransformer3DModel": LTX,
}
BACKBONES = {name: kind.wrap for name, kind in (CLASSES | FAMILIES).items()}  # `wrap(model, timesteps=N, **kw)`


def load(path: str | Path, revision: str | None = None, **kw) -> Denoiser:
    """A Denoiser from a diffusers folder, or from a model of the hub ("owner/name"); in eval mode.

    The network is read from safetensors; schedule and prediction are the scheduler's. `kw` goes to the wrapper
    (guided, flow_map, math_attention; null_class of `UNet2D.wrap`).

    A network that is told text takes also
        size: of its latents, (H, W) or (F, H, W), if not the stock default; a shift that depends on it follows.
        null: the prompt that stands for no prompt, encoded here by the folder's own text encoders (""); or its
            tensors, as `encode` gives them; or None to load without. Zeros where the pipeline takes zeros for "".
        dtype: of the weights, "float32" or "bfloat16".
        checkpointing: keep fewer activations and compute them again in the backward pass.

    Raises:
        BadInput: for a path that is no diffusers folder, missing or broken weights, a class without a wrapper, or a
            class-conditional network of which nobody says whether its last class is "no class".
    """
    folder = folder_of(path, revision)
    part, name = network_of(folder)
    if name in FAMILIES:
        return _told(folder, path, revision, part, name, **kw)
    schedule = schedule_of(folder)
    if not isinstance(schedule, Table):
        raise BadInput(f"{folder}: {name} counts discrete timesteps, but {type(scheduler_of(folder)).__name__} has none.")
    model = weights(stock_class(name), folder / part)
    if model.config.get("num_class_embeds") and "null_class" not in kw:
        record = read_json(folder / "distill.json") if (folder / "distill.json").is_file() else {}
        if "null_class" not in record:
            raise BadInput(f"{folder}: is the last class of its network 'no class'? Pass null_class=True or False.")
        kw["null_class"] = record["null_class"]
    net = BACKBONES[name](model, timesteps=len(schedule.alphas_cumprod), **kw)
    return Denoiser(net, schedule, prediction_of(folder)).eval()


def _told(folder: Path, path: str | Path, revision: str | None, part: str, name: str, *,
          null: str | dict | None = "", dtype: str = "float32", size: tuple[int, ...] | None = None, **kw) -> Denoiser:
    """A Denoiser of a network that is told text."""
    from distill.nets.diffusers.prompts import scaling

    index, family = read_json(folder / "model_index.json"), FAMILIES[name]
    if (index.get("transformer_2") or [None])[0] or index.get("expand_timesteps"):
        raise BadInput(f"{folder}: two networks, or a timestep for every token (Wan 2.2): only one network with one "
                       "timestep a sample is read.")
    model = weights(stock_class(name), folder / part, dtype=getattr(torch, dtype))
    size = tuple(size) if size else family.default_shape(model.config)[1:]
    schedule = schedule_of(folder, **dynamic_shift(folder, family.tokens(size)))
    steps = int(scheduler_of(folder).config.get("num_train_timesteps", 1000))
    net = family.wrap(model, schedule=schedule, timesteps=steps, size=size, **kw)
    net.latent_scale, net.latent_shift, pixels = scaling(folder)
    net.pixels = pixels or net.pixels
    if isinstance(null, str) and null == "" and (family.null_zero or index.get("force_zeros_for_empty_prompt")):
        net.remember(None)
    elif null is not None:
        net.remember(_null(path, revision, null) if isinstance(null, str) else null)
    return Denoiser(net, schedule, prediction_of(folder)).eval()


@lru_cache(maxsize=16)
def _null(path: str | Path, revision: str | None, prompt: str) -> dict:
    """The null condition; student, teacher and critic of one run share it, and its text encoders are let go."""
    from distill.nets.diffusers.prompts import encode

    return encode(path, [prompt], revision)


def dynamic_shift(folder: Path, count: int) -> dict:
    r"""Settings that fix a shift that depends on the image size: shift = exp(mu), mu linear in the number of tokens.

    A `shift_terminal` (LTX) stretches the served grid, not the network's clock, and is left to the grid.

    Raises:
        BadInput: for another kind of dynamic shift.
    """
    stock = scheduler_of(folder).config
    if not stock.get("use_dynamic_shifting"):
        return {}
    if stock.get("time_shift_type", "exponential") != "exponential":
        raise BadInput(f"{folder}: its scheduler shifts time by time_shift_type={stock.time_shift_type!r}: only the "
                       "exponential shift is read.")
    slope = (stock.max_shift - stock.base_shift) / (stock.max_image_seq_len - stock.base_image_seq_len)
    mu = stock.base_shift + slope * (count - stock.base_image_seq_len)
    return {"use_dynamic_shifting": False, "shift": math.exp(mu)}


def network_of(folder: Path) -> tuple[str, str]:
    """(part, class name) of the denoising network of a folder; BadInput for one that nothing here can load."""
    index = read_json(folder / "model_index.json")
    part = next((p for p in ("unet", "transformer") if p in index), None)
    name = index[part][1] if part else None
    if name not in BACKBONES:
        raise BadInput(f"{folder}: its network is {name}, and only {', '.join(BACKBONES)} can be loaded.")
    return part, name


def weights(kind: type, folder: Path, **kw):
    """A stock model from a folder with config.json and safetensors, every weight of it."""
    if not list(folder.glob("*.safetensors")):
        mend = "save the pickled weights again as safetensors" if list(folder.glob("*.bin")) else "copy them there"
        raise BadInput(f"{folder}: the network's weights (*.safetensors) are missing: {mend}.")
    try:
        model, report = kind.from_pretrained(folder, use_safetensors=True, **kw, output_loading_info=True)
    except Exception as error:  # diffusers, safetensors and torch each raise their own
        raise BadInput(f"{folder}: the weights cannot be read, copy the folder again ({error}).") from error
    if report["missing_keys"] or report["mismatched_keys"]:
        raise BadInput(f"{folder}: weights missing or misshapen, such as "
                       f"{(report['missing_keys'] or report['mismatched_keys'])[0]}: copy the folder again.")
    return model


def folder_of(path: str | Path, revision: str | None = None, more: tuple[str, ...] = ()) -> Path:
    """A local diffusers folder, or the local snapshot of a model of the hub: configs, parts' safetensors and `more`."""
    folder = Path(path)
    if (folder / "model_index.json").is_file():
        return folder
    here = folder.is_absolute() or folder.parent.is_dir()  # "checkpoints/x" beside a folder checkpoints is no hub id
    if folder.exists() or here or len(folder.parts) != 2 or folder.parts[0].startswith("."):
        raise BadInput(f"{folder} is no diffusers folder: it has no model_index.json.")
    from huggingface_hub import snapshot_download

    try:
        # Single-file copies of the whole pipeline lie at the top, and other precisions beside the weights.
        return Path(snapshot_download(str(path), revision=revision, ignore_patterns=["*.fp16.*", "*.non_ema.*"],
                                      allow_patterns=["*.json", "*/*.safetensors", *more]))
    except Exception as error:  # offline, absent, gated: each its own class
        raise BadInput(f"'{path}' is neither a folder here nor a model that the hub gives us ({error}).") from error
