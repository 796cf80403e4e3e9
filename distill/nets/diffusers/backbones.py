"""Stock denoising networks under our call convention, `net(x, t, label=None, w=None, s=None)` (see `nets.small`)."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import diffusers
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn

from distill.denoise import Network
from distill.errors import BadInput
from distill.nets.small import Scalar, extra_inputs, null_index
from distill.place import copy_of, shared_copies


class MathAttention(AttnProcessor):
    """softmax(Q K^T) V written out: the fused kernels have no forward-mode derivative (torch.func.jvp)."""

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        out = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        return out.clone(memory_format=torch.contiguous_format)  # the next group norm views the tangent


class Stock(Network):
    r"""A stock network that is told an integer timestep and a class row.

    It is asked at n = t N - 1, N = `timesteps`; n need not be whole. The embeddings of w and of t - s start at zero and
    are added to the output of every time embedding, so that a fixed w folds into their biases exactly (`fold`).

    A subclass names the `part` of a pipeline that it is, and says where its time embeddings are (`embeddings`).
    """

    @staticmethod
    def embeddings(model: Any) -> list[nn.Module]:
        """The `TimestepEmbedding` modules of the stock network."""
        raise NotImplementedError

    def _adopt(self, model, classes: int, null_class: bool, guided: bool, flow_map: bool, timesteps: int,
               math_attention: bool) -> None:
        size = model.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        setattr(self, self.part, model)
        self.timesteps, self.guided, self.flow_map = timesteps, guided, flow_map
        self.shape, self.classes, self.null_class = (model.config.in_channels, height, width), classes, null_class
        dim = self.embeddings(model)[0].linear_2.out_features
        self.guidance = Scalar(dim, period=16.0, zero=True) if guided else None
        self.gap = Scalar(dim, zero=True) if flow_map else None
        for module in model.modules() if math_attention else ():
            if isinstance(module, Attention):
                module.set_processor(MathAttention())

    @property
    def stock(self) -> Any:
        """The network itself, a class of diffusers."""
        return getattr(self, self.part)

    def call(self, x: Tensor, n: Tensor, label: Tensor | None) -> Tensor:
        """The stock network's answer at timesteps n (B,); of one that predicts a variance too, the mean."""
        return self.stock(x, n, self.rows(label, n)).sample[:, : x.shape[1]]

    def timestep(self, t: Tensor) -> Tensor:
        """What the stock network is told for our t, (B,)."""
        return t * self.timesteps - 1

    def forward(self, x: Tensor, t: Tensor, label: Tensor | None = None,
                w: Tensor | float | None = None, s: Tensor | None = None) -> Tensor:
        n = self.timestep(t)
        extra = extra_inputs(self.guidance, self.gap, t, w, s)
        if extra is None:
            return self.call(x, n, label)
        with ExitStack() as hooks:  # that live for one call: the module keeps no reference to itself, so it copies
            for module in self.embeddings(self.stock):
                hooks.callback(module.register_forward_hook(lambda module, args, out: out + extra.to(out.dtype)).remove)
            return self.call(x, n, label)

    def rows(self, label: Tensor | None, t: Tensor) -> Tensor | None:
        """Row of the class embedding for each label, (B,), or None for an unconditional network."""
        if not self.classes:
            return None
        if not self.null_class and (label is None or not label.is_meta and bool((label < 0).any())):
            raise BadInput(f"label -1 (no class) reached a {type(self.stock).__name__} without such a class: "
                           "label every sample.")
        return null_index(label, self.classes, t)

    @torch.no_grad()
    def fold(self, w: float | None = None, gap: float | None = None) -> Any:
        r"""The stock network, always told the same w and the same t - s = gap; it shares the memory of the other weights.

        b <- b + e_w(w) + e_gap(gap) for the bias b of each time embedding's `linear_2`, to whose output both are added:
        exact.

        Raises:
            BadInput: if w or gap is missing for a net that has this input, or given for one that has not.
        """
        for name, value, has in (("w", w, self.guided), ("gap", gap, self.flow_map)):
            if (value is not None) != has:
                raise BadInput(f"The network {'needs a fixed' if has else 'has no input'} {name}: "
                               f"{'give it to be folded in' if has else 'leave it out'}.")
        with shared_copies():
            model = copy_of(self.stock)
        t = torch.tensor([gap or 0.0], device=next(self.parameters()).device)
        extra = extra_inputs(self.guidance, self.gap, t, w, torch.zeros_like(t))
        for module in self.embeddings(model) if extra is not None else ():
            module.linear_2.bias = nn.Parameter(module.linear_2.bias + extra[0])
        return model


