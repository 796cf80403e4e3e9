r"""The little networks of the toys and the tests: plain torch, one call convention, forward-mode AD everywhere.

Every network of the project is called `net(x, t, label=None, w=None, s=None)`:

- `x`: (B, *shape) noisy input; the output has the same shape;
- `t`: (B,) float time in [0, 1], data at 0;
- `label`: (B,) int64, or None; -1 (and None) is "no class";
- `w`: (B,) or float guidance that the net was told to imitate (`guided=True` only), w = 1 is conditional;
- `s`: (B,) second time of a flow map, s <= t (`flow_map=True` only); the net is told `t - s`.

`w` and `s` enter through layers that start at zero: a student which takes the weights of a teacher without these
inputs answers exactly as the teacher does until its first update. What else may be asked of a network: `denoise.Network`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.denoise import Network
from distill.errors import BadInput


class Scalar(nn.Module):
    r"""Embed one number per sample: phi(v) = [v, cos(f_k v), sin(f_k v)], then two layers with SiLU between.

    f_k = 2^k pi / period for k = 0..4, so that |d phi/dv| <= 16 pi / period: methods that differentiate the network in
    time need it small (Lu & Song 2024, https://arxiv.org/abs/2410.11081, section 4.1).

    `v`: (B,) -> (B, dim). `period` is the range over which v is told apart; `zero` starts the last layer at zero.
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


class Condition(nn.Module):
    r"""c = e_t(t) + e_label + e_w(w) + e_gap(t - s), (B, dim); the last two start at zero and are absent by default."""

    def __init__(self, dim: int, classes: int, guided: bool, flow_map: bool, period: float = 1.0):
        super().__init__()
        self.classes = classes
        self.time = Scalar(dim, period)
        self.label = nn.Embedding(classes + 1, dim) if classes else None
        self.guidance = Scalar(dim, period=16.0, zero=True) if guided else None
        self.gap = Scalar(dim, period, zero=True) if flow_map else None

    def forward(self, t: Tensor, label: Tensor | None, w: Tensor | float | None, s: Tensor | None) -> Tensor:
        c = self.time(t)
        if self.label is not None:
            c = c + self.label(null_index(label, self.classes, t))
        extra = extra_inputs(self.guidance, self.gap, t, w, s)
        return c if extra is None else c + extra


def null_index(label: Tensor | None, null: int, like: Tensor) -> Tensor:
    """Row of the embedding table for each label, (B,) int64: -1 and None become `null`, the row of "no class"."""
    if label is None:
        return torch.full_like(like, null, dtype=torch.long)
    return torch.where(label < 0, null, label)


def extra_inputs(guidance: Scalar | None, gap: Scalar | None, t: Tensor, w, s) -> Tensor | None:
    """e_w(w) + e_gap(t - s), the inputs that a teacher lacks; None when the net has neither or was told neither."""
    parts = []
    if guidance is not None and w is not None:
        parts.append(guidance(torch.as_tensor(w, dtype=t.dtype, device=t.device).expand(t.shape)))
    if gap is not None and s is not None:
        parts.append(gap(t - s))
    return sum(parts) if parts else None


class MLP(Network):
    r"""Residual MLP for vectors, (B, dim) -> (B, dim), told its condition c in every layer:

    h <- h + W_2 silu((1 + a) W_1 silu(h) + b) with (a, b) linear in silu(c).

    `period` of the time features: 8 for sCM, which differentiates the network in time and diverges with narrow ones.
    """

    def __init__(self, dim: int = 2, width: int = 128, depth: int = 3, classes: int = 0,
                 guided: bool = False, flow_map: bool = False, period: float = 1.0):
        super().__init__()
        self.shape, self.classes, self.guided, self.flow_map = (dim,), classes, guided, flow_map
        self.condition = Condition(width, classes, guided, flow_map, period)
        self.enter = nn.Linear(dim, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"first": nn.Linear(width, width), "scale_shift": nn.Linear(width, 2 * width),
                           "second": nn.Linear(width, width)}) for _ in range(depth))
        self.leave = nn.Linear(width, dim)

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None,
                w: Tensor | float | None = None, s: Tensor | None = None) -> Tensor:
        c = F.silu(self.condition(t, label, w, s))
        h = self.enter(x)
        for block in self.blocks:
            scale, shift = block["scale_shift"](c).chunk(2, dim=1)
            h = h + block["second"](F.silu(block["first"](F.silu(h)) * (1 + scale) + shift))
        return self.leave(F.silu(h))


class Block(nn.Module):
    r"""adaLN-zero: h <- h + g_1 attention(m_1(h)), then h <- h + g_2 mlp(m_2(h)); all gates start at zero."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = _zero(nn.Linear(width, 6 * width))

    def attention(self, h: Tensor) -> Tensor:
        """softmax(Q K^T / sqrt(d)) V, written out because the fused kernels have no forward-mode derivative."""
        q, k, v = self.qkv(h).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(dim=-1)
        return self.merge((weights @ v).transpose(1, 2).flatten(2))

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        a1, b1, g1, a2, b2, g2 = self.modulation(c)[:, None].chunk(6, dim=-1)
        h = h + g1 * self.attention(_modulate(h, a1, b1))
        return h + g2 * self.mlp(_modulate(h, a2, b2))


class Transformer(Network):
    r"""Compact DiT for images, (B, C, H, W) -> (B, C, H, W) with H = W = size.

    Patches of `patch` by `patch` pixels, learned positions, adaLN-zero blocks (Peebles & Xie 2023,
    https://arxiv.org/abs/2212.09748).

    Raises:
        BadInput: if `size` is no multiple of `patch`, or `width` none of `heads`.
    """

    def __init__(self, size: int = 8, channels: int = 1, patch: int = 2, width: int = 64, depth: int = 3,
                 heads: int = 4, classes: int = 0, guided: bool = False, flow_map: bool = False, period: float = 1.0):
        super().__init__()
        if size % patch or width % heads:
            raise BadInput(
                f"Transformer: size={size} must be a multiple of patch={patch}, and width={width} of heads={heads}."
            )
        self.shape, self.patch = (channels, size, size), patch
        self.classes, self.guided, self.flow_map = classes, guided, flow_map
        self.condition = Condition(width, classes, guided, flow_map, period)
        self.enter = nn.Linear(channels * patch**2, width)
        self.position = nn.Parameter(0.02 * torch.randn((size // patch) ** 2, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.modulation = _zero(nn.Linear(width, 2 * width))
        self.leave = _zero(nn.Linear(width, channels * patch**2))

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None,
                w: Tensor | float | None = None, s: Tensor | None = None) -> Tensor:
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
