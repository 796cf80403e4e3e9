"""Stable Diffusion 3 and 3.5: latents (B, C, H, W). Conditions: text, pooled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor

from distill.models.diffusers import tiny_parts as parts
from distill.models.families.family import Family, Published, Twin


def call(net: Any, x: Tensor, n: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
    """The answer of the stock network, of the shape of x."""
    return net.stock(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=n).sample


def encode_prompt(encode: Callable[..., Any], prompts: list[str], pipeline: Any) -> dict[str, Tensor]:
    """The conditions of prompts, one row each."""
    out = encode(prompt=prompts, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False)
    return {"text": out[0], "pooled": out[2]}


def tiny() -> Any:
    """Stable Diffusion 3."""
    torch.manual_seed(2)
    network = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=48,
        caption_projection_dim=16,
        pooled_projection_dim=40,
        pos_embed_max_size=16,
        qk_norm="rms_norm",
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=parts.shake(network, 0.05),
        scheduler=parts.flow(shift=3.0),
        vae=parts.vae(shift_factor=0.06),
        text_encoder=parts.clip(16, 16),
        tokenizer=parts.clip_tokenizer(),
        text_encoder_2=parts.clip(24, 24),
        tokenizer_2=parts.clip_tokenizer(),
        text_encoder_3=parts.t5(48),
        tokenizer_3=parts.t5_tokenizer(),
    )


PUBLISHED = {
    "stabilityai/stable-diffusion-3-medium-diffusers": Published(
        "StableDiffusion3Pipeline",
        {
            "attention_head_dim": 64,
            "caption_projection_dim": 1536,
            "in_channels": 16,
            "out_channels": 16,
            "joint_attention_dim": 4096,
            "num_attention_heads": 24,
            "num_layers": 24,
            "patch_size": 2,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
            "sample_size": 128,
        },
        "FlowMatchEulerDiscreteScheduler",
        {"shift": 3.0},
        {
            "latent_channels": 16,
            "block_out_channels": [128, 256, 512, 512],
            "scaling_factor": 1.5305,
            "shift_factor": 0.0609,
        },
        (16, 128, 128),
        {"text": (333, 4096), "pooled": (2048,)},
        2.03,
    )
}

FAMILY = Family(
    network="SD3Transformer2DModel",
    call=call,
    embeddings=("time_text_embed.timestep_embedder",),
    conditions=("text", "pooled"),
    encode_prompt=encode_prompt,
    twins={"sd3": Twin(tiny)},
    published=PUBLISHED,
)
