"""Feature networks of metrics: pixels (B, C, H, W) in [-1, 1], any size, to features (B, d).

Each has the preprocessing of the metric that it is known for. Pixels are converted to bytes first, as in a saved image,
so that a folder of PNGs and the tensors it was written from have the same features. Weights are read from a local
folder or file, or from the hub by id.
"""

from __future__ import annotations

import hashlib
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from distill.errors import BadInput

WEIGHTS = (
    "weights-inception-2015-12-05-6726825d.pth",
    "pt_inception-2015-12-05-6726825d.pth",
    "inception-2015-12-05.pt",
    "inception.safetensors",
)


def cache() -> Path:
    """Folder of cached features and weights: `$DISTILL_CACHE`, else ~/.cache/distill."""
    return Path(os.environ.get("DISTILL_CACHE") or Path.home() / ".cache" / "distill").expanduser()


def to_bytes(x: Tensor) -> Tensor:
    """uint8 RGB (B, 3, H, W) of pixels in [-1, 1], rounded and clipped; grey becomes three equal channels.

    Raises:
        BadInput: no images, or NaN.
    """
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        raise BadInput(f"samples are {tuple(x.shape[1:])}, not images (1 or 3, H, W); decode latents by eval.decode.")
    if not torch.isfinite(x).all():
        raise BadInput("samples hold NaN or infinite values; check the sampler that made them.")
    x = ((x.detach().float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    return x if x.shape[1] == 3 else x.expand(-1, 3, -1, -1)


def digest(module: nn.Module, *settings: Any) -> str:
    """Sixteen hex digits that name a network's weights and settings."""
    total = hashlib.sha256(repr(settings).encode())
    for name, value in sorted(module.state_dict().items()):
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return total.hexdigest()[:16]


class FeatureNetwork:
    """A network and its preprocessing; `to` moves `model`, `key` identifies weights and preprocessing."""

    model: nn.Module
    settings: tuple = ()

    def to(self, device: torch.device | str) -> FeatureNetwork:
        self.model.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return next(iter([*self.model.parameters(), *self.model.buffers()]), torch.empty(0)).device

    @cached_property
    def key(self) -> str:
        return digest(self.model, type(self).__name__, *self.settings)

    def __call__(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class InceptionFeatures(FeatureNetwork):
    r"""FID's Inception: its pooled features (B, 2048) of images stretched to 299 x 299.

    Args:
        weights: a file; without it, one of the known names in the cache folder. "owner/name/file" is one on the hub.
        resize: "tf1", as in the original FID (bilinear without antialiasing, in the network's own graph), or "clean",
            PIL's antialiased bicubic in float (Parmar et al. 2022, https://arxiv.org/abs/2104.11222). Values of the two
            are not comparable.
    """

    def __init__(self, weights: str | None = None, resize: str = "tf1"):
        from distill.metrics.networks import inception

        if resize not in ("tf1", "clean"):
            raise BadInput(f"resize: '{resize}' must be tf1 or clean.")
        self.model, self.resize, self.settings = inception.load(self._file(weights)), resize, (resize,)

    @staticmethod
    def _file(weights: str | None) -> Path:
        from distill.metrics.networks.inception import SOURCE

        if weights is None:
            known = [cache() / name for name in WEIGHTS if (cache() / name).is_file()]
            if not known:
                raise BadInput(
                    f"weights: FID's Inception was not found; download {SOURCE} and put it into {cache()}, or name "
                    "the file."
                )
            return known[0]
        path = Path(weights).expanduser()
        return path if path.exists() or weights.count("/") != 2 or path.is_absolute() else _from_hub(weights)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        images = to_bytes(x)
        return self.model((_clean(images) if self.resize == "clean" else images).to(self.device)).cpu()


def _from_hub(weights: str) -> Path:
    from huggingface_hub import hf_hub_download

    owner, name, file = weights.split("/")
    if not file.endswith(".safetensors"):
        raise BadInput(f"weights: {weights} does not exist here, and of the hub only .safetensors files are read.")
    try:
        return Path(hf_hub_download(f"{owner}/{name}", file))
    except Exception as error:  # the hub's own come in many classes
        raise BadInput(
            f"weights: {weights} is not a file here, and the hub does not give it ({_line(error)})."
        ) from error


def _clean(images: Tensor, side: int = 299) -> Tensor:
    """float32 (B, 3, side, side) in [0, 255]: each channel by PIL in float, so that nothing is rounded."""
    from PIL import Image

    def one(channel: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(channel).resize((side, side), Image.Resampling.BICUBIC)).clip(0, 255)

    planes = images.cpu().numpy().astype(np.float32)
    return torch.from_numpy(np.stack([[one(channel) for channel in image] for image in planes]))


class Dinov2(FeatureNetwork):
    r"""DINOv2's normalised class token (B, d) of images stretched to 224 x 224 by PIL's bicubic, as FD-DINOv2 is defined.

    Source: Stein et al. 2023, https://arxiv.org/abs/2306.04675: ViT-L/14, d = 1024.
    """

    def __init__(self, weights: str = "facebook/dinov2-large", side: int = 224):
        self.model = pretrained("Dinov2Model", weights)
        self.look, self.side, self.settings = image_processor(weights), side, (side,)

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        size = {"height": self.side, "width": self.side}
        images = self.look(list(to_bytes(x).cpu()), size=size, do_center_crop=False, return_tensors="pt")
        return self.model(images["pixel_values"].to(self.device)).pooler_output.float().cpu()


class ClipNetwork(FeatureNetwork):
    """CLIP's unit embeddings (B, d) of images, by the model's own processor, and of captions.

    Args:
        weights: a CLIPModel.
        processor: where its image processor and tokenizer are; with the weights where not given.
    """

    def __init__(self, weights: str = "openai/clip-vit-large-patch14", processor: str | None = None):
        self.model = pretrained("CLIPModel", weights)
        self.look, self.read = image_processor(processor or weights), tokenizer(processor or weights)

    @property
    def scale(self) -> Tensor:
        """CLIP's factor on cosines, exp(logit_scale)."""
        return self.model.logit_scale.detach().exp()

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        images = self.look(list(to_bytes(x).cpu()), return_tensors="pt")["pixel_values"]
        return _unit(self.model.get_image_features(images.to(self.device)))

    @torch.no_grad()
    def text(self, captions: list[str]) -> Tensor:
        """Captions longer than the model's maximum, 77 tokens, are truncated."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.read(captions, padding=True, truncation=True, max_length=length, return_tensors="pt")
        return _unit(
            self.model.get_text_features(**{k: tokens[k].to(self.device) for k in ("input_ids", "attention_mask")})
        )


def _unit(found: Any) -> Tensor:
    features = getattr(found, "pooler_output", found).float()  # transformers 5 wraps the embedding, 4 does not
    return (features / features.norm(dim=-1, keepdim=True)).cpu()


def pretrained(name: str, weights: str) -> nn.Module:
    """A transformers model in eval mode from a folder or the hub; its code is the library's own."""
    import transformers

    return _loaded(getattr(transformers, name), weights).eval().requires_grad_(False)


def image_processor(weights: str) -> Any:
    """The image processor of a folder or the hub that works by PIL, whatever else is installed."""
    import transformers

    new = int(transformers.__version__.partition(".")[0]) >= 5
    return _loaded(transformers.AutoImageProcessor, weights, **{"backend": "pil"} if new else {"use_fast": False})


def tokenizer(weights: str) -> Any:
    """The tokenizer of a folder or the hub."""
    import transformers

    return _loaded(transformers.AutoTokenizer, weights)


def _loaded(kind: Any, weights: str, **kw) -> Any:
    path = Path(weights).expanduser()
    if path.is_file() or not path.exists() and (path.is_absolute() or weights.count("/") != 1):
        raise BadInput(f"weights: {weights} is neither a folder here nor an 'owner/name' of the hub.")
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        return kind.from_pretrained(path if path.exists() else weights, **kw)
    except Exception as error:  # transformers, safetensors and the hub each raise their own
        raise BadInput(f"weights: {weights} holds no {kind.__name__} that can be loaded ({_line(error)}).") from error
    finally:
        if bars:
            logging.enable_progress_bar()


def _line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:200]
