"""Tiny pipelines of each family: stock classes with small random networks, tokenizers and encoders, created offline.

`folder("sdxl")` is the path of one, and `load("tiny:sdxl")` its Denoiser, with the classes, conditions and conventions
of the published models in a few hundred kilobytes.
"""

from __future__ import annotations

import hashlib
import os
import string
from pathlib import Path

import diffusers
import torch
import transformers
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from distill.errors import BadInput, suggest
from distill.files import atomic_folder

LENGTH = 12  # tokens of a CLIP prompt


def folder(family: str) -> Path:
    """The folder of a family's tiny pipeline in the user's cache ($XDG_CACHE_HOME/distill), created on first use.

    Args:
        family: a key of FAMILIES.

    Raises:
        BadInput: for another name.
    """
    if family not in FAMILIES:
        raise BadInput(
            f"'tiny:{family}' is not a tiny pipeline.{suggest(family, FAMILIES)} There are {', '.join(FAMILIES)}."
        )
    version = Path(__file__).read_bytes() + f"{diffusers.__version__} {transformers.__version__}".encode()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "distill" / "tiny"
    out = cache / f"{family}-{hashlib.sha256(version).hexdigest()[:12]}"
    if not out.exists():
        try:
            with torch.random.fork_rng(devices=[]), atomic_folder(out) as staging:  # draws do not depend on the cache
                FAMILIES[family]().save_pretrained(staging)
        except (OSError, BadInput):
            if not out.exists():  # otherwise another process created it first
                raise
    return out


