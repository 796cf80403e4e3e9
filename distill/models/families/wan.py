"""Wan 2.1: latents (B, C, F, H, W). Conditions: text; for image to video also image, clip.

`image` (B, 4 + C, F, H, W) are the extra input channels of the stock pipeline: a mask of the given frames, and the latents
of a video that is grey after the first frame. `clip` (B, N, D) are image-encoder features of the first frame.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import Generator, Tensor

from distill.errors import BadInput
from distill.models.diffusers import tiny_parts as parts
from distill.models.families.family import Factors, Family, Published, Twin, Weights

FRAME_CONDITIONS = ("image", "clip")
ORIGINAL = {  # parts of our layers' names, and of the original code's
    ".attn1.to_": ".self_attn.",
    ".attn2.to_": ".cross_attn.",
    ".out.0": ".o",
    ".ffn.net.0.proj": ".ffn.0",
    ".ffn.net.2": ".ffn.2",
    "condition_embedder.time_proj": "time_projection.1",
    "proj_out": "head.head",
    "condition_embedder.time_embedder.linear_1": "time_embedding.0",
    "condition_embedder.time_embedder.linear_2": "time_embedding.2",
    "condition_embedder.text_embedder.linear_1": "text_embedding.0",
    "condition_embedder.text_embedder.linear_2": "text_embedding.2",
}


def check_supported(model: Any) -> None:
    """Raises BadInput for networks of another task."""
    stock = model.config
    text_to_video = stock.image_dim is None and stock.in_channels == stock.out_channels
    image_to_video = stock.image_dim is not None and stock.in_channels == 2 * stock.out_channels + 4
    if not (text_to_video or image_to_video) or stock.get("pos_embed_seq_len"):
        raise BadInput(
            f"WanTransformer3DModel from {stock.in_channels} to {stock.out_channels} channels, image_dim="
            f"{stock.image_dim}: only Wan 2.1's text to video and image to video are supported."
        )


def variant(model: Any) -> dict[str, Any]:
    """The conditions of this network."""
    if model.config.image_dim is None:
        return {}
    return {"conditions": ("text", *FRAME_CONDITIONS), "null_keeps": FRAME_CONDITIONS}


def call(
    net: Any, x: Tensor, n: Tensor, text: Tensor, image: Tensor | None = None, clip: Tensor | None = None
) -> Tensor:
    """The answer of the stock network, of the shape of x."""
    x = x if image is None else torch.cat([x, image], 1)
    return net.stock(x, timestep=n, encoder_hidden_states=text, encoder_hidden_states_image=clip).sample


def encode_frame(
    pipeline: Any, image: Any, pixels: Tensor, frames: int, generator: Generator | None
) -> dict[str, Tensor]:
    """The conditions of a first frame."""
    _, channels = pipeline.prepare_latents(
        pixels, 1, pipeline.vae.config.z_dim, *pixels.shape[2:], frames, pixels.dtype, pixels.device, latents=pixels
    )
    return {"image": channels, "clip": pipeline.encode_image(image, pixels.device)}


def wan_keys(factors: Factors) -> Weights:
    """The layout of Wan's own code, which ComfyUI reads."""
    found = {}
    for name, pair in factors.items():
        for ours, original in ORIGINAL.items():
            name = name.replace(ours, original)
        found |= {f"diffusion_model.{name}.lora_{ab}.weight": w for ab, w in zip("AB", pair)}
    return found


def tiny_network(**kw: Any) -> Any:
    """The transformer of Wan 2.1."""
    torch.manual_seed(2)
    network = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=2,
        attention_head_dim=12,
        out_channels=16,
        text_dim=16,
        freq_dim=16,
        ffn_dim=16,
        num_layers=1,
        rope_max_seq_len=32,
        **kw,
    )
    return parts.shake(network, 0.05)


def tiny_vae() -> Any:
    """The autoencoder of Wan 2.1, four frames per latent frame."""
    torch.manual_seed(3)
    return diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def tiny() -> Any:
    """Wan 2.1, text to video."""
    return diffusers.WanPipeline(
        tokenizer=parts.t5_tokenizer(),
        text_encoder=parts.t5(16, umt5=True),
        vae=tiny_vae(),
        transformer=tiny_network(in_channels=16),
        scheduler=parts.flow(shift=3.0),
    )


def tiny_image_to_video() -> Any:
    """Wan 2.1, image to video."""
    encoder, processor = parts.clip_vision()
    return diffusers.WanImageToVideoPipeline(
        tokenizer=parts.t5_tokenizer(),
        text_encoder=parts.t5(16, umt5=True),
        vae=tiny_vae(),
        image_encoder=encoder,
        image_processor=processor,
        transformer=tiny_network(in_channels=36, image_dim=16, added_kv_proj_dim=24),
        scheduler=parts.flow(shift=3.0),
    )


SMALL = {
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "ffn_dim": 8960,
    "freq_dim": 256,
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 12,
    "num_layers": 30,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "text_dim": 4096,
}
LARGE = SMALL | {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}
UNIPC = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction", "num_train_timesteps": 1000}


def published(network: dict[str, Any], parameters: float, pipeline: str = "WanPipeline") -> Published:
    """A published network at 480 x 832 pixels and 81 frames."""
    vae, shape = {"z_dim": 16, "scale_factor_spatial": 8}, (16, 21, 60, 104)
    conditions: dict[str, tuple[int, ...]] = {"text": (512, 4096)}
    if "image_dim" in network:
        conditions |= {"image": (20, *shape[1:]), "clip": (257, network["image_dim"])}
    return Published(pipeline, network, "UniPCMultistepScheduler", UNIPC, vae, shape, conditions, parameters)


PUBLISHED = {
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": published(SMALL, 1.419),
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": published(LARGE, 14.288),
    "Wan-AI/Wan2.1-I2V-14B-480P-Diffusers": published(
        LARGE | {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}, 16.396, "WanImageToVideoPipeline"
    ),
}

FAMILY = Family(
    network="WanTransformer3DModel",
    call=call,
    check_supported=check_supported,
    variant=variant,
    embeddings=("condition_embedder.time_embedder",),
    default_shape=lambda config: (config.out_channels, 21, 60, 104),
    frames=4,
    frame_conditions=FRAME_CONDITIONS,
    encode_frame=encode_frame,
    frame_parts=("vae", "image_encoder", "image_processor"),
    lora_keys=wan_keys,
    twins={
        "wan": Twin(tiny, shape=(16, 2, 4, 4), call={"num_frames": 5}, load={"size": (2, 4, 4)}),
        "wan_i2v": Twin(tiny_image_to_video, shape=(16, 2, 4, 4), load={"size": (2, 4, 4)}, parity=False),
    },
    published=PUBLISHED,
)
