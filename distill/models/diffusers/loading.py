"""Loading a diffusers folder, local or on the hub, as a Denoiser."""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from distill.denoise import Denoiser
from distill.errors import BadInput
from distill.files import read_json
from distill.models.diffusers.folder import dtype_of, folder_of, load_weights, network_part
from distill.models.diffusers.network import TensorConditioned
from distill.models.diffusers.prompts import encode, scaling
from distill.models.diffusers.schedulers import prediction_of, schedule_of, scheduler_of, stock_class
from distill.models.families.registry import FAMILIES, LABEL_FAMILIES
from distill.noise import Table


def load(path: str | Path, revision: str | None = None, scheduler: dict[str, Any] | None = None, **kw: Any) -> Denoiser:
    """A Denoiser, in eval mode, from a diffusers folder. Schedule and prediction type are those of its scheduler.

    Args:
        path: a diffusers folder, a model of the hub ("owner/name"), or "tiny:FAMILY". Weights are read from safetensors.
        revision: of a model of the hub.
        scheduler: settings that replace those of the folder's scheduler, such as {"flow_shift": 5} or {"shift": 5}.
        kw: options of the family's `wrap`: guided, flow_map, math_attention; `null_class` where the folder does not state it.
            Networks conditioned on text also accept:
            - size: of the latents, (H, W) or (F, H, W), instead of the default; a shift that depends on it follows.
            - null: the prompt of the null condition (""), which is encoded by the folder's text encoders; or its tensors
              as returned by `encode`; or None to load without. It is zeros where the pipeline uses zeros for "".
            - dtype: of the weights, "float32" or "bfloat16".
            - checkpointing: recompute activations in the backward pass to save memory.

    Returns:
        The Denoiser. `denoiser.net.folder` is the local folder.

    Raises:
        BadInput: if the path is not a diffusers folder, weights are missing or broken, no family supports the network, its
            scheduler has no setting of this name, or a class-conditional network does not state whether its last class is
            "no class".

    Examples:
        >>> import torch
        >>> from distill.models.diffusers import encode, load
        >>> denoiser = load("tiny:sd15")  # a tiny random Stable Diffusion 1.5, for tests
        >>> denoiser.prediction, denoiser.net.shape, denoiser.net.conditions
        ('eps', (4, 8, 8), ('text',))
        >>> cond = encode("tiny:sd15", ["a cat"])
        >>> z = torch.randn(1, *denoiser.net.shape)
        >>> denoiser(z, torch.ones(1), **cond).shape
        torch.Size([1, 4, 8, 8])
    """
    folder = folder_of(path, revision)
    part, name = network_part(folder)
    settings = dict(scheduler or {})
    if name in FAMILIES:
        return _load_tensor_conditioned(folder, path, revision, part, name, settings, **kw)
    stock = scheduler_of(folder, **settings)
    schedule = schedule_of(stock)
    if not isinstance(schedule, Table):
        raise BadInput(f"{folder}: {name} needs discrete timesteps, but {type(stock).__name__} has none.")
    model = load_weights(stock_class(name), folder / part)
    if model.config.get("num_class_embeds") and "null_class" not in kw:
        record = read_json(folder / "distill.json") if (folder / "distill.json").is_file() else {}
        if "null_class" not in record:
            raise BadInput(f"{folder}: is the last class of its network 'no class'? Pass null_class=True or False.")
        kw["null_class"] = record["null_class"]
    net = LABEL_FAMILIES[name].adapter.wrap(model, timesteps=len(schedule.alphas_cumprod), **kw)
    net.folder, net.scheduler_settings = folder, settings
    return Denoiser(net, schedule, prediction_of(stock)).eval()


def _load_tensor_conditioned(
    folder: Path,
    path: str | Path,
    revision: str | None,
    part: str,
    name: str,
    settings: dict[str, Any],
    *,
    null: str | dict[str, Tensor] | None = "",
    dtype: str = "float32",
    size: tuple[int, ...] | None = None,
    **kw: Any,
) -> Denoiser:
    """`load` for the networks of FAMILIES."""
    index, family = read_json(folder / "model_index.json"), FAMILIES[name]
    model = load_weights(stock_class(name), folder / part, dtype=dtype_of(dtype))
    size = tuple(size) if size else family.default_shape(model.config)[1:]
    stock = scheduler_of(folder, **settings)
    schedule = schedule_of(stock, **dynamic_shift(folder, stock, family.token_count(size)))
    timesteps = int(stock.config.get("num_train_timesteps", 1000))
    adapter = family.adapter or TensorConditioned
    net = adapter.wrap(family, model, schedule=schedule, timesteps=timesteps, size=size, **kw)
    net.source, net.scheduler_settings = (str(path), revision), settings
    net.latent_scale, net.latent_shift, pixels = scaling(folder)
    net.pixels, net.folder = pixels or net.pixels, folder
    zeros = family.null_is_zero or index.get("force_zeros_for_empty_prompt")
    if next(model.parameters()).is_meta or (null == "" and zeros):
        net.set_null(None)
    elif isinstance(null, str):
        net.set_null(_encode_null(path, revision, null))
    elif null is not None:
        net.set_null(null)
    sigma_data = float(stock.config.get("sigma_data", 1.0))
    return Denoiser(net, schedule, prediction_of(stock), sigma_data).eval()


@lru_cache(maxsize=16)
def _encode_null(path: str | Path, revision: str | None, prompt: str) -> dict[str, Tensor]:
    """The null condition. Cached, because student, teacher and critic of a run share it."""
    return encode(path, [prompt], revision)


def dynamic_shift(folder: Path, scheduler: Any, tokens: int) -> dict[str, Any]:
    r"""Scheduler settings that fix a shift that depends on the image size: shift = exp(mu), mu linear in `tokens`.

    `shift_terminal` changes the times of sampling, not the network's timesteps, and is left to the grid.

    Raises:
        BadInput: for a dynamic shift of another type.
    """
    config = scheduler.config
    if not config.get("use_dynamic_shifting"):
        return {}
    if config.get("time_shift_type", "exponential") != "exponential":
        raise BadInput(
            f"{folder}: its scheduler has time_shift_type={config.time_shift_type!r}; only 'exponential' is supported."
        )
    slope = (config.max_shift - config.base_shift) / (config.max_image_seq_len - config.base_image_seq_len)
    mu = config.base_shift + slope * (tokens - config.base_image_seq_len)
    return {"use_dynamic_shifting": False, "shift": math.exp(mu)}