def shake(model, scale=0.1, seed=0):
    """Adds noise to all weights, so that none is zero, and sets eval mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))
    return model.eval()


def clip_tokenizer():
    """A CLIP tokenizer with one token per letter."""
    letters = [*string.ascii_lowercase, *(c + "</w>" for c in string.ascii_lowercase)]
    vocab = {token: i for i, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=LENGTH)


def clip(dim=16, projection=None):
    """A CLIP text encoder of width `dim`, with a projected output if `projection` is its width."""
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
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0), *((c, -3.0) for c in string.ascii_lowercase)]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=64)


T5 = (transformers.T5Config, transformers.T5EncoderModel)
UMT5 = (transformers.UMT5Config, transformers.UMT5EncoderModel)


def t5(dim=16, kind=T5):
    """A text encoder of width `dim`, T5 or UMT5."""
    config_class, model_class = kind
    torch.manual_seed(dim)
    config = config_class(
        vocab_size=30, d_model=dim, d_kv=8, d_ff=2 * dim, num_layers=1, num_heads=2, pad_token_id=0, eos_token_id=1
    )
    return shake(model_class(config))


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
    """A DDIM scheduler with the betas of Stable Diffusion."""
    return ddim(prediction, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)


def unet(dim, **kw):
    """A text-conditioned U-Net that reads text features of width `dim`."""
    torch.manual_seed(2)
    return shake(
        diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            layers_per_block=1,
            cross_attention_dim=dim,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=2,
            **kw,
        )
    )


def sd(prediction="epsilon"):
    """Stable Diffusion 1 (epsilon) or 2 (v_prediction)."""
    return diffusers.StableDiffusionPipeline(
        vae=vae(),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        unet=unet(16),
        scheduler=scaled(prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sdxl(zeros=True):
    """Stable Diffusion XL; `zeros`: the null condition is zeros."""
    network = unet(
        16 + 24,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=24 + 6 * 4,
        transformer_layers_per_block=1,
        use_linear_projection=True,
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=clip(16),
        text_encoder_2=clip(24, projection=24),
        tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(),
        unet=network,
        scheduler=scaled(),
        force_zeros_for_empty_prompt=zeros,
        add_watermarker=False,
    )


def pixart(kind=diffusers.PixArtAlphaPipeline, size=128):
    """PixArt-alpha, or -sigma by its pipeline; at `size` 128 with resolution and aspect conditions."""
    torch.manual_seed(2)
    network = shake(
        diffusers.PixArtTransformer2DModel(
            sample_size=size,
            num_layers=2,
            patch_size=2,
            attention_head_dim=8,
            num_attention_heads=3,
            caption_channels=16,
            in_channels=4,
            cross_attention_dim=24,
            out_channels=8,
            use_additional_conditions=size == 128,
        ),
        0.05,
    )
    return kind(tokenizer=t5_tokenizer(), text_encoder=t5(), vae=vae(), transformer=network, scheduler=ddim())


def sd3():
    """Stable Diffusion 3."""
    torch.manual_seed(2)
    network = shake(
        diffusers.SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=48,
            caption_projection_dim=16,
            pooled_projection_dim=40,
            pos_embed_max_size=16,
            qk_norm="rms_norm",
        ),
        0.05,
    )
    return diffusers.StableDiffusion3Pipeline(
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae(shift_factor=0.06),
        text_encoder=clip(16, 16),
        tokenizer=clip_tokenizer(),
        text_encoder_2=clip(24, 24),
        tokenizer_2=clip_tokenizer(),
        text_encoder_3=t5(48),
        tokenizer_3=t5_tokenizer(),
    )


def flux(dev=True):
    """FLUX.1-dev with its guidance input, or FLUX.1-schnell."""
    torch.manual_seed(2)
    network = shake(
        diffusers.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            axes_dims_rope=(4, 4, 8),
            guidance_embeds=dev,
        ),
        0.05,
    )
    return diffusers.FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0 if dev else 1.0, use_dynamic_shifting=dev),
        vae=vae(shift_factor=0.06),
        text_encoder=clip(),
        tokenizer=clip_tokenizer(),
        text_encoder_2=t5(32),
        tokenizer_2=t5_tokenizer(),
        transformer=network,
    )


def wan_network(**kw):
    """The transformer of Wan 2.1."""
    torch.manual_seed(2)
    return shake(
        diffusers.WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            out_channels=16,
            text_dim=16,
            freq_dim=16,
            ffn_dim=16,
            num_layers=1,
            rope_max_seq_len=32,
            **kw,
        ),
        0.05,
    )


def wan_vae():
    """The autoencoder of Wan 2.1, four frames per latent frame."""
    torch.manual_seed(3)
    return diffusers.AutoencoderKLWan(
        base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True]
    )


def wan():
    """Wan 2.1, text to video."""
    return diffusers.WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(16, UMT5),
        vae=wan_vae(),
        transformer=wan_network(in_channels=16),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def wan_i2v():
    """Wan 2.1, image to video."""
    torch.manual_seed(4)
    vision_model = shake(
        transformers.CLIPVisionModel(
            transformers.CLIPVisionConfig(
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=3,
                num_attention_heads=2,
                image_size=8,
                patch_size=4,
            )
        )
    )
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    return diffusers.WanImageToVideoPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=t5(16, UMT5),
        vae=wan_vae(),
        image_encoder=vision_model,
        image_processor=processor,
        transformer=wan_network(in_channels=36, image_dim=16, added_kv_proj_dim=24),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def cogvideox(rotary=False, span=None, image=False, **kw):
    """CogVideoX: `rotary` as 5B, `span` the temporal patch of 1.5, `image` to video."""
    torch.manual_seed(2)
    network = shake(
        diffusers.CogVideoXTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=8 if image else 4,
            out_channels=4,
            time_embed_dim=8,
            text_embed_dim=16,
            num_layers=1,
            sample_width=4,
            sample_height=4,
            sample_frames=9,
            patch_size=2,
            patch_size_t=span,
            max_text_seq_length=226,
            use_rotary_positional_embeddings=rotary,
            patch_bias=span is None,
            **kw,
        ),
        0.05,
    )
    torch.manual_seed(3)
    autoencoder = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
        temporal_compression_ratio=4,
    )
    scheduler = ddim("v_prediction", diffusers.CogVideoXDDIMScheduler, rescale_betas_zero_snr=True, snr_shift_scale=3.0)
    kind = diffusers.CogVideoXImageToVideoPipeline if image else diffusers.CogVideoXPipeline
    return kind(tokenizer=t5_tokenizer(), text_encoder=t5(), vae=autoencoder, transformer=network, scheduler=scheduler)


def gemma_tokenizer():
    """A Gemma tokenizer with one token per letter."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *string.ascii_lowercase]
    return transformers.GemmaTokenizer(vocab={w: i for i, w in enumerate(words)}, merges=[])


