"""Z-Image: latents (B, C, H, W) with even H and W. Conditions: text, text_mask.

The stock network takes a list of prompts cut to their true lengths, which must not be padded: `text` (B, L, D) is padded to
one length here and cut by `text_mask` (B, L) at the call. It gets 1 - sigma, and answers minus the flow. The stock pipeline
guides wherever `guidance_scale` > 0, by c + g (c - n): w = 1 + g, and 1.0 is w = 2.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor

from distill.errors import BadInput
from distill.models.diffusers import tiny_parts as parts
from distill.models.families.family import Factors, Family, Published, Twin, Weights


def check_supported(model: Any) -> None:
    """Raises BadInput for networks of another task."""
    if model.config.siglip_feat_dim is not None:
        raise BadInput(
            "ZImageTransformer2DModel with siglip_feat_dim (Omni) reads images beside the latents, which is not supported; "
            "load Z-Image."
        )


def call(net: Any, x: Tensor, time: Tensor, text: Tensor, text_mask: Tensor) -> Tensor:
    """The answer of the stock network, of the shape of x."""
    height, width = x.shape[2:]
    if height % 2 or width % 2:
        raise BadInput(f"Z-Image needs latents of even height and width, not {height} x {width}: crop or pad them.")
    # On shapes alone a mask has no values: prompts are as long as their rows.
    lengths = [text.shape[1]] * len(text) if text_mask.is_meta else text_mask.sum(1).tolist()
    prompts = [row[: int(length)] for row, length in zip(text, lengths)]
    return torch.stack(net.stock(list(x.unsqueeze(2)), time, prompts, return_dict=False)[0]).squeeze(2)


def encode_prompt(encode: Callable[..., Any], prompts: list[str], pipeline: Any) -> dict[str, Tensor]:
    """The conditions of prompts, one row each."""
    rows, _ = encode(prompt=list(prompts), do_classifier_free_guidance=False)
    longest = encode.options["max_sequence_length"]
    text = rows[0].new_zeros(len(rows), longest, rows[0].shape[-1])
    mask = torch.zeros(len(rows), longest, dtype=torch.long, device=text.device)
    for i, row in enumerate(rows):
        text[i, : len(row)], mask[i, : len(row)] = row, 1
    return {"text": text, "text_mask": mask}


def comfyui_keys(factors: Factors) -> Weights:
    """Stock names under the prefix that both ComfyUI and stock diffusers read.

    Native names (a fused `attention.qkv`) are no alternative: under this prefix stock diffusers leaves out all attention
    layers, without an error.
    """
    return {
        f"diffusion_model.{name}.lora_{ab}.weight": w for name, pair in factors.items() for ab, w in zip("AB", pair)
    }


def tiny(shift: float = 6.0) -> Any:
    """Z-Image."""
    torch.manual_seed(2)
    network = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[1024, 64, 64],
    )
    tokenizer, encoder = parts.qwen3()
    return diffusers.ZImagePipeline(
        scheduler=parts.flow(shift=shift),
        vae=parts.vae(shift_factor=0.06),
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=parts.shake(network, 0.05),
    )


PUBLISHED = {
    "Tongyi-MAI/Z-Image": Published(
        "ZImagePipeline",
        {},  # the defaults of the stock class
        "FlowMatchEulerDiscreteScheduler",
        {"shift": 6.0, "use_dynamic_shifting": False, "num_train_timesteps": 1000},
        {
            "latent_channels": 16,
            "block_out_channels": [128, 256, 512, 512],
            "scaling_factor": 0.3611,
            "shift_factor": 0.1159,
        },
        (16, 128, 128),
        {"text": (512, 2560), "text_mask": (512,)},
        6.155,
    )
}

FAMILY = Family(
    network="ZImageTransformer2DModel",
    call=call,
    check_supported=check_supported,
    embeddings=("t_embedder.mlp.2",),
    model_time="1 - n / N",
    sign=-1,
    default_shape=lambda config: (config.in_channels, 128, 128),
    patch=2,
    conditions=("text", "text_mask"),
    encode_prompt=encode_prompt,
    even_sigmas=True,
    guidance_offset=1.0,
    no_guidance={"guidance_scale": 0.0},
    lora_keys=comfyui_keys,
    twins={
        "z_image": Twin(tiny, load={"size": (8, 8)}),
        "z_image_wide": Twin(tiny, shape=(4, 8, 12), load={"size": (8, 12)}),
    },
    published=PUBLISHED,
)
