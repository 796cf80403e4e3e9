"""DiT: transformers of latents or pixels, conditioned on class labels."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import Tensor, nn

from distill.errors import BadInput
from distill.models.diffusers.network import StockNetwork
from distill.models.families.family import Family
from distill.models.small import null_index


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
            FAMILY,
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
            FAMILY,
            model,
            guided=guided,
            flow_map=flow_map,
            timesteps=timesteps,
            math_attention=math_attention,
            classes=model.config.num_embeds_ada_norm,
        )
        return net

    def _attach(self, family: Family, model: Any, **options: Any) -> None:
        super()._attach(family, model, **options)
        for block in model.transformer_blocks:
            block.norm1.emb.class_embedder.dropout_prob = 0.0

    def class_rows(self, label: Tensor | None, t: Tensor) -> Tensor:
        return null_index(label, max(self.classes, 1), t)


def build_pipeline(network: Any, scheduler: Any, vae: Any, classes: int) -> Any:
    """The stock pipeline of an exported student."""
    return diffusers.DiTPipeline(network, vae, scheduler, {i: str(i) for i in range(classes)})


FAMILY = Family(
    network="DiTTransformer2DModel",
    adapter=DiT,
    embeddings=("transformer_blocks.*.norm1.emb.timestep_embedder",),
    pixels=1,
    conditions=(),
    label_pipeline="DiTPipeline",
    build_pipeline=build_pipeline,
    needs_classes=True,
)
