"""U-Nets of pixels or latents, unconditional or conditioned on class labels."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from distill.errors import BadInput
from distill.models.copies import copy_network
from distill.models.diffusers import tiny_parts as parts
from distill.models.diffusers.network import StockNetwork
from distill.models.families.family import Family, Twin


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
            FAMILY,
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
            FAMILY,
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


def tiny() -> Any:
    """A pixel model like ADM: it predicts the noise and, in as many further channels, the variance."""
    torch.manual_seed(2)
    network = parts.shake(
        diffusers.UNet2DModel(
            sample_size=8,
            in_channels=3,
            out_channels=6,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            layers_per_block=1,
            attention_head_dim=8,
            resnet_time_scale_shift="scale_shift",
            upsample_type="resnet",
            downsample_type="resnet",
            down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        )
    )
    return diffusers.DDPMPipeline(
        unet=network,
        scheduler=diffusers.DDPMScheduler(
            variance_type="learned_range", timestep_spacing="trailing", clip_sample=False
        ),
    )


def build_pipeline(network: Any, scheduler: Any, vae: Any, classes: int) -> Any:
    """The stock pipeline of an exported student."""
    return diffusers.ConsistencyModelPipeline(network, scheduler)


FAMILY = Family(
    network="UNet2DModel",
    adapter=UNet2D,
    part="unet",
    embeddings=("time_embedding",),
    pixels=1,
    conditions=(),
    no_guidance={},
    label_pipeline="ConsistencyModelPipeline",
    build_pipeline=build_pipeline,
    twins={"adm": Twin(tiny, shape=(3, 8, 8), parity=False)},
)