def deep_compression_autoencoder():
    """The autoencoder of Sana."""
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
    """The text encoder of Sana."""
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


def sana():
    """Sana."""
    torch.manual_seed(2)
    network = shake(
        diffusers.SanaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            num_attention_heads=2,
            attention_head_dim=4,
            num_cross_attention_heads=2,
            cross_attention_head_dim=4,
            cross_attention_dim=8,
            caption_channels=8,
            sample_size=8,
            timestep_scale=0.001,
        ),
        0.05,
    )
    return diffusers.SanaPipeline(
        tokenizer=gemma_tokenizer(),
        vae=deep_compression_autoencoder(),
        text_encoder=gemma2(),
        transformer=network,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def stable_audio():
    """Stable Audio Open."""
    torch.manual_seed(2)
    network = shake(
        diffusers.StableAudioDiTModel(
            sample_size=8,
            in_channels=3,
            num_layers=2,
            attention_head_dim=4,
            num_attention_heads=2,
            num_key_value_attention_heads=2,
            out_channels=3,
            cross_attention_dim=4,
            time_proj_dim=8,
            global_states_input_dim=8,
            cross_attention_input_dim=4,
        ),
        0.05,
    )
    torch.manual_seed(3)
    autoencoder = diffusers.AutoencoderOobleck(
        encoder_hidden_size=6,
        downsampling_ratios=[1, 2],
        decoder_channels=3,
        decoder_input_channels=3,
        audio_channels=2,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    from diffusers.pipelines.stable_audio.modeling_stable_audio import StableAudioProjectionModel

    project = StableAudioProjectionModel(text_encoder_dim=16, conditioning_dim=4, min_value=0, max_value=32)
    return diffusers.StableAudioPipeline(
        vae=autoencoder,
        text_encoder=t5(),
        projection_model=shake(project),
        tokenizer=t5_tokenizer(),
        transformer=network,
        scheduler=diffusers.CosineDPMSolverMultistepScheduler(solver_order=1),
    )


def ltx():
    """LTX-Video, text to video."""
    torch.manual_seed(2)
    network = shake(
        diffusers.LTXVideoTransformer3DModel(
            in_channels=8,
            out_channels=8,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            num_layers=1,
            caption_channels=16,
        ),
        0.05,
    )
    torch.manual_seed(3)
    autoencoder = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        scaling_factor=0.9,
    )
    autoencoder.latents_mean, autoencoder.latents_std = torch.linspace(-1, 1, 8), torch.linspace(0.5, 2, 8)
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )
    return diffusers.LTXPipeline(
        scheduler=scheduler, vae=autoencoder.eval(), text_encoder=t5(), tokenizer=t5_tokenizer(), transformer=network
    )


def adm():
    """A pixel model like ADM: it predicts the noise and, in as many further channels, the variance."""
    torch.manual_seed(2)
    network = shake(
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


FAMILIES = {
    "sd15": sd,
    "sdxl": sdxl,
    "pixart": pixart,
    "sd3": sd3,
    "flux": flux,
    "sana": sana,
    "cogvideox": cogvideox,
    "wan": wan,
    "wan_i2v": wan_i2v,
    "cogvideox_i2v": lambda: cogvideox(image=True),
    "ltx": ltx,
    "stable_audio": stable_audio,
    "adm": adm,
}
