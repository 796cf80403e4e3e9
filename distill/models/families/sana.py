"""Sana: latents (B, C, H, W). Conditions: text, text_mask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor

from distill.errors import BadInput
from distill.models.diffusers import tiny_parts as parts
from distill.models.families.family import Family, Published, Twin


def check_supported(model: Any) -> None:
    """Raises BadInput for networks of another task."""
    if model.config.guidance_embeds:
        raise BadInput(
            "SanaTransformer2DModel with embedded guidance (Sana-Sprint) is a distilled model under TrigFlow and not "
            "supported as a teacher: load Sana instead."
        )


def call(net: Any, x: Tensor, n: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
    """The answer of the stock network, of the shape of x."""
    return net.stock(
        x,
        encoder_hidden_states=text,
        encoder_attention_mask=text_mask,
        timestep=n * net.stock.config.timestep_scale,
    ).sample[:, : x.shape[1]]


def encode_prompt(encode: Callable[..., Any], prompts: list[str], pipeline: Any) -> dict[str, Tensor]:
    """The null prompt has no instruction before it, as in the stock pipeline."""
    plain = {"complex_human_instruction": None} if prompts == [""] else {}
    out = encode(prompt=prompts, do_classifier_free_guidance=False, **plain)
    return {"text": out[0], "text_mask": out[1]}


def tiny() -> Any:
    """Sana."""
    torch.manual_seed(2)
    network = diffusers.SanaTransformer2DModel(
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=1,
        num_attention_heads=2,
        attention_head_dim=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=4,
        cross_attention_dim=8,
        caption_channels=8,
        sample_size=8,
        timestep_scale=0.001,
    )
    return diffusers.SanaPipeline(
        tokenizer=parts.gemma_tokenizer(),
        vae=parts.deep_compression_autoencoder(),
        text_encoder=parts.gemma2(),
        transformer=parts.shake(network, 0.05),
        scheduler=parts.flow(shift=3.0),
    )


PUBLISHED = {
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": Published(
        "SanaPipeline",
        {
            "sample_size": 32,
            "patch_size": 1,
            "num_layers": 20,
            "num_attention_heads": 70,
            "attention_head_dim": 32,
            "num_cross_attention_heads": 20,
            "cross_attention_head_dim": 112,
            "cross_attention_dim": 2240,
            "caption_channels": 2304,
            "in_channels": 32,
            "out_channels": 32,
            "mlp_ratio": 2.5,
        },
        "DPMSolverMultistepScheduler",
        {
            "use_flow_sigmas": True,
            "flow_shift": 3.0,
            "prediction_type": "flow_prediction",
            "num_train_timesteps": 1000,
        },
        {
            "latent_channels": 32,
            "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
            "scaling_factor": 0.41407,
        },
        (32, 32, 32),
        {"text": (300, 2304), "text_mask": (300,)},
        1.6,
    )
}

FAMILY = Family(
    network="SanaTransformer2DModel",
    call=call,
    check_supported=check_supported,
    embeddings=("time_embed.emb.timestep_embedder",),
    pixels=32,
    conditions=("text", "text_mask"),
    encode_prompt=encode_prompt,
    twins={
        "sana": Twin(tiny, shape=(4, 16, 16), call={"use_resolution_binning": False, "clean_caption": False}),
    },
    published=PUBLISHED,
)
