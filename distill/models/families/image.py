"""Text-to-image families, one class per stock network; x is (B, C, H, W)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from distill.errors import BadInput
from distill.models.diffusers.network import TensorConditioned, encode_masked_text


class TextUNet(TensorConditioned):
    r"""Stock `UNet2DConditionModel`: Stable Diffusion 1 and 2. Conditions: text; for XL also pooled, optionally size.

    `size` (B, 6) is (height, width, top, left, target height, target width) in pixels; by default that of x, uncropped.
    """

    part, optional_conditions = "unet", ()
    lora_layout, original_file = "kohya", True

    @staticmethod
    def check_supported(model: Any) -> None:
        stock = model.config
        if stock.addition_embed_type not in (None, "text_time") or stock.class_embed_type or stock.encoder_hid_dim_type:
            raise BadInput(
                f"UNet2DConditionModel with addition_embed_type={stock.addition_embed_type!r}, class_embed_type="
                f"{stock.class_embed_type!r}, encoder_hid_dim_type={stock.encoder_hid_dim_type!r}: only conditioning as in "
                "Stable Diffusion 1, 2 and XL is supported."
            )
        if stock.in_channels != stock.out_channels:
            raise BadInput(
                f"UNet2DConditionModel from {stock.in_channels} to {stock.out_channels} channels reads an image beside the "
                "latents, which is not supported; load a text-to-image model."
            )

    def configure(self, model: Any) -> None:
        if model.config.addition_embed_type:
            self.conditions, self.optional_conditions = ("text", "pooled"), ("size",)

    @staticmethod
    def embeddings(model: Any) -> list[nn.Module]:
        return [model.time_embedding]

    def call_stock(
        self, x: Tensor, n: Tensor, text: Tensor, pooled: Tensor | None = None, size: Tensor | None = None
    ) -> Tensor:
        added = None
        if pooled is not None:
            added = {"text_embeds": pooled, "time_ids": self.sizes(x) if size is None else size}
        return self.stock(x, n, encoder_hidden_states=text, added_cond_kwargs=added).sample

    def sizes(self, x: Tensor) -> Tensor:
        """`size` (B, 6) of an image of the size of x that was not cropped."""
        height, width = (self.pixels * side for side in x.shape[2:])
        return x.new_tensor([height, width, 0, 0, height, width]).expand(len(x), -1)

    @staticmethod
    def encode_prompt(encode: Callable[..., Any], prompts: list[str], pipeline: Any) -> dict[str, Tensor]:
        out = encode(prompt=prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
        return {"text": out[0]} if len(out) == 2 else {"text": out[0], "pooled": out[2]}


class PixArt(TensorConditioned):
    r"""Stock `PixArtTransformer2DModel`: PixArt-alpha and -sigma. Conditions: text, text_mask; a variance is dropped.

    PixArt-alpha at 1024 has the optional conditions `resolution` (B, 2), (height, width) in pixels, and `aspect` (B, 1),
    height / width; by default those of x.
    """

    conditions, optional_conditions = ("text", "text_mask"), ()
    encode_prompt = staticmethod(encode_masked_text)

    def configure(self, model: Any) -> None:
        if model.use_additional_conditions:
            self.optional_conditions = ("resolution", "aspect")

    @staticmethod
    def embeddings(model: Any) -> list[nn.Module]:
        return [model.adaln_single.emb.timestep_embedder]

    def call_stock(
        self,
        x: Tensor,
        n: Tensor,
        text: Tensor,
        text_mask: Tensor,
        resolution: Tensor | None = None,
        aspect: Tensor | None = None,
    ) -> Tensor:
        added = {"resolution": None, "aspect_ratio": None}
        if self.optional_conditions:
            height, width = x.shape[2:]
            own_size = x.new_tensor([self.pixels * height, self.pixels * width]).expand(len(x), -1)
            ratio = x.new_tensor([height / width]).expand(len(x), -1)
            added = {
                "resolution": own_size if resolution is None else resolution,
                "aspect_ratio": ratio if aspect is None else aspect,
            }
        return self.stock(
            x, encoder_hidden_states=text, encoder_attention_mask=text_mask, timestep=n, added_cond_kwargs=added
        ).sample[:, : x.shape[1]]


class SD3(TensorConditioned):
    """Stock `SD3Transformer2DModel`: Stable Diffusion 3 and 3.5. Conditions: text, pooled."""

    conditions = ("text", "pooled")

    @staticmethod
    def embeddings(model: Any) -> list[nn.Module]:
        return [model.time_text_embed.timestep_embedder]

    def call_stock(self, x: Tensor, n: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
        return self.stock(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=n).sample

    @staticmethod
    def encode_prompt(encode: Callable[..., Any], prompts: list[str], pipeline: Any) -> dict[str, Tensor]:
        out = encode(prompt=prompts, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False)
        return {"text": out[0], "pooled": out[2]}


class Flux(TensorConditioned):
    r"""Stock `FluxTransformer2DModel`: FLUX.1. Conditions: text, pooled. x is (B, C, H, W) with even H and W.

    `guide` (B,) is the guidance input of FLUX.1-dev, `guidance_scale` of diffusers; the default is 3.5. It differs from
    the w of `Guided`, which is `true_cfg_scale` of diffusers.
    """

    conditions = ("text", "pooled")
    default_guide, patch = 3.5, 2
    even_sigmas, call_guides = True, False

    @staticmethod
    def check_supported(model: Any) -> None:
        stock = model.config
        if stock.out_channels not in (None, stock.in_channels):
            raise BadInput(
                f"FluxTransformer2DModel from {stock.in_channels} to {stock.out_channels} channels reads an image beside "
                "the latents, which is not supported; load FLUX.1-dev or -schnell."
            )

    def configure(self, model: Any) -> None:
        if model.config.guidance_embeds:
            self.optional_conditions = ("guide",)

    @staticmethod
    def default_shape(config: Any) -> tuple[int, ...]:
        return config.in_channels // 4, 128, 128

    @staticmethod
    def token_count(size: tuple[int, ...]) -> int:
        return (size[0] // 2) * (size[1] // 2)

    @staticmethod
    def pack(x: Tensor) -> Tensor:
        """2 x 2 patches as tokens (B, H/2 W/2, 4 C), with the channel first."""
        batch, channels, height, width = x.shape
        tokens = x.reshape(batch, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
        return tokens.flatten(3).flatten(1, 2)

    @staticmethod
    def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
        batch, channels, height, width = shape
        patches = packed.reshape(batch, height // 2, width // 2, channels, 2, 2)
        return patches.permute(0, 3, 1, 4, 2, 5).reshape(shape)

    @staticmethod
    def embeddings(model: Any) -> list[nn.Module]:
        return [model.time_text_embed.timestep_embedder]

    def call_stock(self, x: Tensor, n: Tensor, text: Tensor, pooled: Tensor, guide: Tensor | None = None) -> Tensor:
        height, width = x.shape[2:]
        if height % 2 or width % 2:
            raise BadInput(f"FLUX needs latents of even height and width, not {height} x {width}: crop or pad them.")
        rows, columns = height // 2, width // 2
        positions = torch.zeros(rows, columns, 3, device=x.device)
        positions[..., 1] = torch.arange(rows, device=x.device)[:, None]
        positions[..., 2] = torch.arange(columns, device=x.device)
        if self.optional_conditions and guide is None:
            guide = x.new_full((len(x),), self.default_guide)
        out = self.stock(
            self.pack(x),
            timestep=n.to(x.dtype) / self.timesteps,  # rounded as by the stock pipeline
            guidance=guide,
            pooled_projections=pooled,
            encoder_hidden_states=text,
            img_ids=positions.flatten(0, 1),
            txt_ids=positions.new_zeros(text.shape[1], 3),
        ).sample
        return self.unpack(out, x.shape)

    @staticmethod
    def encode_prompt(encode: Callable[..., Any], prompts: list[str], pipeline: Any) -> dict[str, Tensor]:
        out = encode(prompt=prompts)
        return {"text": out[0], "pooled": out[1]}


class Sana(TensorConditioned):
    """Stock `SanaTransformer2DModel`: Sana. Conditions: text, text_mask."""

    conditions = ("text", "text_mask")
    pixels = 32

    @staticmethod
    def check_supported(model: Any) -> None:
        if model.config.guidance_embeds:
            raise BadInput(
                "SanaTransformer2DModel with embedded guidance (Sana-Sprint) is a distilled model under TrigFlow and not "
                "supported as a teacher: load Sana instead."
            )

    @staticmethod
    def embeddings(model: Any) -> list[nn.Module]:
        return [model.time_embed.emb.timestep_embedder]

    def call_stock(self, x: Tensor, n: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
        return self.stock(
            x,
            encoder_hidden_states=text,
            encoder_attention_mask=text_mask,
            timestep=n * self.stock.config.timestep_scale,
        ).sample[:, : x.shape[1]]

    @staticmethod
    def encode_prompt(encode: Callable[..., Any], prompts: list[str], pipeline: Any) -> dict[str, Tensor]:
        plain = (
            {"complex_human_instruction": None} if prompts == [""] else {}
        )  # as the stock pipeline does for the negative prompt
        out = encode(prompt=prompts, do_classifier_free_guidance=False, **plain)
        return {"text": out[0], "text_mask": out[1]}
