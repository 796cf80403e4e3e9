"""Attention of stock networks that supports forward-mode differentiation."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0

from distill.errors import BadInput


class MathAttention(AttnProcessor):
    """softmax(Q K^T) V, written out: fused kernels have no forward-mode derivative (`torch.func.jvp`)."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        out = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return out.clone(memory_format=torch.contiguous_format)  # the next group norm views the tangent


def use_math_attention(model: Any) -> None:
    """Replaces the plain attention processors of a diffusers model by MathAttention.

    Raises:
        BadInput: if the model has other attention processors.
    """
    for module in model.modules():
        if isinstance(module, (Attention, AttentionModuleMixin)):
            if not isinstance(module.processor, (AttnProcessor, AttnProcessor2_0)):
                raise BadInput(
                    f"{type(model).__name__} has {type(module.processor).__name__}, which math_attention cannot replace: "
                    "leave it out."
                )
            module.set_processor(MathAttention())
