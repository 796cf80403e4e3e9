"""Stable Audio Open: latents (B, C, L) of sound. Conditions: text, duration.

The null condition has zeros for the text and the same duration. The scheduler's timestep for x + sigma z is t = atan(sigma)
2 / pi, which is the time of TrigFlow, so the network is called with t. It has no time embedding to add w or s to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor

from distill.models.diffusers import tiny_parts as parts
from distill.models.families.family import Family, Twin


def call(net: Any, x: Tensor, t: Tensor, text: Tensor, duration: Tensor) -> Tensor:
    """The answer of the stock network, of the shape of x."""
    rotary = get_1d_rotary_pos_embed(
        net.stock.config.attention_head_dim // 2,
        x.shape[2] + duration.shape[1],
        use_real=True,
        repeat_interleave_real=False,
    )
    rotary = tuple(angle.to(x.device) for angle in rotary)
    return net.stock(x, t, encoder_hidden_states=text, global_hidden_states=duration, rotary_embedding=rotary).sample


def encode_prompt(encode: Callable[..., Any], prompts: list[str], pipeline: Any) -> dict[str, Tensor]:
    """The duration is from second 0 to the longest that the network can generate."""
    text = encode(prompt=prompts, device="cpu", do_classifier_free_guidance=False)
    autoencoder, length = pipeline.vae, pipeline.transformer.config.sample_size
    start, end = pipeline.encode_duration(
        0.0, length * autoencoder.hop_length / autoencoder.config.sampling_rate, text.device, False, len(prompts)
    )
    return {"text": torch.cat([text, start, end], 1), "duration": torch.cat([start, end], 2)}


def tiny() -> Any:
    """Stable Audio Open."""
    from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel

    torch.manual_seed(2)
    network = parts.shake(
        diffusers.StableAudioDiTModel(
            sample_size=8,
            in_channels=3,
            num_layers=2,
            attention_head_dim=4,
            num_attention_heads=2,
            num_key_value_attention_heads=2,
            out_channels=3,
            cross_attention_dim=4,
            time_proj_dim=8,
            global_states_input_dim=8,
            cross_attention_input_dim=4,
        ),
        0.05,
    )
    torch.manual_seed(3)
    autoencoder = diffusers.AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    project = StableAudioProjectionModel(text_encoder_dim=16, conditioning_dim=4, min_value=0, max_value=32)
    return diffusers.StableAudioPipeline(
        vae=autoencoder,
        text_encoder=parts.t5(),
        projection_model=parts.shake(project),
        tokenizer=parts.t5_tokenizer(),
        transformer=network,
        scheduler=diffusers.CosineDPMSolverMultistepScheduler(solver_order=1),
    )


FAMILY = Family(
    network="StableAudioDiTModel",
    call=call,
    clock="t",
    default_shape=lambda config: (config.in_channels, config.sample_size),
    conditions=("text", "duration"),
    null_keeps=("duration",),
    null_is_zero=True,
    encode_prompt=encode_prompt,
    prompt_config_parts=("transformer", "vae"),
    twins={"stable_audio": Twin(tiny, shape=(3, 8), parity=False)},
)