class UNet2D(Stock):
    r"""Stock `UNet2DModel`. Class `classes`, the last row of the class embedding, is "no class" (label -1).

    Args:
        size, channels: images are (channels, size, size).
        widths, attention: channels of each resolution, coarser by 2 each, and whether it has self-attention.
        layers: residual blocks a resolution.
        classes: number of classes, 0 for unconditional.
        groups: groups of the group norms and channels of an attention head; divides every width.
        guided, flow_map: whether the net is told w and s.
        timesteps: N of the Table that it is used with.
        math_attention: attention that `torch.func.jvp` can differentiate.

    Raises:
        BadInput: if widths and attention differ in length, or groups does not divide a width.
    """

    part = "unet"

    def __init__(self, size: int = 16, channels: int = 1, widths: tuple[int, ...] = (32, 48),
                 attention: tuple[bool, ...] = (False, True), layers: int = 1, classes: int = 0, groups: int = 8,
                 guided: bool = False, flow_map: bool = False, timesteps: int = 1000, math_attention: bool = False):
        super().__init__()
        if len(widths) != len(attention) or any(width % groups for width in widths):
            raise BadInput(
                f"UNet2D: widths={list(widths)} and attention={list(attention)} must be equally long, "
                f"and groups={groups} must divide every width."
            )
        unet = diffusers.UNet2DModel(
            sample_size=size, in_channels=channels, out_channels=channels, block_out_channels=tuple(widths),
            down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attention],
            up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)],
            layers_per_block=layers, norm_num_groups=groups, attention_head_dim=groups,
            add_attention=any(attention), num_class_embeds=classes + 1 if classes else None,
        )
        self._adopt(unet, classes, classes > 0, guided, flow_map, timesteps, math_attention)

    @classmethod
    def wrap(cls, unet: diffusers.UNet2DModel, guided: bool = False, flow_map: bool = False, timesteps: int = 1000,
             null_class: bool = True, math_attention: bool = False) -> UNet2D:
        """Take an existing `UNet2DModel` as it is. `null_class`: its last class embedding stands for "no class".

        One that predicts a variance too, in as many channels again after the mean, is ADM's
        (Dhariwal & Nichol 2021, https://arxiv.org/abs/2105.05233): the mean is kept.

        Raises:
            BadInput: for a network that is conditioned on other things than timestep and class number, or does not
                predict a sample, with or without its variance.
        """
        stock = unet.config
        if stock.out_channels not in (stock.in_channels, 2 * stock.in_channels):
            raise BadInput(f"UNet2DModel from {stock.in_channels} to {stock.out_channels} channels: only a prediction of the "
                           "sample's own channels is read, alone or with as many of a variance.")
        if stock.time_embedding_type != "positional" or stock.class_embed_type is not None:
            raise BadInput(
                f"UNet2DModel with time_embedding_type={stock.time_embedding_type!r} and class_embed_type="
                f"{stock.class_embed_type!r}: only positional timesteps and numbered classes are read."
            )
        net, rows = cls.__new__(cls), stock.num_class_embeds or 0
        nn.Module.__init__(net)
        null_class = null_class and rows > 0
        net._adopt(unet, rows - null_class, null_class, guided, flow_map, timesteps, math_attention)
        return net

    @torch.no_grad()
    def fold(self, w: float | None = None, gap: float | None = None) -> Any:
        """As every stock network's; a variance, which no sampler of a few steps asks, is left behind."""
        model, channels = super().fold(w, gap), self.stock.config.in_channels
        if model.config.out_channels != channels:
            last, model.conv_out = model.conv_out, copy_of(model.conv_out)
            model.conv_out.weight, model.conv_out.bias = (nn.Parameter(p[:channels]) for p in (last.weight, last.bias))
            model.conv_out.out_channels = channels
            model.register_to_config(out_channels=channels)
        return model

    @staticmethod
    def embeddings(model) -> list[nn.Module]:
        return [model.time_embedding]


class DiT(Stock):
    r"""Stock `DiTTransformer2DModel` (Peebles & Xie 2023, https://arxiv.org/abs/2212.09748), adaLN-zero at the start.

    Row `classes` of its class embeddings is "no class". The random dropping of labels that the stock class does in
    train mode is off: `methods.Diffusion` drops them. Of a network that predicts a variance too, the mean is kept.

    Args:
        size, channels: images are (channels, size, size).
        patch: side of a patch; divides size.
        width, depth, heads: features of a token, blocks, attention heads.
        classes: number of classes, 0 for unconditional.
        guided, flow_map, timesteps, math_attention: as for `UNet2D`.

    Raises:
        BadInput: if `size` is no multiple of `patch`, or `width` none of `heads`.
    """

    part = "transformer"

    def __init__(self, size: int = 8, channels: int = 1, patch: int = 2, width: int = 64, depth: int = 3,
                 heads: int = 4, classes: int = 0, guided: bool = False, flow_map: bool = False,
                 timesteps: int = 1000, math_attention: bool = False):
        super().__init__()
        if size % patch or width % heads:
            raise BadInput(f"DiT: size={size} must be a multiple of patch={patch}, and width={width} of heads={heads}.")
        model = diffusers.DiTTransformer2DModel(
            num_attention_heads=heads, attention_head_dim=width // heads, in_channels=channels, out_channels=channels,
            num_layers=depth, sample_size=size, patch_size=patch, num_embeds_ada_norm=max(classes, 1),
        )
        for layer in (model.proj_out_1, model.proj_out_2, *(block.norm1.linear for block in model.transformer_blocks)):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self._adopt(model, classes, True, guided, flow_map, timesteps, math_attention)

    @classmethod
    def wrap(cls, model: diffusers.DiTTransformer2DModel, guided: bool = False, flow_map: bool = False,
             timesteps: int = 1000, math_attention: bool = False) -> DiT:
        """Take an existing `DiTTransformer2DModel` as it is."""
        net = cls.__new__(cls)
        nn.Module.__init__(net)
        net._adopt(model, model.config.num_embeds_ada_norm, True, guided, flow_map, timesteps, math_attention)
        return net

    def _adopt(self, model, *args) -> None:
        super()._adopt(model, *args)
        for block in model.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0

    def rows(self, label: Tensor | None, t: Tensor) -> Tensor:
        return null_index(label, max(self.classes, 1), t)

    @staticmethod
    def embeddings(model) -> list[nn.Module]:
        return [block.norm1.emb.timestep_embedder for block in model.transformer_blocks]
