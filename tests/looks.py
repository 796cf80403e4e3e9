"""Tiny networks that look at images, with random weights, saved as users have the large ones."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from distill.data.sources import image
from distill.models.diffusers import tiny_parts


def clip(folder: Path, side: int = 32, scale: float | None = None) -> str:
    """A CLIPModel with tokenizer and processor in `folder`."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.CLIPConfig(
        text_config=tiny_parts.clip(16, 16).config.to_dict(),
        projection_dim=16,
        vision_config=sizes | {"image_size": side, "patch_size": 8, "projection_dim": 16},
    )
    model = transformers.CLIPModel(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.ndim > 1 else None
    if scale is not None:
        model.logit_scale.data.fill_(scale)
    model.save_pretrained(folder)
    tiny_parts.clip_tokenizer().save_pretrained(folder)
    crop = {"height": side, "width": side}
    transformers.CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=crop).save_pretrained(folder)
    return str(folder)


def dinov2(folder: Path) -> str:
    """A Dinov2Model in `folder`, with a processor as published: it resizes to another size and crops."""
    torch.manual_seed(1)
    model = transformers.Dinov2Model(
        transformers.Dinov2Config(
            hidden_size=12, num_hidden_layers=2, num_attention_heads=2, mlp_ratio=2, image_size=28, patch_size=14
        )
    ).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3) if p.ndim > 1 else None
    model.save_pretrained(folder)
    transformers.BitImageProcessorPil(
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
        resample=3,
    ).save_pretrained(folder)
    return str(folder)


class Shrink:
    """Mean of each quarter of an image's channels: a network of one's own with few features."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)


def pictures(n: int, seed: int, side: int = 24, shift: float = 0.0) -> torch.Tensor:
    """Smooth random colour images (n, 3, side, side) in [-1, 1]."""
    coarse = torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return torch.tanh(torch.nn.functional.interpolate(coarse, (side, side), mode="bilinear") + shift)


def save(folder: Path, x: torch.Tensor, captions: list[str] | None = None) -> Path:
    """PNG files of images in [-1, 1], in order."""
    folder.mkdir(parents=True)
    for i, pixels in enumerate(((x + 1) * 127.5).round().clamp(0, 255).byte().numpy()):
        (folder / f"{i:05d}.png").write_bytes(image.encode(pixels))
        if captions:
            (folder / f"{i:05d}.txt").write_text(captions[i])
    return folder
