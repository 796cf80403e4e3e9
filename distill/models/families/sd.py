"""Stable Diffusion 1, 2 and XL: U-Nets of latents (B, C, H, W).

Conditions: text; for XL also pooled, and optionally `size` (B, 6), (height, width, top, left, target height, target width)
in pixels, by default that of x, uncropped.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor, nn

from distill.errors import BadInput
from distill.models.diffusers import tiny_parts as parts
from distill.models.families.family import Factors, Family, Published, Twin, Weights

GUIDANCE_FEATURES = 256  # of the guidance input that a U-Net gets, with weights of zero


def check_supported(model: Any) -> None:
    """Raises BadInput for networks of another task."""
    stock = model.config
    if stock.addition_embed_type not in (None, "text_time") or stock.class_embed_type or stock.encoder_hid_dim_type:
        raise BadInput(
            f"UNet2DConditionModel with addition_embed_type={stock.addition_embed_type!r}, class_embed_type="
            f"{stock.class_embed_type!r}, encoder_hid_dim_type={stock.encoder_hid_dim_type!r}: only conditioning as in "
            "Stable Diffusion 1, 2 and XL is supported."
        )
    if stock.in_channels != stock.out_channels:
        raise BadInput(
            f"UNet2DConditionModel from {stock.in_channels} to {stock.out_channels} channels reads an image beside the "
            "latents, which is not supported; load a text-to-image model."
        )


def variant(model: Any) -> dict[str, Any]:
    """The conditions of this network."""
    xl = model.config.addition_embed_type
    return {"conditions": ("text", "pooled"), "optional_conditions": ("size",)} if xl else {}


def call(
    net: Any, x: Tensor, n: Tensor, text: Tensor, pooled: Tensor | None = None, size: Tensor | None = None
) -> Tensor:
    """The answer of the stock network, of the shape of x."""
    added = None
    if pooled is not None:
        added = {"text_embeds": pooled, "time_ids": default_size(net, x) if size is None else size}
    return net.stock(x, n, encoder_hidden_states=text, added_cond_kwargs=added).sample


def default_size(net: Any, x: Tensor) -> Tensor:
    """`size` (B, 6) of an image of the size of x that was not cropped."""
    height, width = (net.pixels * side for side in x.shape[2:])
    return x.new_tensor([height, width, 0, 0, height, width]).expand(len(x), -1)


def encode_prompt(encode: Callable[..., Any], prompts: list[str], pipeline: Any) -> dict[str, Tensor]:
    """The conditions of prompts, one row each."""
    out = encode(prompt=prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    return {"text": out[0]} if len(out) == 2 else {"text": out[0], "pooled": out[2]}


@torch.no_grad()
def mute(unet: Any) -> None:
    """Turn classifier-free guidance off in stock pipelines, by a guidance input with weights of zero."""
    if unet.config.time_cond_proj_dim is None:
        layer, like = unet.time_embedding, unet.time_embedding.linear_1
        layer.cond_proj = nn.Linear(GUIDANCE_FEATURES, like.in_features, bias=False).to(like.weight)
        layer.cond_proj.weight.zero_()
        unet.register_to_config(time_cond_proj_dim=GUIDANCE_FEATURES)


# -- keys of the original code ---------------------------------------------------------------------------------------

ROOT = "model.diffusion_model."
LABELS = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
LAYERS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
ENDS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
} | LABELS


def kohya_keys(factors: Factors) -> Weights:
    """The layout of kohya's scripts and of ComfyUI for a U-Net of diffusers, with alpha = rank."""
    found = {}
    for name, (down, up) in factors.items():
        key = f"lora_unet_{LABELS.get(name, name).replace('.', '_')}"
        found |= {
            f"{key}.lora_down.weight": down,
            f"{key}.lora_up.weight": up,
            f"{key}.alpha": torch.tensor(float(len(down))),
        }
    return found


def original_keys(weights: Weights, config: Any) -> Weights:
    """The weights of a U-Net by the original code's names."""
    attending = {int(found[1]) for key in weights if (found := re.match(r"up_blocks\.(\d+)\.attentions\.", key))}
    return {ROOT + original_key(key, config.layers_per_block, attending): value for key, value in weights.items()}


