"""The configurations of published models, written down from their own config.json, for folders without weights."""

from __future__ import annotations

import json
from pathlib import Path

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}
UNIPC = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction", "num_train_timesteps": 1000}
SD_VAE = {"latent_channels": 4, "block_out_channels": [128, 256, 512, 512]}
SD3_VAE = SD_VAE | {"latent_channels": 16}
WAN_VAE = {"z_dim": 16, "scale_factor_spatial": 8}
WAN = {
    "attention_head_dim": 128,
    "cross_attn_norm": True,
    "ffn_dim": 8960,
    "freq_dim": 256,
    "in_channels": 16,
    "out_channels": 16,
    "num_attention_heads": 12,
    "num_layers": 30,
    "patch_size": [1, 2, 2],
    "qk_norm": "rms_norm_across_heads",
    "text_dim": 4096,
}
WAN_14B = WAN | {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824}
WAN_I2V_14B = WAN_14B | {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
COGVIDEOX = {
    "num_attention_heads": 30,
    "attention_head_dim": 64,
    "num_layers": 30,
    "in_channels": 16,
    "out_channels": 16,
    "patch_size": 2,
    "sample_frames": 49,
    "sample_height": 60,
    "sample_width": 90,
    "text_embed_dim": 4096,
    "max_text_seq_length": 226,
    "time_embed_dim": 512,
}

# id -> (pipeline, class of the network and its config, class of the scheduler and its config, autoencoder's config,
#        shape of a sample, conditions of a sample, billions of parameters)
MODELS = {
    "stable-diffusion-v1-5/stable-diffusion-v1-5": (
        "StableDiffusionPipeline",
        "UNet2DConditionModel",
        {
            "sample_size": 64,
            "cross_attention_dim": 768,
            "attention_head_dim": 8,
            "block_out_channels": [320, 640, 1280, 1280],
        },
        "PNDMScheduler",
        BETAS | {"skip_prk_steps": True, "steps_offset": 1},
        SD_VAE | {"scaling_factor": 0.18215},
        (4, 64, 64),
        {"text": (77, 768)},
        0.859520964,
    ),
    "stabilityai/stable-diffusion-xl-base-1.0": (
        "StableDiffusionXLPipeline",
        "UNet2DConditionModel",
        {
            "sample_size": 128,
            "cross_attention_dim": 2048,
            "attention_head_dim": [5, 10, 20],
            "block_out_channels": [320, 640, 1280],
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "use_linear_projection": True,
            "transformer_layers_per_block": [1, 2, 10],
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "EulerDiscreteScheduler",
        BETAS | {"steps_offset": 1},
        SD_VAE | {"scaling_factor": 0.13025},
        (4, 128, 128),
        {"text": (77, 2048), "pooled": (1280,)},
        2.567463684,
    ),
    "PixArt-alpha/PixArt-XL-2-1024-MS": (
        "PixArtAlphaPipeline",
        "PixArtTransformer2DModel",
        {
            "num_layers": 28,
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "cross_attention_dim": 1152,
            "in_channels": 4,
            "out_channels": 8,
            "caption_channels": 4096,
            "patch_size": 2,
            "sample_size": 128,
        },
        "DPMSolverMultistepScheduler",
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        SD_VAE | {"scaling_factor": 0.13025},
        (4, 128, 128),
        {"text": (120, 4096), "text_mask": (120,)},
        0.611,
    ),
    "stabilityai/stable-diffusion-3-medium-diffusers": (
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        {
            "attention_head_dim": 64,
            "caption_projection_dim": 1536,
            "in_channels": 16,
            "out_channels": 16,
            "joint_attention_dim": 4096,
            "num_attention_heads": 24,
            "num_layers": 24,
            "patch_size": 2,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
            "sample_size": 128,
        },
        "FlowMatchEulerDiscreteScheduler",
        {"shift": 3.0},
        SD3_VAE | {"scaling_factor": 1.5305, "shift_factor": 0.0609},
        (16, 128, 128),
        {"text": (333, 4096), "pooled": (2048,)},
        2.03,
    ),
    "black-forest-labs/FLUX.1-dev": (
        "FluxPipeline",
        "FluxTransformer2DModel",
        {
            "attention_head_dim": 128,
            "guidance_embeds": True,
            "in_channels": 64,
            "joint_attention_dim": 4096,
            "num_attention_heads": 24,
            "num_layers": 19,
            "num_single_layers": 38,
            "patch_size": 1,
            "pooled_projection_dim": 768,
            "axes_dims_rope": [16, 56, 56],
        },
        "FlowMatchEulerDiscreteScheduler",
        {
            "shift": 3.0,
            "use_dynamic_shifting": True,
            "base_shift": 0.5,
            "max_shift": 1.15,
            "base_image_seq_len": 256,
            "max_image_seq_len": 4096,
        },
        SD3_VAE | {"scaling_factor": 0.3611, "shift_factor": 0.1159},
        (16, 128, 128),
        {"text": (512, 4096), "pooled": (768,)},
        11.90140832,
    ),
    "Efficient-Large-Model/Sana_1600M_1024px_diffusers": (
        "SanaPipeline",
        "SanaTransformer2DModel",
        {
            "sample_size": 32,
            "patch_size": 1,
            "num_layers": 20,
            "num_attention_heads": 70,
            "attention_head_dim": 32,
            "num_cross_attention_heads": 20,
            "cross_attention_head_dim": 112,
            "cross_attention_dim": 2240,
            "caption_channels": 2304,
            "in_channels": 32,
            "out_channels": 32,
            "mlp_ratio": 2.5,
        },
        "DPMSolverMultistepScheduler",
        UNIPC,
        {
            "latent_channels": 32,
            "encoder_block_out_channels": [128, 256, 512, 512, 1024, 1024],
            "scaling_factor": 0.41407,
        },
        (32, 32, 32),
        {"text": (300, 2304), "text_mask": (300,)},
        1.6,
    ),
    "THUDM/CogVideoX-2b": (
        "CogVideoXPipeline",
        "CogVideoXTransformer3DModel",
        COGVIDEOX,
        "CogVideoXDDIMScheduler",
        BETAS
        | {
            "prediction_type": "v_prediction",
            "rescale_betas_zero_snr": True,
            "snr_shift_scale": 3.0,
            "timestep_spacing": "trailing",
        },
        SD3_VAE
        | {"block_out_channels": [128, 256, 256, 512], "scaling_factor": 1.15258426, "temporal_compression_ratio": 4},
        (16, 13, 60, 90),
        {"text": (226, 4096)},
        1.69,
    ),
    "Wan-AI/Wan2.1-T2V-1.3B-Diffusers": (
        "WanPipeline",
        "WanTransformer3DModel",
        WAN,
        "UniPCMultistepScheduler",
        UNIPC,
        WAN_VAE,
        (16, 21, 60, 104),
        {"text": (512, 4096)},
        1.419,
    ),
}


def folder(out: Path, name: str) -> Path:
    """A pipeline's folder with configs alone."""
    pipeline, network, config, scheduler, steps, vae, *_ = MODELS[name]
    part = "unet" if network.startswith("UNet") else "transformer"
    index = {"_class_name": pipeline, part: ["diffusers", network], "scheduler": ["diffusers", scheduler]}
    files = {
        "model_index.json": index | ({"force_zeros_for_empty_prompt": True} if "XL" in pipeline else {}),
        f"{part}/config.json": config,
        "scheduler/scheduler_config.json": steps,
        "vae/config.json": vae,
    }
    for file, content in files.items():
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        (out / file).write_text(json.dumps(content))
    return out
