"""Families that make video from text: x is (B, C, F, H, W)."""

from __future__ import annotations

from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import nn

from distill.errors import BadInput
from distill.nets.diffusers.conditioned import Conditioned


class Wan(Conditioned):
    """Stock `WanTransformer3DModel`: Wan 2.1 text to video (text)."""

    @staticmethod
    def check(model) -> None:
        if model.config.image_dim or model.config.in_channels != model.config.out_channels:
            raise BadInput("WanTransformer3DModel that is told an image: only text to video is here.")

    @staticmethod
    def default_shape(config):
        return config.in_channels, 21, 60, 104

    @staticmethod
    def embeddings(model) -> list[nn.Module]:
        return [model.condition_embedder.time_embedder]

    def ask(self, x, n, text):
        return self.stock(x, timestep=n, encoder_hidden_states=text).sample

    @staticmethod
    def prompt(encode, prompts, pipeline):
        return {"text": encode(prompt=prompts, do_classifier_free_guidance=False)[0]}


class CogVideoX(Conditioned):
    """Stock `CogVideoXTransformer3DModel`: CogVideoX text to video (text); its frames lie before its channels."""

    @staticmethod
    def check(model) -> None:
        if model.config.ofs_embed_dim or model.config.in_channels != model.config.out_channels:
            raise BadInput("CogVideoXTransformer3DModel that is told an image: only text to video is here.")

    @staticmethod
    def default_shape(config):
        frames = (config.sample_frames - 1) // config.temporal_compression_ratio + 1
        return config.in_channels, frames, config.sample_height, config.sample_width

    @staticmethod
    def embeddings(model) -> list[nn.Module]:
        return [model.time_embedding]

    def ask(self, x, n, text):
        rotary = self.rotary(x) if self.stock.config.use_rotary_positional_embeddings else None
        return self.stock(x.transpose(1, 2), encoder_hidden_states=text, timestep=n,
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
