"""Networks: small networks in plain torch, discriminator heads, LoRA, and `diffusers` backbones (imported lazily)."""

from distill.models.small import MLP, Transformer

__all__ = ["MLP", "Transformer"]
