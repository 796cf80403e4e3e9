"""Families that make images from text, one class a stock network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from distill.errors import BadInput
from distill.nets.diffusers.conditioned import Conditioned


class TextUNet(Conditioned):
    r"""Stock `UNet2DConditionModel`: Stable Diffusion 1 and 2 (text), and XL (text, pooled, size).

    `size` (B, 6) is XL's (height, width, top, left, target height, target width) in pixels; without it, that of x.
    """

    part, extras = "unet", ()

    @staticmethod
    def check(model) -> None:
        stock = model.config
        if stock.addition_embed_type not in (None, "text_time") or stock.class_embed_type or stock.encoder_hid_dim_type:
            raise BadInput(
                f"UNet2DConditionModel with addition_embed_type={stock.addition_embed_type!r}, class_embed_type="
                f"{stock.class_embed_type!r}, encoder_hid_dim_type={stock.encoder_hid_dim_type!r}: only the text of "
                "Stable Diffusion 1, 2 and XL is told here."
            )

    def set_sizes(self, model) -> None:
        if model.config.addition_embed_type:
            self.told, self.extras = ("text", "pooled"), ("size",)

    @staticmethod
    def embeddings(model) -> list[nn.Module]:
        return [model.time_embedding]

    def ask(self, x, n, text, pooled=None, size=None):
        added = None
        if pooled is not None:
            added = {"text_embeds": pooled, "time_ids": self.sizes(x) if size is None else size}
        return self.stock(x, n, encoder_hidden_states=text, added_cond_kwargs=added).sample

    def sizes(self, x: Tensor) -> Tensor:
        """(B, 6): an image that was neither scaled nor cropped, of the size of x."""
        height, width = (self.pixels * side for side in x.shape[2:])
        return x.new_tensor([height, width, 0, 0, height, width]).expand(len(x), -1)

    @staticmethod
    def prompt(encode, prompts, pipeline):
        out = encode(prompt=prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
        return {"text": out[0]} if len(out) == 2 else {"text": out[0], "pooled": out[2]}


class PixArt(Conditioned):
    r"""Stock `PixArtTransformer2DModel`, alpha and sigma; of a network that predicts a variance too, the mean is kept.

    `resolution` (B, 2) and `aspect` (B, 1), height / width, of alpha at 1024: in pixels; without them, those of x.
    """

    told, extras = ("text", "text_mask"), ()

    def set_sizes(self, model) -> None:
        if model.use_additional_conditions:
            self.extras = ("resolution", "aspect")

    @staticmethod
    def embeddings(model) -> list[nn.Module]:
        return [model.adaln_single.emb.timestep_embedder]

    def ask(self, x, n, text, text_mask, resolution=None, aspect=None):
        added = {"resolution": None, "aspect_ratio": None}
        if self.extras:
            height, width = x.shape[2:]
            here = x.new_tensor([self.pixels * height, self.pixels * width]).expand(len(x), -1)
            ratio = x.new_tensor([height / width]).expand(len(x), -1)
            added = {"resolution": here if resolution is None else resolution,
                     "aspect_ratio": ratio if aspect is None else aspect}
        return self.stock(x, encoder_hidden_states=text, encoder_attention_mask=text_mask, timestep=n,
                          added_cond_kwargs=added).sample[:, : x.shape[1]]

    @staticmethod
    def prompt(encode, prompts, pipeline):
        out = encode(prompt=prompts, do_classifier_free_guidance=False)
        return {"text": out[0], "text_mask": out[1]}


class SD3(Conditioned):
    """Stock `SD3Transformer2DModel`: Stable Diffusion 3 and 3.5 (text, pooled)."""

    told = ("text", "pooled")

    @staticmethod
    def embeddings(model) -> list[nn.Module]:
        return [model.time_text_embed.timestep_embedder]

    def ask(self, x, n, text, pooled):
        return self.stock(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=n).sample

    @staticmethod
    def prompt(encode, prompts, pipeline):
        out = encode(prompt=prompts, prompt_2=None, prompt_3=None, do_classifier_free_guidance=False)
        return {"text": out[0], "pooled": out[2]}


class Flux(Conditioned):
    r"""Stock `FluxTransformer2DModel`: FLUX.1 (text, pooled); x is (B, C, H, W), H and W even.

    `guide` (B,) is the guidance that FLUX.1-dev was distilled to imitate, diffusers' `guidance_scale`; 3.5 without it.
    It is another thing than the w of `Guided`, which is diffusers' `true_cfg_scale`.
    """

    told = ("text", "pooled")
    default_guide, patch = 3.5, 2

    def set_sizes(self, model) -> None:
        if model.config.guidance_embeds:
            self.extras = ("guide",)

    @staticmethod
    def default_shape(config):
        return config.in_channels // 4, 128, 128

    @staticmethod
    def tokens(size):
        return (size[0] // 2) * (size[1] // 2)

    @staticmethod
    def embeddings(model) -> list[nn.Module]:
        return [model.time_text_embed.timestep_embedder]

    def ask(self, x, n, text, pooled, guide=None):
        batch, channels, height, width = x.shape
        if height % 2 or width % 2:
            raise BadInput(f"FLUX takes latents of even height and width, not {height} x {width}: crop or pad them.")
        rows, columns = height // 2, width // 2
        # 2 x 2 patches become tokens of 4 C numbers, channel first.
        tokens = x.reshape(batch, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        where = torch.zeros(rows, columns, 3, device=x.device)
        where[..., 1] = torch.arange(rows, device=x.device)[:, None]
        where[..., 2] = torch.arange(columns, device=x.device)
        if self.extras and guide is None:
            guide = x.new_full((batch,), self.default_guide)
        out = self.stock(tokens, timestep=n / self.timesteps, guidance=guide, pooled_projections=pooled,
                         encoder_hidden_states=text, img_ids=where.flatten(0, 1),
                         txt_ids=where.new_zeros(text.shape[1], 3)).sample
        out = out.reshape(batch, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
        return out.reshape(batch, channels, height, width)

    @staticmethod
    def prompt(encode, prompts, pipeline):
        out = encode(prompt=prompts)
        return {"text": out[0], "pooled": out[1]}


class Sana(Conditioned):
    """Stock `SanaTransformer2DModel`: Sana (text, text_mask)."""

    told = ("text", "text_mask")
    pixels = 32

    @staticmethod
    def check(model) -> None:
        if model.config.guidance_embeds:
            raise BadInput("SanaTransformer2DModel with embedded guidance (Sana-Sprint) is a student already and speaks "
                           "TrigFlow: load Sana itself.")

    @staticmethod
    def embeddings(model) -> list[nn.Module]:
        return [model.time_embed.emb.timestep_embedder]

    def ask(self, x, n, text, text_mask):
        return self.stock(x, encoder_hidden_states=text, encoder_attention_mask=text_mask,
                          timestep=n * self.stock.config.timestep_scale).sample[:, : x.shape[1]]

    @staticmethod
    def prompt(encode, prompts, pipeline):
        plain = {"complex_human_instruction": None} if prompts == [""] else {}  # which stock does for the negative
        out = encode(prompt=prompts, do_classifier_free_guidance=False, **plain)
        return {"text": out[0], "text_mask": out[1]}
