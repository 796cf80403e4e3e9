"""Families that make sound from text: x is (B, C, L)."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import get_1d_rotary_pos_embed

from distill.nets.diffusers.conditioned import Conditioned


class StableAudio(Conditioned):
    r"""Stock `StableAudioDiTModel`: Stable Audio Open (text, duration); the null text is zeros, the duration stays.

    Its scheduler's noise levels sigma in the chart x + sigma z are told as t = atan(sigma) 2 / pi, which is the time of
    TrigFlow, and its v is ours: the network is asked at t as it is.
    """

    told, kept, bones, null_zero = ("text", "duration"), ("duration",), ("transformer", "vae"), True

    @staticmethod
    def default_shape(config):
        return config.in_channels, config.sample_size

    @staticmethod
    def embeddings(model):
        return []  # Linear, SiLU, Linear without a TimestepEmbedding: no student that is told w or s

    def timestep(self, t):
        return t

    def ask(self, x, n, text, duration):
        rotary = get_1d_rotary_pos_embed(self.stock.config.attention_head_dim // 2, x.shape[2] + duration.shape[1],
                                         use_real=True, repeat_interleave_real=False)
        rotary = tuple(angle.to(x.device) for angle in rotary)
        return self.stock(x, n, encoder_hidden_states=text, global_hidden_states=duration,
                          rotary_embedding=rotary).sample

    @staticmethod
    def prompt(encode, prompts, pipeline):
        """From second 0 to the longest that the network makes."""
        text = encode(prompt=prompts, device="cpu", do_classifier_free_guidance=False)
        coder, length = pipeline.vae, pipeline.transformer.config.sample_size
        start, end = pipeline.encode_duration(0.0, length * coder.hop_length / coder.config.sampling_rate,
                                              text.device, False, len(prompts))
        return {"text": torch.cat([text, start, end], 1), "duration": torch.cat([start, end], 2)}
