"""Networks: `small` is plain torch; `diffusers`, the one door to stock backbones, is imported only when asked for."""

from distill.nets.small import MLP, Transformer

__all__ = ["MLP", "Transformer"]
