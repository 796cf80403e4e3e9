"""Families that make video from text, and from a first frame: x is (B, C, F, H, W)."""

from __future__ import annotations

import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor, nn
from torch.nn import functional

from distill.errors import BadInput
from distill.nets.diffusers.conditioned import Conditioned


class Wan(Conditioned):
    r"""Stock `WanTransformer3DModel`: Wan 2.1 text to video (text), and image to video (text, image, clip).

    `image` (B, 4 + C, F, H, W) is what the stock pipeline puts beside x: which frames are given, and their latents with
    grey for the others. `clip` (B, N, D) are the image encoder's features of the first frame.
    """

    seen, framed = ("vae", "image_encoder", "image_processor"), ("image", "clip")

    @staticmethod
    def check(model) -> None:
        stock = model.config
        plain = stock.image_dim is None and stock.in_channels == stock.out_channels
        framed = stock.image_dim is not None and stock.in_channels == 2 * stock.out_channels + 4
        if not (plain or framed) or stock.get("pos_embed_seq_len"):
            raise BadInput(f"WanTransformer3DModel from {stock.in_channels} to {stock.out_channels} channels, image_dim="
                           f"{stock.image_dim}: only Wan 2.1's text to video and first frame to video are here.")

    def set_sizes(self, model) -> None:
        if model.config.image_dim is not None:
            self.told, self.kept = ("text", *self.framed), self.framed

    @staticmethod
    def default_shape(config):
        return config.out_channels, 21, 60, 104

    @staticmethod
    def embeddings(model) -> list[nn.Module]:
        return [model.condition_embedder.time_embedder]

    def ask(self, x, n, text, image=None, clip=None):
        x = x if image is None else torch.cat([x, image], 1)
        return self.stock(x, timestep=n, encoder_hidden_states=text, encoder_hidden_states_image=clip).sample

    @staticmethod
    def prompt(encode, prompts, pipeline):
        return {"text": encode(prompt=prompts, do_classifier_free_guidance=False)[0]}

    @staticmethod
    def frame(pipeline, image, pixels: Tensor, frames: int, generator) -> dict[str, Tensor]:
        _, beside = pipeline.prepare_latents(pixels, 1, pipeline.vae.config.z_dim, *pixels.shape[2:], frames,
                                             pixels.dtype, pixels.device, latents=pixels)
        return {"image": beside, "clip": pipeline.encode_image(image, pixels.device)}


class CogVideoX(Conditioned):
    r"""Stock `CogVideoXTransformer3DModel`: CogVideoX text to video (text), and image to video (text, image).

    Its frames lie before its channels. `image` (B, C, 1, H, W) are the latents of the first frame; beside the other frames
    of x lie zeros.
    """

    seen, bones_seen, framed = ("vae",), ("transformer",), ("image",)
    offset = 2.0  # what the 1.5 image model is told as `ofs`

    @staticmethod
    def check(model) -> None:
        stock = model.config
        if stock.in_channels not in (stock.out_channels, 2 * stock.out_channels):
            raise BadInput(f"CogVideoXTransformer3DModel from {stock.in_channels} to {stock.out_channels} channels: only text "
                           "to video and first frame to video are here.")

    def set_sizes(self, model) -> None:
        if model.config.in_channels != model.config.out_channels:
            self.told, self.kept = ("text", *self.framed), self.framed

    @staticmethod
    def default_shape(config):
        frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
        return config.out_channels, frames, config.sample_height, config.sample_width

    @staticmethod
    def embeddings(model) -> list[nn.Module]:
        return [model.time_embedding]

    def ask(self, x, n, text, image=None):
        rotary = self.rotary(x) if self.stock.config.use_rotary_positional_embeddings else None
        offset = x.new_full((1,), self.offset) if self.stock.config.ofs_embed_dim else None
        if image is not None:
            x = torch.cat([x, functional.pad(image, (0, 0, 0, 0, 0, x.shape[2] - image.shape[2]))], 1)
        return self.stock(x.transpose(1, 2), encoder_hidden_states=text, timestep=n, ofs=offset,
                          image_rotary_emb=rotary).sample.transpose(1, 2)

    def rotary(self, x):
        """The rotary angles (cos, sin) of every token: cropped from the training size (1.0), or counted (1.5)."""
        from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid

        stock, (frames, height, width) = self.stock.config, x.shape[2:]
        patch, span = stock.patch_size, stock.patch_size_t
        grid, base = (height // patch, width // patch), (stock.sample_height // patch, stock.sample_width // patch)
        if span is None:
            return get_3d_rotary_pos_embed(
                embed_dim=stock.attention_head_dim, grid_size=grid, temporal_size=frames, device=x.device,
                crops_coords=get_resize_crop_region_for_grid(grid, base[1], base[0]))
        return get_3d_rotary_pos_embed(
            embed_dim=stock.attention_head_dim, crops_coords=None, grid_size=grid, grid_type="slice", max_size=base,
            temporal_size=(frames + span - 1) // span, device=x.device)

    @staticmethod
    def prompt(encode, prompts, pipeline):
        return {"text": encode(prompt=prompts, do_classifier_free_guidance=False)[0]}

    @staticmethod
    def frame(pipeline, image, pixels: Tensor, frames: int, generator) -> dict[str, Tensor]:
        _, beside = pipeline.prepare_latents(pixels, 1, pipeline.vae.config.latent_channels, frames, *pixels.shape[2:],
                                             pixels.dtype, pixels.device, generator, latents=pixels)
        return {"image": beside[:, :1].transpose(1, 2)}


class LTX(Conditioned):
    r"""Stock `LTXVideoTransformer3DModel`: LTX-Video text to video (text, text_mask).

    `rate` (B,) is the frames a second, one for all of a batch; 25 without it.
    """

    told, extras, pixels = ("text", "text_mask"), ("rate",), 32
    frames, default_rate = 8, 25.0  # frames of video a latent frame

    @staticmethod
    def check(model) -> None:
        if (model.config.patch_size, model.config.patch_size_t) != (1, 1):
            raise BadInput("LTXVideoTransformer3DModel with patches of more than one latent: only patches of one are read.")

    @staticmethod
    def default_shape(config):
        return config.in_channels, 21, 16, 22

    @staticmethod
    def embeddings(model) -> list[nn.Module]:
        return [model.time_embed.emb.timestep_embedder]

    def ask(self, x, n, text, text_mask, rate=None):
        frames, height, width = x.shape[2:]
        rate = self.default_rate if rate is None else float(rate[0])
        out = self.stock(x.flatten(2).transpose(1, 2), encoder_hidden_states=text, encoder_attention_mask=text_mask,
                         timestep=n, num_frames=frames, height=height, width=width,
                         rope_interpolation_scale=(self.frames / rate, self.pixels, self.pixels)).sample
        return out.transpose(1, 2).reshape(x.shape)

    @staticmethod
    def prompt(encode, prompts, pipeline):
        out = encode(prompt=prompts, do_classifier_free_guidance=False)
        return {"text": out[0], "text_mask": out[1]}