def original_key(key: str, layers: int, attending: set[int]) -> str:
    """The original code's name of a weight of a U-Net with `layers` residual blocks a resolution.

    `attending` are the up blocks with attention, after which they upsample.

    Raises:
        BadInput: the original network has no such weight.
    """
    for name, original_name in ENDS.items():
        if key.startswith(f"{name}."):
            return original_name + key.removeprefix(name)
    found = re.fullmatch(
        r"(down|up|mid)_blocks?(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.*)", key
    )
    if not found:
        raise BadInput(f"The original layout of Stable Diffusion has no weight {key}: export this U-Net as a pipeline.")
    side, i, kind, j, rest = found[1], int(found[2] or 0), found[3], int(found[4]), found[5]
    if kind == "resnets":
        name, _, end = rest.partition(".")
        rest = f"{LAYERS[name]}.{end}"
    if side == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * j}.{rest}"
    if kind == "downsamplers":
        return f"input_blocks.{(i + 1) * (layers + 1)}.0.op.{rest.removeprefix('conv.')}"
    if kind == "upsamplers":
        return f"output_blocks.{i * (layers + 1) + layers}.{1 + (i in attending)}.{rest}"
    block = i * (layers + 1) + j
    return f"{'input' if side == 'down' else 'output'}_blocks.{block + (side == 'down')}.{int(kind == 'attentions')}.{rest}"


# -- tiny twins and published sizes ----------------------------------------------------------------------------------


def tiny_unet(dim: int, **kw: Any) -> Any:
    """A text-conditioned U-Net that reads text features of width `dim`."""
    torch.manual_seed(2)
    return parts.shake(
        diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            layers_per_block=1,
            cross_attention_dim=dim,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=2,
            **kw,
        )
    )


def tiny_sd(prediction: str = "epsilon") -> Any:
    """Stable Diffusion 1 (epsilon) or 2 (v_prediction)."""
    return diffusers.StableDiffusionPipeline(
        vae=parts.vae(),
        text_encoder=parts.clip(),
        tokenizer=parts.clip_tokenizer(),
        unet=tiny_unet(16),
        scheduler=parts.scaled(prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def tiny_sdxl(zeros: bool = True) -> Any:
    """Stable Diffusion XL; `zeros`: the null condition is zeros."""
    return diffusers.StableDiffusionXLPipeline(
        vae=parts.vae(),
        text_encoder=parts.clip(16),
        text_encoder_2=parts.clip(24, projection=24),
        tokenizer=parts.clip_tokenizer(),
        tokenizer_2=parts.clip_tokenizer(),
        unet=tiny_unet(
            16 + 24,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=24 + 6 * 4,
            transformer_layers_per_block=1,
            use_linear_projection=True,
        ),
        scheduler=parts.scaled(),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )


BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
VAE = {"latent_channels": 4, "block_out_channels": [128, 256, 512, 512]}
PUBLISHED = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": Published(
        "StableDiffusionPipeline",
        {
            "sample_size": 64,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
            "block_out_channels": [320, 640, 1280, 1280],
        },
        "PNDMScheduler",
        BETAS | {"skip_prk_steps": True, "steps_offset": 1},
        VAE | {"scaling_factor": 0.18215},
        (4, 64, 64),
        {"text": (77, 768)},
        0.859520964,
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": Published(
        "StableDiffusionXLPipeline",
        {
            "sample_size": 128,
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "use_linear_projection": True,
            "transformer_layers_per_block": [1, 2, 10],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "EulerDiscreteScheduler",
        BETAS | {"steps_offset": 1},
        VAE | {"scaling_factor": 0.13025},
        (4, 128, 128),
        {"text": (77, 2048), "pooled": (1280,)},
        2.567463684,
        index={"force_zeros_for_empty_prompt": True},
    ),
}

FAMILY = Family(
    network="UNet2DConditionModel",
    part="unet",
    call=call,
    check_supported=check_supported,
    variant=variant,
    embeddings=("time_embedding",),
    encode_prompt=encode_prompt,
    mute=mute,
    scheduler_settings={"steps_offset": 1},  # unused with trailing spacing, but a required argument of the stock class
    bare_calls={("StableDiffusionPipeline", "LCMScheduler", 4): "LatentConsistencyModelPipeline"},
    lora_keys=kohya_keys,
    original_keys=original_keys,
    twins={
        "sd15": Twin(tiny_sd),
        "sd2": Twin(partial(tiny_sd, "v_prediction")),
        "sdxl": Twin(tiny_sdxl),
        "sdxl_empty": Twin(partial(tiny_sdxl, zeros=False), shape=(4, 8, 12)),
    },
    published=PUBLISHED,
)
