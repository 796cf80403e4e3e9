"""Pipelines that use a supported network in a way that is not supported, and what to load instead."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Config = dict[str, Any]
Applies = Callable[[Config, Config], bool]  # (model_index.json, config.json of the network)


@dataclass(frozen=True)
class Refusal:
    """A kind of pipeline that is refused.

    Args:
        kind: its name, the subject of the sentence.
        reason: the rest of the sentence: what is unsupported and what to load instead.
        applies: whether a folder is of this kind, from model_index.json and the config.json of its network.
    """

    kind: str
    reason: str
    applies: Applies


def _pipeline(*parts: str) -> Applies:
    """Pipelines whose class has one of these in its name."""
    return lambda index, network: any(part in index.get("_class_name", "") for part in parts)


def _component(*names: str) -> Applies:
    """Pipelines with one of these components."""
    return lambda index, network: any((index.get(name) or [None, None])[1] for name in names)


def _unet(channels: int, *parts: str) -> Applies:
    """U-Nets of four latent channels that read `channels`, and pipelines whose class has one of these in its name."""
    named = _pipeline(*parts)

    def applies(index: Config, network: Config) -> bool:
        of_unet = network.get("_class_name") == "UNet2DConditionModel"
        return (
            named(index, network)
            or of_unet
            and (network.get("in_channels"), network.get("out_channels"))
            == (
                channels,
                4,
            )
        )

    return applies


def _takes_guidance(index: Config, network: Config) -> bool:
    """Whether a U-Net that this package did not export takes the guidance scale as an input."""
    return bool(network.get("time_cond_proj_dim")) and not index.get("_exported")


# The first that applies is reported.
REFUSALS = (
    Refusal(
        "a ControlNet or adapter pipeline",
        "needs a control image, which no data here provide; load the pipeline of its base model.",
        _component("controlnet", "adapter", "t2i_adapter"),
    ),
    Refusal(
        "an AnimateDiff pipeline",
        "adds a motion module to an image model, and is not supported; load a video model such as Wan 2.1.",
        _component("motion_adapter"),
    ),
    Refusal(
        "FLUX Fill",
        "reads a mask and a masked image beside the latents; load FLUX.1-dev.",
        _pipeline("FluxFill"),
    ),
    Refusal(
        "FLUX Control",
        "reads a control image beside the latents; load FLUX.1-dev.",
        _pipeline("FluxControl"),
    ),
    Refusal(
        "FLUX Kontext",
        "reads an image to edit as further tokens; load FLUX.1-dev.",
        _pipeline("FluxKontext"),
    ),
    Refusal(
        "a control model",
        "reads a control image or video beside the latents; load the model it was made from.",
        _pipeline("Control"),
    ),
    Refusal(
        "an inpainting model",
        "reads a mask and a masked image beside the latents; load the text-to-image model it was made from.",
        _unet(9, "Inpaint"),
    ),
    Refusal(
        "an upscaler",
        "reads a low-resolution image beside the latents; load a text-to-image model.",
        _unet(7, "Upscale"),
    ),
    Refusal(
        "InstructPix2Pix",
        "reads the image to edit beside the latents; load the text-to-image model it was made from.",
        _unet(8, "InstructPix2Pix"),
    ),
    Refusal(
        "a depth-to-image model",
        "reads a depth map beside the latents; load the text-to-image model it was made from.",
        _unet(5, "Depth2Img"),
    ),
    Refusal(
        "the SDXL refiner",
        "denoises only the last steps and reads an aesthetic score; load the base model of SDXL.",
        lambda index, network: bool(index.get("requires_aesthetics_score")),
    ),
    Refusal(
        "an image-variation model",
        "is conditioned on an image instead of a prompt; load a text-to-image model.",
        _pipeline("ImageVariation", "StableUnCLIP"),
    ),
    Refusal(
        "an LCM U-Net (time_cond_proj_dim)",
        "is a few-step student that takes the guidance scale as an input; load the model it was distilled from.",
        _takes_guidance,
    ),
    Refusal(
        "Wan 2.2",
        "uses two networks or a timestep per token, and pipelines with more than a single network and one timestep per "
        "sample are not supported; load Wan 2.1.",
        lambda index, network: bool(index.get("expand_timesteps")) or _component("transformer_2")(index, network),
    ),
)


def refusal_of(index: Config, network: Config) -> str | None:
    """Why a pipeline is refused, a sentence without its subject's path; None if it is not.

    Args:
        index: contents of model_index.json; `_exported` is true in a folder that this package wrote.
        network: config.json of the denoising network.
    """
    found = next((refusal for refusal in REFUSALS if refusal.applies(index, network)), None)
    return found and f"{found.kind} {found.reason}"
