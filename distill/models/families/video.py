"""Text-to-video and image-to-video families; x is (B, C, F, H, W)."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Generator, Tensor, nn
from torch.nn import functional

from distill.errors import BadInput
from distill.models.diffusers.network import TensorConditioned, encode_masked_text, encode_text


class Wan(TensorConditioned):
    r"""Stock `WanTransformer3DModel`: Wan 2.1. Conditions: text; for image to video also image, clip.

    `image` (B, 4 + C, F, H, W) are the extra input channels of the stock pipeline: a mask of the given frames, and the
    latents of a video that is grey after the first frame. `clip` (B, N, D) are image-encoder features of the first frame.
    """

    frame_parts, frame_conditions = ("vae", "image_encoder", "image_processor"), ("image", "clip")
    frames, lora_layout = 4, "wan"
    encode_prompt = staticmethod(encode_text)

    @staticmethod
    def check_supported(model: Any) -> None:
        stock = model.config
        text_to_video = stock.image_dim is None and stock.in_channels == stock.out_channels
        image_to_video = stock.image_dim is not None and stock.in_channels == 2 * stock.out_channels + 4
        if not (text_to_video or image_to_video) or stock.get("pos_embed_seq_len"):
            raise BadInput(
                f"WanTransformer3DModel from {stock.in_channels} to {stock.out_channels} channels, image_dim="
                f"{stock.image_dim}: only Wan 2.1's text to video and image to video are supported."
            )

    def configure(self, model: Any) -> None:
        if model.config.image_dim is not None:
            self.conditions, self.null_keeps = ("text", *self.frame_conditions), self.frame_conditions

    @staticmethod
    def default_shape(config: Any) -> tuple[int, ...]:
        return config.out_channels, 21, 60, 104

    @staticmethod
    def embeddings(model: Any) -> list[nn.Module]:
        return [model.condition_embedder.time_embedder]

    def call_stock(
        self, x: Tensor, n: Tensor, text: Tensor, image: Tensor | None = None, clip: Tensor | None = None
    ) -> Tensor:
        x = x if image is None else torch.cat([x, image], 1)
        return self.stock(x, timestep=n, encoder_hidden_states=text, encoder_hidden_states_image=clip).sample

    @staticmethod
    def encode_frame(
        pipeline: Any, image: Any, pixels: Tensor, frames: int, generator: Generator | None
    ) -> dict[str, Tensor]:
        _, channels = pipeline.prepare_latents(
            pixels, 1, pipeline.vae.config.z_dim, *pixels.shape[2:], frames, pixels.dtype, pixels.device, latents=pixels
        )
        return {"image": channels, "clip": pipeline.encode_image(image, pixels.device)}


class CogVideoX(TensorConditioned):
    r"""Stock `CogVideoXTransformer3DModel`: CogVideoX. Conditions: text; for image to video also image.

    The stock network has frames before channels. `image` (B, C, 1, H, W) are the latents of the first frame; they are
    padded with zeros to the frames of x and concatenated with x.
    """

    frame_parts, frame_config_parts, frame_conditions = ("vae",), ("transformer",), ("image",)
    frames = 4
    offset = 2.0  # the input `ofs` of the image-to-video model 1.5
    encode_prompt = staticmethod(encode_text)

    @staticmethod
    def check_supported(model: Any) -> None:
        stock = model.config
        if stock.in_channels not in (stock.out_channels, 2 * stock.out_channels):
            raise BadInput(
                f"CogVideoXTransformer3DModel from {stock.in_channels} to {stock.out_channels} channels: only text "
                "to video and image to video are supported."
            )

    def configure(self, model: Any) -> None:
        if model.config.in_channels != model.config.out_channels:
            self.conditions, self.null_keeps = ("text", *self.frame_conditions), self.frame_conditions

    @staticmethod
    def pack(x: Tensor) -> Tensor:
        """Frames before channels, (B, F, C, H, W)."""
        return x.transpose(1, 2)

    @staticmethod
    def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
        return packed.transpose(1, 2)

    @staticmethod
    def default_shape(config: Any) -> tuple[int, ...]:
        frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
        return config.out_channels, frames, config.sample_height, config.sample_width

    @staticmethod
    def embeddings(model: Any) -> list[nn.Module]:
        return [model.time_embedding]

    def call_stock(self, x: Tensor, n: Tensor, text: Tensor, image: Tensor | None = None) -> Tensor:
        shape = x.shape
        rotary = self.rotary(x) if self.stock.config.use_rotary_positional_embeddings else None
        offset = x.new_full((1,), self.offset) if self.stock.config.ofs_embed_dim else None
        if image is not None:
            x = torch.cat([x, functional.pad(image, (0, 0, 0, 0, 0, x.shape[2] - image.shape[2]))], 1)
        out = self.stock(
            self.pack(x), encoder_hidden_states=text, timestep=n, ofs=offset, image_rotary_emb=rotary
        ).sample
        return self.unpack(out, shape)

    def rotary(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The rotary angles (cos, sin) of every token: scaled to the training size (1.0), or by position (1.5)."""
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        stock, (frames, height, width) = self.stock.config, x.shape[2:]
        patch, span = stock.patch_size, stock.patch_size_t
        grid, base = (height // patch, width // patch), (stock.sample_height // patch, stock.sample_width // patch)
        if span is None:
            return get_3d_rotary_pos_embed(
                embed_dim=stock.attention_head_dim,
                grid_size=grid,
                temporal_size=frames,
                device=x.device,
                crops_coords=get_resize_crop_region_for_grid(grid, base[1], base[0]),
            )
        return get_3d_rotary_pos_embed(
            embed_dim=stock.attention_head_dim,
            crops_coords=None,
            grid_size=grid,
            grid_type="slice",
            max_size=base,
            temporal_size=(frames + span - 1) // span,
            device=x.device,
        )

    @staticmethod
    def encode_frame(
        pipeline: Any, image: Any, pixels: Tensor, frames: int, generator: Generator | None
    ) -> dict[str, Tensor]:
        _, channels = pipeline.prepare_latents(
            pixels,
            1,
            pipeline.vae.config.latent_channels,
            frames,
            *pixels.shape[2:],
            pixels.dtype,
            pixels.device,
            generator,
            latents=pixels,
        )
        return {"image": channels[:, :1].transpose(1, 2)}


class LTX(TensorConditioned):
    r"""Stock `LTXVideoTransformer3DModel`: LTX-Video, text to video. Conditions: text, text_mask.

    `rate` (B,) is the number of frames per second, equal for all samples of a batch; the default is 25.
    """

    conditions, optional_conditions, pixels = ("text", "text_mask"), ("rate",), 32
    frames, default_rate = 8, 25.0
    even_sigmas = True
    encode_prompt = staticmethod(encode_masked_text)

    @staticmethod
    def check_supported(model: Any) -> None:
        if (model.config.patch_size, model.config.patch_size_t) != (1, 1):
            raise BadInput("LTXVideoTransformer3DModel with patches of more than one latent is not supported.")

    @staticmethod
    def pack(x: Tensor) -> Tensor:
        """One token a latent position, (B, F H W, C)."""
        return x.flatten(2).transpose(1, 2)

    @staticmethod
    def unpack(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
        return packed.transpose(1, 2).reshape(shape)

    @staticmethod
    def default_shape(config: Any) -> tuple[int, ...]:
        return config.in_channels, 21, 16, 22

    @staticmethod
    def embeddings(model: Any) -> list[nn.Module]:
        return [model.time_embed.emb.timestep_embedder]

    def call_stock(self, x: Tensor, n: Tensor, text: Tensor, text_mask: Tensor, rate: Tensor | None = None) -> Tensor:
        frames, height, width = x.shape[2:]
        rate = self.default_rate if rate is None else float(rate[0])
        out = self.stock(
            self.pack(x),
            encoder_hidden_states=text,
            encoder_attention_mask=text_mask,
            timestep=n,
            num_frames=frames,
            height=height,
            width=width,
            rope_interpolation_scale=(self.frames / rate, self.pixels, self.pixels),
        ).sample
        return self.unpack(out, x.shape)
