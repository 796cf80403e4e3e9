"""Networks: small networks in plain torch, discriminator heads, LoRA, and `diffusers` backbones (imported lazily).

Examples:
    >>> import torch
    >>> from distill.models import MLP
    >>> MLP(dim=2, width=8)(torch.randn(4, 2), torch.rand(4)).shape
    torch.Size([4, 2])
"""

from distill.models.small import MLP, Transformer

__all__ = ["MLP", "Transformer"]
