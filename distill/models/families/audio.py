"""Text-to-audio families; x is (B, C, L)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from torch import Tensor, nn

from distill.models.diffusers.network import TensorConditioned


class StableAudio(TensorConditioned):
    r"""Stock `StableAudioDiTModel`: Stable Audio Open. Conditions: text, duration.

    The null condition has zeros for the text and the same duration. The scheduler's timestep for x + sigma z is
    t = atan(sigma) 2 / pi, which is the time of TrigFlow, so the network is called with t.
    """

    conditions, null_keeps, prompt_config_parts, null_is_zero = (
        ("text", "duration"),
        ("duration",),
        ("transformer", "vae"),
        True,
    )

    @staticmethod
    def default_shape(config: Any) -> tuple[int, ...]:
        return config.in_channels, config.sample_size

    @staticmethod
    def embeddings(model: Any) -> list[nn.Module]:
        return []  # the network has no TimestepEmbedding to add w or s to

    def timestep(self, t: Tensor) -> Tensor:
        return t

    def call_stock(self, x: Tensor, n: Tensor, text: Tensor, duration: Tensor) -> Tensor:
        rotary = get_1d_rotary_pos_embed(
            self.stock.config.attention_head_dim // 2,
            x.shape[2] + duration.shape[1],
            use_real=True,
            repeat_interleave_real=False,
        )
        rotary = tuple(angle.to(x.device) for angle in rotary)
        return self.stock(
            x, n, encoder_hidden_states=text, global_hidden_states=duration, rotary_embedding=rotary
        ).sample

    @staticmethod
    def encode_prompt(encode: Callable[..., Any], prompts: list[str], pipeline: Any) -> dict[str, Tensor]:
        """The duration is from second 0 to the longest that the network can generate."""
        text = encode(prompt=prompts, device="cpu", do_classifier_free_guidance=False)
        autoencoder, length = pipeline.vae, pipeline.transformer.config.sample_size
        start, end = pipeline.encode_duration(
            0.0, length * autoencoder.hop_length / autoencoder.config.sampling_rate, text.device, False, len(prompts)
        )
        return {"text": torch.cat([text, start, end], 1), "duration": torch.cat([start, end], 2)}
