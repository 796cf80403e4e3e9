"""A diffusers folder, here or on the hub, becomes a Denoiser."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import torch

from distill.denoise import Denoiser
from distill.errors import BadInput
from distill.nets.diffusers.folder import BACKBONES, FAMILIES, folder_of, network_of, weights
from distill.nets.diffusers.prompts import encode, scaling
from distill.nets.diffusers.schedulers import prediction_of, read_json, schedule_of, scheduler_of, stock_class
from distill.noise import Table


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
    net.folder = folder
    return Denoiser(net, schedule, prediction_of(folder)).eval()


def _told(folder: Path, path: str | Path, revision: str | None, part: str, name: str, *,
          null: str | dict | None = "", dtype: str = "float32", size: tuple[int, ...] | None = None, **kw) -> Denoiser:
    """A Denoiser of a network that is told text."""
    index, family = read_json(folder / "model_index.json"), FAMILIES[name]
    if (index.get("transformer_2") or [None])[0] or index.get("expand_timesteps"):
        raise BadInput(f"{folder}: two networks, or a timestep for every token (Wan 2.2): only one network with one "
                       "timestep a sample is read.")
    model = weights(stock_class(name), folder / part, dtype=getattr(torch, dtype))
    size = tuple(size) if size else family.default_shape(model.config)[1:]
    schedule = schedule_of(folder, **dynamic_shift(folder, family.tokens(size)))
    steps = int(scheduler_of(folder).config.get("num_train_timesteps", 1000))
    net = family.wrap(model, schedule=schedule, timesteps=steps, size=size, **kw)
    net.source = str(path), revision
    net.latent_scale, net.latent_shift, pixels = scaling(folder)
    net.pixels, net.folder = pixels or net.pixels, folder
    zeros = family.null_zero or index.get("force_zeros_for_empty_prompt")
    if next(model.parameters()).is_meta or null == "" and zeros:
        net.remember(None)
    elif null is not None:
        net.remember(_null(path, revision, null) if isinstance(null, str) else null)
    return Denoiser(net, schedule, prediction_of(folder)).eval()


@lru_cache(maxsize=16)
def _null(path: str | Path, revision: str | None, prompt: str) -> dict:
    """The null condition; student, teacher and critic of one run share it, and its text encoders are let go."""
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
