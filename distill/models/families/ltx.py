"""LTX-Video, text to video: latents (B, C, F, H, W), packed inside. Conditions: text, text_mask.

`rate` (B,) is the number of frames per second, equal for all samples of a batch; the default is 25.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Tensor

from distill.errors import BadInput
from distill.models.diffusers import tiny_parts as parts
from distill.models.families.family import TOKENS, Family, Twin, encode_masked_text

DEFAULT_RATE = 25.0


def check_supported(model: Any) -> None:
    """Raises BadInput for networks of another task."""
    if (model.config.patch_size, model.config.patch_size_t) != (1, 1):
        raise BadInput("LTXVideoTransformer3DModel with patches of more than one latent is not supported.")


def call(net: Any, x: Tensor, n: Tensor, text: Tensor, text_mask: Tensor, rate: Tensor | None = None) -> Tensor:
    """The answer of the stock network, of the shape of x."""
    frames, height, width = x.shape[2:]
    rate = DEFAULT_RATE if rate is None else float(rate[0])
    out = net.stock(
        TOKENS.pack(x),
        encoder_hidden_states=text,
        encoder_attention_mask=text_mask,
        timestep=n,
        num_frames=frames,
        height=height,
        width=width,
        rope_interpolation_scale=(net.family.frames / rate, net.pixels, net.pixels),
    ).sample
    return TOKENS.unpack(out, x.shape)


def tiny() -> Any:
    """LTX-Video, text to video."""
    torch.manual_seed(2)
    network = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=16,
    )
    torch.manual_seed(3)
    autoencoder = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        scaling_factor=0.9,
    )
    autoencoder.latents_mean, autoencoder.latents_std = torch.linspace(-1, 1, 8), torch.linspace(0.5, 2, 8)
    scheduler = parts.flow(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )
    return diffusers.LTXPipeline(
        scheduler=scheduler,
        vae=autoencoder.eval(),
        text_encoder=parts.t5(),
        tokenizer=parts.t5_tokenizer(),
        transformer=parts.shake(network, 0.05),
    )


FAMILY = Family(
    network="LTXVideoTransformer3DModel",
    call=call,
    check_supported=check_supported,
    embeddings=("time_embed.emb.timestep_embedder",),
    default_shape=lambda config: (config.in_channels, 21, 16, 22),
    pixels=32,
    frames=8,
    layout=TOKENS,
    conditions=("text", "text_mask"),
    optional_conditions=("rate",),
    encode_prompt=encode_masked_text,
    even_sigmas=True,
    twins={"ltx": Twin(tiny, shape=(8, 2, 2, 2), call={"num_frames": 9}, load={"size": (2, 2, 2)})},
)
