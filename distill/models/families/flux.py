r"""FLUX.1: latents (B, C, H, W) with even H and W, packed inside. Conditions: text, pooled.

`guide` (B,) is the guidance input of FLUX.1-dev, `guidance_scale` of diffusers; the default is 3.5. It differs from the w
of `Guided`, which is `true_cfg_scale` of diffusers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor

from distill.errors import BadInput
from distill.models.diffusers import tiny_parts as parts
from distill.models.families.family import PATCHES, Family, Published, Twin

DEFAULT_GUIDE = 3.5


def check_supported(model: Any) -> None:
    """Raises BadInput for networks of another task."""
    stock = model.config
    if stock.out_channels not in (None, stock.in_channels):
        raise BadInput(
            f"FluxTransformer2DModel from {stock.in_channels} to {stock.out_channels} channels reads an image beside "
            "the latents, which is not supported; load FLUX.1-dev or -schnell."
        )


def variant(model: Any) -> dict[str, Any]:
    """The conditions of this network."""
    return {"optional_conditions": ("guide",)} if model.config.guidance_embeds else {}


def call(net: Any, x: Tensor, time: Tensor, text: Tensor, pooled: Tensor, guide: Tensor | None = None) -> Tensor:
    """The answer of the stock network, of the shape of x."""
    height, width = x.shape[2:]
    if height % 2 or width % 2:
        raise BadInput(f"FLUX needs latents of even height and width, not {height} x {width}: crop or pad them.")
    rows, columns = height // 2, width // 2
    positions = torch.zeros(rows, columns, 3, device=x.device)
    positions[..., 1] = torch.arange(rows, device=x.device)[:, None]
    positions[..., 2] = torch.arange(columns, device=x.device)
    if net.optional_conditions and guide is None:
        guide = x.new_full((len(x),), DEFAULT_GUIDE)
    out = net.stock(
        PATCHES.pack(x),
        timestep=time,
        guidance=guide,
        pooled_projections=pooled,
        encoder_hidden_states=text,
        img_ids=positions.flatten(0, 1),
        txt_ids=positions.new_zeros(text.shape[1], 3),
    ).sample
    return PATCHES.unpack(out, x.shape)


def encode_prompt(encode: Callable[..., Any], prompts: list[str], pipeline: Any) -> dict[str, Tensor]:
    """The conditions of prompts, one row each."""
    out = encode(prompt=prompts)
    return {"text": out[0], "pooled": out[1]}


def tiny(dev: bool = True) -> Any:
    """FLUX.1-dev with its guidance input, or FLUX.1-schnell."""
    torch.manual_seed(2)
    network = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=dev,
    )
    return diffusers.FluxPipeline(
        transformer=parts.shake(network, 0.05),
        scheduler=parts.flow(shift=3.0 if dev else 1.0, use_dynamic_shifting=dev),
        vae=parts.vae(shift_factor=0.06),
        text_encoder=parts.clip(),
        tokenizer=parts.clip_tokenizer(),
        text_encoder_2=parts.t5(32),
        tokenizer_2=parts.t5_tokenizer(),
    )


PUBLISHED = {
    "black-forest-labs/FLUX.1-dev": Published(
        "FluxPipeline",
        {
            "attention_head_dim": 128,
            "guidance_embeds": True,
            "in_channels": 64,
            "joint_attention_dim": 4096,
            "num_attention_heads": 24,
            "num_layers": 19,
            "num_single_layers": 38,
            "patch_size": 1,
            "pooled_projection_dim": 768,
            "axes_dims_rope": [16, 56, 56],
        },
        "FlowMatchEulerDiscreteScheduler",
        {
            "shift": 3.0,
            "use_dynamic_shifting": True,
            "base_shift": 0.5,
            "max_shift": 1.15,
            "base_image_seq_len": 256,
            "max_image_seq_len": 4096,
        },
        {
            "latent_channels": 16,
            "block_out_channels": [128, 256, 512, 512],
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
        },
        (16, 128, 128),
        {"text": (512, 4096), "pooled": (768,)},
        11.90140832,
    )
}

FAMILY = Family(
    network="FluxTransformer2DModel",
    call=call,
    check_supported=check_supported,
    variant=variant,
    embeddings=("time_text_embed.timestep_embedder",),
    model_time="n / N",
    time_dtype="x",
    default_shape=lambda config: (config.in_channels // 4, 128, 128),
    patch=2,
    layout=PATCHES,
    conditions=("text", "pooled"),
    encode_prompt=encode_prompt,
    even_sigmas=True,
    guidance_argument="true_cfg_scale",
    no_guidance={},
    twins={
        "flux": Twin(tiny, call={"negative_prompt": ["", ""], "guidance_scale": 2.5}, load={"size": (8, 8)}),
        "flux_schnell": Twin(
            partial(tiny, dev=False), shape=(4, 8, 12), call={"negative_prompt": ["", ""]}, load={"size": (8, 12)}
        ),
    },
    published=PUBLISHED,
)
