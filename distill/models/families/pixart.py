"""PixArt-alpha and -sigma: latents (B, C, H, W). Conditions: text, text_mask; a predicted variance is dropped.

PixArt-alpha at 1024 has the optional conditions `resolution` (B, 2), (height, width) in pixels, and `aspect` (B, 1),
height / width; by default those of x.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import torch
from torch import Tensor

from distill.models.diffusers import tiny_parts as parts
from distill.models.families.family import Family, Published, Twin, encode_masked_text


def variant(model: Any) -> dict[str, Any]:
    """The conditions of this network."""
    return {"optional_conditions": ("resolution", "aspect")} if model.use_additional_conditions else {}


def call(
    net: Any,
    x: Tensor,
    n: Tensor,
    text: Tensor,
    text_mask: Tensor,
    resolution: Tensor | None = None,
    aspect: Tensor | None = None,
) -> Tensor:
    """The answer of the stock network, of the shape of x."""
    added = {"resolution": None, "aspect_ratio": None}
    if net.optional_conditions:
        height, width = x.shape[2:]
        own_size = x.new_tensor([net.pixels * height, net.pixels * width]).expand(len(x), -1)
        ratio = x.new_tensor([height / width]).expand(len(x), -1)
        added = {
            "resolution": own_size if resolution is None else resolution,
            "aspect_ratio": ratio if aspect is None else aspect,
        }
    return net.stock(
        x, encoder_hidden_states=text, encoder_attention_mask=text_mask, timestep=n, added_cond_kwargs=added
    ).sample[:, : x.shape[1]]


def tiny(kind: str = "PixArtAlphaPipeline", size: int = 128) -> Any:
    """PixArt-alpha, or -sigma by its pipeline; at `size` 128 with resolution and aspect conditions."""
    torch.manual_seed(2)
    network = diffusers.PixArtTransformer2DModel(
        sample_size=size,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=3,
        caption_channels=16,
        in_channels=4,
        cross_attention_dim=24,
        out_channels=8,
        use_additional_conditions=size == 128,
    )
    return getattr(diffusers, kind)(
        tokenizer=parts.t5_tokenizer(),
        text_encoder=parts.t5(),
        vae=parts.vae(),
        transformer=parts.shake(network, 0.05),
        scheduler=parts.ddim(),
    )


PUBLISHED = {
    "PixArt-alpha/PixArt-XL-2-1024-MS": Published(
        "PixArtAlphaPipeline",
        {
            "num_layers": 28,
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "cross_attention_dim": 1152,
            "in_channels": 4,
            "out_channels": 8,
            "caption_channels": 4096,
            "patch_size": 2,
            "sample_size": 128,
        },
        "DPMSolverMultistepScheduler",
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        {"latent_channels": 4, "block_out_channels": [128, 256, 512, 512], "scaling_factor": 0.13025},
        (4, 128, 128),
        {"text": (120, 4096), "text_mask": (120,)},
        0.611,
    )
}
PLAIN_CALL = {"use_resolution_binning": False, "clean_caption": False}

FAMILY = Family(
    network="PixArtTransformer2DModel",
    call=call,
    variant=variant,
    embeddings=("adaln_single.emb.timestep_embedder",),
    conditions=("text", "text_mask"),
    encode_prompt=encode_masked_text,
    twins={
        "pixart": Twin(tiny, shape=(4, 8, 12), call=PLAIN_CALL),
        "pixart_sigma": Twin(partial(tiny, "PixArtSigmaPipeline", 8), call=PLAIN_CALL),
    },
    published=PUBLISHED,
)
