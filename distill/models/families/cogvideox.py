"""CogVideoX: latents (B, C, F, H, W); the stock network has frames before channels. Conditions: text; image to video: image.

`image` (B, C, 1, H, W) are the latents of the first frame; they are padded with zeros to the frames of x and concatenated
with x.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Generator, Tensor
from torch.nn import functional

from distill.errors import BadInput
from distill.models.diffusers import tiny_parts as parts
from distill.models.families.family import FRAMES_FIRST, Family, Published, Twin

FRAME_CONDITIONS = ("image",)
OFFSET = 2.0  # the input `ofs` of the image-to-video model 1.5


def check_supported(model: Any) -> None:
    """Raises BadInput for networks of another task."""
    stock = model.config
    if stock.in_channels not in (stock.out_channels, 2 * stock.out_channels):
        raise BadInput(
            f"CogVideoXTransformer3DModel from {stock.in_channels} to {stock.out_channels} channels: only text "
            "to video and image to video are supported."
        )


def variant(model: Any) -> dict[str, Any]:
    """The conditions of this network."""
    if model.config.in_channels == model.config.out_channels:
        return {}
    return {"conditions": ("text", *FRAME_CONDITIONS), "null_keeps": FRAME_CONDITIONS}


def default_shape(config: Any) -> tuple[int, ...]:
    """The shape (C, F, H, W) of a sample from the stock config."""
    frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
    return config.out_channels, frames, config.sample_height, config.sample_width


def call(net: Any, x: Tensor, n: Tensor, text: Tensor, image: Tensor | None = None) -> Tensor:
    """The answer of the stock network, of the shape of x."""
    shape, config = x.shape, net.stock.config
    rotary = rotary_angles(config, x) if config.use_rotary_positional_embeddings else None
    offset = x.new_full((1,), OFFSET) if config.ofs_embed_dim else None
    if image is not None:
        x = torch.cat([x, functional.pad(image, (0, 0, 0, 0, 0, x.shape[2] - image.shape[2]))], 1)
    out = net.stock(
        FRAMES_FIRST.pack(x), encoder_hidden_states=text, timestep=n, ofs=offset, image_rotary_emb=rotary
    ).sample
    return FRAMES_FIRST.unpack(out, shape)


def rotary_angles(stock: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The rotary angles (cos, sin) of every token: scaled to the training size (1.0), or by position (1.5)."""
    from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

    frames, height, width = x.shape[2:]
    patch, span = stock.patch_size, stock.patch_size_t
    grid, base = (height // patch, width // patch), (stock.sample_height // patch, stock.sample_width // patch)
    if span is None:
        return get_3d_rotary_pos_embed(
            embed_dim=stock.attention_head_dim,
            grid_size=grid,
            temporal_size=frames,
            device=x.device,
            crops_coords=get_resize_crop_region_for_grid(grid, base[1], base[0]),
        )
    return get_3d_rotary_pos_embed(
        embed_dim=stock.attention_head_dim,
        crops_coords=None,
        grid_size=grid,
        grid_type="slice",
        max_size=base,
        temporal_size=(frames + span - 1) // span,
        device=x.device,
    )


def encode_frame(
    pipeline: Any, image: Any, pixels: Tensor, frames: int, generator: Generator | None
) -> dict[str, Tensor]:
    """The conditions of a first frame."""
    channels, size = pipeline.vae.config.latent_channels, pixels.shape[2:]
    _, latents = pipeline.prepare_latents(
        pixels, 1, channels, frames, *size, pixels.dtype, pixels.device, generator, latents=pixels
    )
    return {"image": latents[:, :1].transpose(1, 2)}


def tiny(rotary: bool = False, span: int | None = None, image: bool = False, **kw: Any) -> Any:
    """CogVideoX: `rotary` as 5B, `span` the temporal patch of 1.5, `image` to video."""
    torch.manual_seed(2)
    network = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=8 if image else 4,
        out_channels=4,
        time_embed_dim=8,
        text_embed_dim=16,
        num_layers=1,
        sample_width=4,
        sample_height=4,
        sample_frames=9,
        patch_size=2,
        patch_size_t=span,
        max_text_seq_length=226,
        use_rotary_positional_embeddings=rotary,
        patch_bias=span is None,
        **kw,
    )
    torch.manual_seed(3)
    autoencoder = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    kind = diffusers.CogVideoXImageToVideoPipeline if image else diffusers.CogVideoXPipeline
    return kind(
        tokenizer=parts.t5_tokenizer(),
        text_encoder=parts.t5(),
        vae=autoencoder,
        transformer=parts.shake(network, 0.05),
        scheduler=parts.ddim(
            "v_prediction", diffusers.CogVideoXDDIMScheduler, rescale_betas_zero_snr=True, snr_shift_scale=3.0
        ),
    )


PUBLISHED = {
    "THUDM/CogVideoX-2b": Published(
        "CogVideoXPipeline",
        {
            "num_attention_heads": 30,
            "attention_head_dim": 64,
            "num_layers": 30,
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": 2,
            "sample_frames": 49,
            "sample_height": 60,
            "sample_width": 90,
            "text_embed_dim": 4096,
            "max_text_seq_length": 226,
            "time_embed_dim": 512,
        },
        "CogVideoXDDIMScheduler",
        {
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "num_train_timesteps": 1000,
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "snr_shift_scale": 3.0,
            "timestep_spacing": "trailing",
        },
        {
            "latent_channels": 16,
            "block_out_channels": [128, 256, 256, 512],
            "scaling_factor": 1.15258426,
            "temporal_compression_ratio": 4,
        },
        (16, 13, 60, 90),
        {"text": (226, 4096)},
        1.69,
    )
}
TRIED = {"shape": (4, 3, 4, 4), "call": {"num_frames": 9}}  # the latents and the call of the tests

FAMILY = Family(
    network="CogVideoXTransformer3DModel",
    call=call,
    check_supported=check_supported,
    variant=variant,
    embeddings=("time_embedding",),
    default_shape=default_shape,
    frames=4,
    layout=FRAMES_FIRST,
    frame_conditions=FRAME_CONDITIONS,
    encode_frame=encode_frame,
    frame_parts=("vae",),
    frame_config_parts=("transformer",),
    ode_scheduler="CogVideoXDDIMScheduler",
    twins={
        "cogvideox": Twin(tiny, **TRIED),
        "cogvideox_5b": Twin(partial(tiny, rotary=True), **TRIED),
        "cogvideox_i2v": Twin(partial(tiny, image=True), parity=False, **TRIED),
    },
    published=PUBLISHED,
)
