"""Stock networks conditioned on class labels, called as `net(x, t, label=None, w=None, s=None)` (see `models.small`)."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import diffusers
import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from distill.denoise import Network
from distill.errors import BadInput
from distill.models.copies import copy_network, share_weights
from distill.models.small import ScalarEmbedding, extra_inputs, null_index

GAP_PERIOD = 8.0  # of the embedding of t - s: flow maps are differentiated in t, so it must vary slowly
HALF = (torch.bfloat16, torch.float16)


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


class StockNetwork(Network):
    r"""A diffusers network with integer timesteps and class labels.

    The stock network gets the timestep n = t N - 1 with N = `timesteps`; n need not be an integer. The embeddings of w
    and of t - s are zero at initialisation and are added to the output of every time embedding, so that a fixed w can
    be folded exactly into their biases (`fold`).

    A subclass defines `part` and `embeddings`.

    Attributes:
        pixels: side of a latent in pixels; 1 for pixel models.
        patch: the sides of latents must be multiples of this number, if the config does not state one.
        frames: video frames per latent frame after the first, which the autoencoder's config may override; 0 for images.
        frame_conditions: names of the conditions that encode the first frame of image-to-video networks.
    """

    pixels: int = 1
    patch: int = 1
    frames: int = 0
    frame_conditions: tuple[str, ...] = ()

    @staticmethod
    def embeddings(model: Any) -> list[nn.Module]:
        """The `TimestepEmbedding` modules of the stock network."""
        raise NotImplementedError

    @staticmethod
    def default_shape(config: Any) -> tuple[int, ...]:
        """Shape of a sample for a config of the stock network."""
        size = config.sample_size
        return config.in_channels, *((size, size) if isinstance(size, int) else size)

    def _attach(
        self,
        model: Any,
        *,
        guided: bool,
        flow_map: bool,
        timesteps: int,
        math_attention: bool,
        classes: int = 0,
        null_class: bool = True,
    ) -> None:
        """Registers the stock network as the module `part`, and adds the embeddings of w and t - s."""
        self.add_module(self.part, model)
        self.timesteps, self.guided, self.flow_map = timesteps, guided, flow_map
        self.shape, self.classes, self.null_class = self.default_shape(model.config), classes, null_class
        embeddings = self.embeddings(model)
        if not embeddings and (guided or flow_map):
            raise BadInput(
                f"{type(model).__name__} has no TimestepEmbedding to add w or s to: leave guided and flow_map out."
            )
        dim = embeddings[0].linear_2.out_features if embeddings else 0
        self.guidance = ScalarEmbedding(dim, period=16.0, zero=True) if guided else None
        self.gap = ScalarEmbedding(dim, period=GAP_PERIOD, zero=True) if flow_map else None
        if math_attention:
            use_math_attention(model)

    def cast(self, dtype: torch.dtype) -> StockNetwork:
        """Its weights in `dtype`, except those that the stock class keeps in float32 when it loads in half precision."""
        kept = tuple(self.stock._keep_in_fp32_modules or ()) if dtype in HALF else ()
        for tensors in (self.named_parameters(), self.named_buffers()):
            for name, tensor in tensors:
                if tensor.is_floating_point():
                    tensor.data = tensor.data.to(torch.float32 if {*name.split(".")} & {*kept} else dtype)
        return self

    @property
    def stock(self) -> Any:
        """The diffusers network."""
        return self.get_submodule(self.part)

    def call(self, x: Tensor, n: Tensor, label: Tensor | None) -> Tensor:
        """The output of the stock network at timesteps n (B,), of the shape of x: a predicted variance is dropped."""
        return self.stock(x, n, self.class_rows(label, n)).sample[:, : x.shape[1]]

    def timestep(self, t: Tensor) -> Tensor:
        """The timestep n (B,) of the stock network for t (B,) in [0, 1]."""
        return t * self.timesteps - 1

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        label: Tensor | None = None,
        w: Tensor | float | None = None,
        s: Tensor | None = None,
    ) -> Tensor:
        n = self.timestep(t)
        extra = extra_inputs(self.guidance, self.gap, t, w, s)
        if extra is None:
            return self.call(x, n, label)
        with ExitStack() as hooks:  # permanent hooks would refer to this module, and a copy's hooks to the original
            for module in self.embeddings(self.stock):
                hooks.callback(module.register_forward_hook(lambda module, args, out: out + extra.to(out.dtype)).remove)
            return self.call(x, n, label)

    def class_rows(self, label: Tensor | None, t: Tensor) -> Tensor | None:
        """Row of the class embedding for each label (B,); None for an unconditional network."""
        if not self.classes:
            return None
        if not self.null_class and (label is None or not label.is_meta and bool((label < 0).any())):
            raise BadInput(
                f"label -1 (no class) was passed to a {type(self.stock).__name__} without such a class: label every sample."
            )
        return null_index(label, self.classes, t)

    @torch.no_grad()
    def fold(self, w: float | None = None, gap: float | None = None) -> Any:
        r"""The stock network with a constant w and a constant t - s = gap folded into its weights.

        b <- b + e_w(w) + e_gap(gap) for the bias b of `linear_2` of each time embedding, to whose output both are added:
        exact. The other weights share memory with this network.

        Raises:
            BadInput: if w or gap is missing for a network with this input, or given for one without it.
        """
        for name, value, is_input in (("w", w, self.guided), ("gap", gap, self.flow_map)):
            if is_input and value is None:
                raise BadInput(f"The network needs a fixed {name}: pass the value to fold in.")
            if value is not None and not is_input:
                raise BadInput(f"The network has no input {name}: leave it out.")
        with share_weights():
            model = copy_network(self.stock)
        t = torch.tensor([gap or 0.0], device=next(self.parameters()).device)
        extra = extra_inputs(self.guidance, self.gap, t, w, torch.zeros_like(t))
        for module in self.embeddings(model) if extra is not None else ():
            module.linear_2.bias = nn.Parameter(module.linear_2.bias + extra[0])
        return model


class UNet2D(StockNetwork):
    r"""Stock `UNet2DModel`. Row `classes` of the class embedding, the last one, is "no class" (label -1).

    Args:
        size, channels: images are (channels, size, size).
        widths: channels at each resolution; each resolution is half the previous one.
        attention: whether each resolution has self-attention.
        layers: residual blocks per resolution.
        classes: number of classes, 0 for unconditional.
        groups: groups of the group norms, and channels of an attention head; divides every width.
        guided, flow_map: add the inputs `w` and `s`.
        timesteps: N of the Table.
        math_attention: use attention that supports forward-mode differentiation.

    Raises:
        BadInput: if widths and attention differ in length, or groups does not divide a width.
    """

    part = "unet"

    def __init__(
        self,
        size: int = 16,
        channels: int = 1,
        widths: tuple[int, ...] = (32, 48),
        attention: tuple[bool, ...] = (False, True),
        layers: int = 1,
        classes: int = 0,
        groups: int = 8,
        guided: bool = False,
        flow_map: bool = False,
        timesteps: int = 1000,
        math_attention: bool = False,
    ):
        super().__init__()
        if len(widths) != len(attention) or any(width % groups for width in widths):
            raise BadInput(
                f"UNet2D: widths={list(widths)} and attention={list(attention)} must be equally long, "
                f"and groups={groups} must divide every width."
            )
        unet = diffusers.UNet2DModel(
            sample_size=size,
            in_channels=channels,
            out_channels=channels,
            block_out_channels=tuple(widths),
            down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attention],
            up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attention)],
            layers_per_block=layers,
            norm_num_groups=groups,
            attention_head_dim=groups,
            add_attention=any(attention),
            num_class_embeds=classes + 1 if classes else None,
        )
        self._attach(
            unet,
            guided=guided,
            flow_map=flow_map,
            timesteps=timesteps,
            math_attention=math_attention,
            classes=classes,
            null_class=classes > 0,
        )

    @classmethod
    def wrap(
        cls,
        unet: diffusers.UNet2DModel,
        guided: bool = False,
        flow_map: bool = False,
        timesteps: int = 1000,
        null_class: bool = True,
        math_attention: bool = False,
    ) -> UNet2D:
        """Wraps an existing `UNet2DModel`.

        Networks that also predict a variance, in as many further channels, are those of ADM (Dhariwal & Nichol 2021,
        https://arxiv.org/abs/2105.05233); the variance is dropped.

        Args:
            unet: the network.
            guided, flow_map, timesteps, math_attention: as for the constructor.
            null_class: whether the last row of the class embedding is "no class".

        Raises:
            BadInput: for other conditions than timesteps and class labels, or other output channels than the sample's,
                with or without a variance.
        """
        stock = unet.config
        if stock.out_channels not in (stock.in_channels, 2 * stock.in_channels):
            raise BadInput(
                f"UNet2DModel from {stock.in_channels} to {stock.out_channels} channels is not supported: the output must "
                "have as many channels as the sample, or twice as many with a variance."
            )
        if stock.time_embedding_type != "positional" or stock.class_embed_type is not None:
            raise BadInput(
                f"UNet2DModel with time_embedding_type={stock.time_embedding_type!r} and class_embed_type="
                f"{stock.class_embed_type!r} is not supported: only positional timesteps and class labels are."
            )
        net, rows = cls.__new__(cls), stock.num_class_embeds or 0
        nn.Module.__init__(net)
        null_class = null_class and rows > 0
        net._attach(
            unet,
            guided=guided,
            flow_map=flow_map,
            timesteps=timesteps,
            math_attention=math_attention,
            classes=rows - null_class,
            null_class=null_class,
        )
        return net

    @torch.no_grad()
    def fold(self, w: float | None = None, gap: float | None = None) -> Any:
        """As `StockNetwork.fold`; output channels of a variance are removed, because few-step samplers do not use them."""
        model, channels = super().fold(w, gap), self.stock.config.in_channels
        if model.config.out_channels != channels:
            last, model.conv_out = model.conv_out, copy_network(model.conv_out)
            model.conv_out.weight, model.conv_out.bias = (nn.Parameter(p[:channels]) for p in (last.weight, last.bias))
            model.conv_out.out_channels = channels
            model.register_to_config(out_channels=channels)
        return model

    @staticmethod
    def embeddings(model: Any) -> list[nn.Module]:
        return [model.time_embedding]


class DiT(StockNetwork):
    r"""Stock `DiTTransformer2DModel` (Peebles & Xie 2023, https://arxiv.org/abs/2212.09748) with adaLN-zero initialisation.

    Row `classes` of the class embedding is "no class". The stock network's label dropout in train mode is disabled;
    `methods.Diffusion` drops labels. A predicted variance is dropped.

    Args:
        size, channels: images are (channels, size, size).
        patch: side of a patch; divides `size`.
        width, depth, heads: features of a token, number of blocks, attention heads.
        classes: number of classes, 0 for unconditional.
        guided, flow_map, timesteps, math_attention: as for `UNet2D`.

    Raises:
        BadInput: if `size` is not a multiple of `patch`, or `width` not a multiple of `heads`.
    """

    part = "transformer"

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
        timesteps: int = 1000,
        math_attention: bool = False,
    ):
        super().__init__()
        if size % patch or width % heads:
            raise BadInput(f"DiT: size={size} must be a multiple of patch={patch}, and width={width} of heads={heads}.")
        model = diffusers.DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=width // heads,
            in_channels=channels,
            out_channels=channels,
            num_layers=depth,
            sample_size=size,
            patch_size=patch,
            num_embeds_ada_norm=max(classes, 1),
        )
        for layer in (model.proj_out_1, model.proj_out_2, *(block.norm1.linear for block in model.transformer_blocks)):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        self._attach(
            model,
            guided=guided,
            flow_map=flow_map,
            timesteps=timesteps,
            math_attention=math_attention,
            classes=classes,
        )

    @classmethod
    def wrap(
        cls,
        model: diffusers.DiTTransformer2DModel,
        guided: bool = False,
        flow_map: bool = False,
        timesteps: int = 1000,
        math_attention: bool = False,
    ) -> DiT:
        """Wraps an existing `DiTTransformer2DModel`; arguments as for the constructor."""
        net = cls.__new__(cls)
        nn.Module.__init__(net)
        net._attach(
            model,
            guided=guided,
            flow_map=flow_map,
            timesteps=timesteps,
            math_attention=math_attention,
            classes=model.config.num_embeds_ada_norm,
        )
        return net

    def _attach(self, model: Any, **options: Any) -> None:
        super()._attach(model, **options)
        for block in model.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0

    def class_rows(self, label: Tensor | None, t: Tensor) -> Tensor:
        return null_index(label, max(self.classes, 1), t)

    @staticmethod
    def embeddings(model: Any) -> list[nn.Module]:
        return [block.norm1.emb.timestep_embedder for block in model.transformer_blocks]
