r"""Small networks for toys and tests, in plain torch; all layers support forward-mode differentiation.

Networks are called as `net(x, t, label=None, w=None, s=None)`:

- `x`: noisy input (B, *shape); the output has the same shape;
- `t`: float time (B,) in [0, 1], data at 0;
- `label`: int64 (B,), or None; -1 and None are "no class";
- `w`: guidance scale, (B,) or a number, for `guided=True`; w = 1 is conditional;
- `s`: second time of a flow map (B,), s <= t, for `flow_map=True`; the network embeds t - s.

`w` and `s` enter through layers that are zero at initialisation: a student that is initialised from a teacher without
these inputs equals the teacher until its first update. The interface of networks is `denoise.Network`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.denoise import Network
from distill.errors import BadInput


class ScalarEmbedding(nn.Module):
    r"""Embedding of one number per sample, (B,) -> (B, dim): [v, cos(f_k v), sin(f_k v)], Linear, SiLU, Linear.

    f_k = 2^k pi / period for k = 0..4, so derivatives are at most 16 pi / period: methods that differentiate the network
    with respect to time need small ones (Lu & Song 2024, https://arxiv.org/abs/2410.11081, section 4.1).

    Args:
        dim: number of features.
        period: range of v within which values are distinguished.
        zero: initialise the last layer to zero.
    """

    def __init__(self, dim: int, period: float = 1.0, zero: bool = False):
        super().__init__()
        self.frequencies = [math.pi * 2.0**k / period for k in range(5)]
        self.inner = nn.Linear(2 * len(self.frequencies) + 1, dim)
        self.outer = nn.Linear(dim, dim)
        if zero:
            nn.init.zeros_(self.outer.weight)
            nn.init.zeros_(self.outer.bias)

    def forward(self, v: Tensor) -> Tensor:
        angles = v[:, None] * torch.tensor(self.frequencies, dtype=v.dtype, device=v.device)
        features = torch.cat([v[:, None], angles.cos(), angles.sin()], dim=1)
        return self.outer(F.silu(self.inner(features.to(self.inner.weight.dtype))))


class ConditionEmbedding(nn.Module):
    r"""c = e_t(t) + e_label + e_w(w) + e_gap(t - s), (B, dim).

    e_w exists for `guided`, e_gap for `flow_map`; both are zero at initialisation.
    """

    def __init__(self, dim: int, classes: int, guided: bool, flow_map: bool, period: float = 1.0):
        super().__init__()
        self.classes = classes
        self.time = ScalarEmbedding(dim, period)
        self.label = nn.Embedding(classes + 1, dim) if classes else None
        self.guidance = ScalarEmbedding(dim, period=16.0, zero=True) if guided else None
        self.gap = ScalarEmbedding(dim, period, zero=True) if flow_map else None

    def forward(self, t: Tensor, label: Tensor | None, w: Tensor | float | None, s: Tensor | None) -> Tensor:
        c = self.time(t)
        if self.label is not None:
            c = c + self.label(null_index(label, self.classes, t))
        extra = extra_inputs(self.guidance, self.gap, t, w, s)
        return c if extra is None else c + extra


def null_index(label: Tensor | None, null: int, like: Tensor) -> Tensor:
    """Row of the embedding table for each label, int64 (B,): `null`, the row of "no class", for -1 and None."""
    if label is None:
        return torch.full_like(like, null, dtype=torch.long)
    return torch.where(label < 0, null, label)


def extra_inputs(guidance: ScalarEmbedding | None, gap: ScalarEmbedding | None, t: Tensor, w, s) -> Tensor | None:
    """e_w(w) + e_gap(t - s) (B, dim); None if both are absent."""
    embeddings = []
    if guidance is not None and w is not None:
        embeddings.append(guidance(torch.as_tensor(w, dtype=t.dtype, device=t.device).expand(t.shape)))
    if gap is not None and s is not None:
        embeddings.append(gap(t - s))
    return sum(embeddings) if embeddings else None


class MLP(Network):
    r"""Residual MLP for vectors, (B, dim) -> (B, dim), with the condition c in every layer:

    h <- h + W_2 silu((1 + a) W_1 silu(h) + b) with (a, b) linear in silu(c).

    Args:
        dim: size of x.
        width, depth: hidden features, and number of residual layers.
        classes: number of classes, 0 for unconditional.
        guided, flow_map: add the inputs `w` and `s`.
        period: of the time embedding; 8 for sCM, which diverges with the steeper embeddings of smaller periods.

    Examples:
        >>> net = MLP(dim=2, width=8, classes=3)
        >>> net(torch.randn(4, 2), torch.rand(4), label=torch.tensor([0, 1, 2, -1])).shape
        torch.Size([4, 2])
    """

    def __init__(
        self,
        dim: int = 2,
        width: int = 128,
        depth: int = 3,
        classes: int = 0,
        guided: bool = False,
        flow_map: bool = False,
        period: float = 1.0,
    ):
        super().__init__()
        self.shape, self.classes, self.guided, self.flow_map = (dim,), classes, guided, flow_map
        self.condition = ConditionEmbedding(width, classes, guided, flow_map, period)
        self.enter = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "first": nn.Linear(width, width),
                    "scale_shift": nn.Linear(width, 2 * width),
                    "second": nn.Linear(width, width),
                }
            )
            for _ in range(depth)
        )
        self.leave = nn.Linear(width, dim)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        w: Tensor | float | None = None,
        s: Tensor | None = None,
    ) -> Tensor:
        c = F.silu(self.condition(t, label, w, s))
        h = self.enter(x)
        for block in self.blocks:
            scale, shift = block["scale_shift"](c).chunk(2, dim=1)
            h = h + block["second"](F.silu(block["first"](F.silu(h)) * (1 + scale) + shift))
        return self.leave(F.silu(h))


class Block(nn.Module):
    r"""adaLN-zero block: h <- h + g_1 attention(m_1(h)), then h <- h + g_2 mlp(m_2(h)); gates are zero at initialisation."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = _zero(nn.Linear(width, 6 * width))

    def attention(self, h: Tensor) -> Tensor:
        """softmax(Q K^T / sqrt(d)) V, written out: fused kernels have no forward-mode derivative."""
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
        return self.merge((weights @ v).transpose(1, 2).flatten(2))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        a1, b1, g1, a2, b2, g2 = self.modulation(c)[:, None].chunk(6, dim=-1)
        h = h + g1 * self.attention(_modulate(h, a1, b1))
        return h + g2 * self.mlp(_modulate(h, a2, b2))


class Transformer(Network):
    r"""Small diffusion transformer for images, (B, C, H, W) -> (B, C, H, W) with H = W = size (Peebles & Xie 2023,
    https://arxiv.org/abs/2212.09748).

    Args:
        size, channels: images are (channels, size, size).
        patch: side of a patch in pixels.
        width, depth, heads: features of a token, number of adaLN-zero blocks, attention heads.
        classes, guided, flow_map, period: as for `MLP`.

    Raises:
        BadInput: if `size` is not a multiple of `patch`, or `width` not a multiple of `heads`.

    Examples:
        >>> net = Transformer(size=8, channels=1, patch=2, width=16, depth=1, heads=2)
        >>> net(torch.randn(4, 1, 8, 8), torch.rand(4)).shape
        torch.Size([4, 1, 8, 8])
    """

    def __init__(
        self,
        size: int = 8,
        channels: int = 1,
        patch: int = 2,
        width: int = 64,
        depth: int = 3,
        heads: int = 4,
        classes: int = 0,
        guided: bool = False,
        flow_map: bool = False,
        period: float = 1.0,
    ):
        super().__init__()
        if size % patch or width % heads:
            raise BadInput(
                f"Transformer: size={size} must be a multiple of patch={patch}, and width={width} of heads={heads}."
            )
        self.shape, self.patch = (channels, size, size), patch
        self.classes, self.guided, self.flow_map = classes, guided, flow_map
        self.condition = ConditionEmbedding(width, classes, guided, flow_map, period)
        self.enter = nn.Linear(channels * patch**2, width)
        self.position = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.modulation = _zero(nn.Linear(width, 2 * width))
        self.leave = _zero(nn.Linear(width, channels * patch**2))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        w: Tensor | float | None = None,
        s: Tensor | None = None,
    ) -> Tensor:
        c = F.silu(self.condition(t, label, w, s))
        h = self.enter(F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)) + self.position
        for block in self.blocks:
            h = block(h, c)
        scale, shift = self.modulation(c)[:, None].chunk(2, dim=-1)
        out = self.leave(_modulate(h, scale, shift))
        return F.fold(out.transpose(1, 2), x.shape[-2:], self.patch, stride=self.patch)


def _modulate(h: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift


def _zero(layer: nn.Linear) -> nn.Linear:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
