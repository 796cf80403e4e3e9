"""Pieces of tiny pipelines: small random encoders, tokenizers and autoencoders of stock classes, made offline.

A family's twin (`distill.models.families`) is its network with some of these.
"""

from __future__ import annotations

import string

import diffusers
import torch
from diffusers import DDIMScheduler

LENGTH = 12  # tokens of a CLIP prompt


def shake(model, scale=0.1, seed=0):
    """Adds noise to all weights, so that none is zero, and sets eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return model.eval()


def clip_tokenizer():
    """A CLIP tokenizer with one token per letter."""
    import transformers

    letters = [*string.ascii_lowercase, *(c + "</w>" for c in string.ascii_lowercase)]
    vocab = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=LENGTH)


def clip(dim=16, projection=None):
    """A CLIP text encoder of width `dim`, with a projected output if `projection` is its width."""
    import transformers

    torch.manual_seed(dim)
    config = transformers.CLIPTextConfig(
        vocab_size=54,
        hidden_size=dim,
        intermediate_size=2 * dim,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
        projection_dim=projection or dim,
        hidden_act="gelu",
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return shake(kind(config))


def t5_tokenizer():
    """A T5 tokenizer with one token per letter."""
    import transformers

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), *((c, -3.0) for c in string.ascii_lowercase)]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=64)


def t5(dim=16, umt5=False):
    """A text encoder of width `dim`, T5 or UMT5."""
    import transformers

    kind = "UMT5" if umt5 else "T5"
    config_class, model_class = (getattr(transformers, f"{kind}{name}") for name in ("Config", "EncoderModel"))
    torch.manual_seed(dim)
    config = config_class(
        vocab_size=30, d_model=dim, d_kv=8, d_ff=2 * dim, num_layers=1, num_heads=2, pad_token_id=0, eos_token_id=1
    )
    return shake(model_class(config))


def clip_vision():
    """An image encoder of CLIP, and its processor."""
    import transformers

    torch.manual_seed(4)
    model = transformers.CLIPVisionModel(
        transformers.CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=8, patch_size=4
        )
    )
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return shake(model), processor


CHAT = (  # a chat template that, like Qwen3's, depends on `enable_thinking`
    "{% for message in messages %}{{ message['role'] + ' ' + message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}{{ ' assistant' }}{% if enable_thinking is false %}{{ ' done' }}{% endif %}{% endif %}"
)


def qwen3():
    """A Qwen3 tokenizer with one token per letter and a chat template, and a text encoder of width 16."""
    import transformers

    letters = [*string.ascii_lowercase, "Ġ", "<|endoftext|>"]
    tokenizer = transformers.Qwen2Tokenizer(vocab={letter: i for i, letter in enumerate(letters)}, merges=[])
    tokenizer.chat_template = CHAT
    torch.manual_seed(5)
    config = transformers.Qwen3Config(
        vocab_size=len(letters),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
    )
    return tokenizer, shake(transformers.Qwen3Model(config))


def gemma_tokenizer():
    """A Gemma tokenizer with one token per letter."""
    import transformers

    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.ascii_lowercase]
    return transformers.GemmaTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[])


def deep_compression_autoencoder():
    """An autoencoder of images with latents at half their size, by convolutions and linear attention."""
    torch.manual_seed(3)
    return diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=2,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41,
    )


def gemma2():
    """A Gemma 2 text encoder."""
    import transformers

    torch.manual_seed(4)
    return shake(
        transformers.Gemma2Model(
            transformers.Gemma2Config(
                vocab_size=32,
                hidden_size=8,
                intermediate_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                pad_token_id=0,
                eos_token_id=1,
                bos_token_id=2,
            )
        )
    )


def vae(channels=4, **kw):
    """An autoencoder of images with latents at half their size."""
    torch.manual_seed(1)
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=channels,
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        **kw,
    ).eval()


def ddim(prediction="epsilon", kind=DDIMScheduler, **kw):
    """A DDIM scheduler, or another of its arguments, with trailing timesteps."""
    return kind(prediction_type=prediction, timestep_spacing="trailing", set_alpha_to_one=True, clip_sample=False, **kw)


def scaled(prediction="epsilon"):
    """A DDIM scheduler with the betas of the first latent diffusion models."""
    return ddim(prediction, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def flow(**kw):
    """The scheduler of flow models."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**kw)
