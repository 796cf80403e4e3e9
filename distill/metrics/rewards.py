"""Rewards of samples, higher is better: `metric(x, data=None, **cond) -> (B,)`. They need not be differentiable.

A config may name any callable of this form. The first ones below are for toys and tests, those with CLIP for images. A
reward with `paired` needs the data sample or the caption of the same condition, so it ranks samples in training but is
not a metric of an evaluation.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from distill.errors import BadInput


class Near:
    """Minus the distance to one point, rounded down to multiples of `grain`: piecewise constant, so without gradient.

    Args:
        point: of the shape of a sample, or a number.
        grain: the step size; 0 does not round.
    """

    def __init__(self, point: list[float] | float, grain: float = 0.05):
        self.point, self.grain = torch.as_tensor(point, dtype=torch.float64), grain

    def __call__(self, x: Tensor, data: Tensor | None = None, **cond) -> Tensor:
        away = (x.double() - self.point.to(x.device)).flatten(1).norm(dim=1)
        return -(away / self.grain).ceil() * self.grain if self.grain else -away


class Ink:
    """Mean of a sample's values, rounded down to multiples of `grain`: mean brightness, without gradient."""

    def __init__(self, grain: float = 0.02):
        self.grain = grain

    def __call__(self, x: Tensor, data: Tensor | None = None, **cond) -> Tensor:
        mean = x.double().flatten(1).mean(1)
        return (mean / self.grain).floor() * self.grain if self.grain else mean


class ClipScore:
    r"""CLIP score of image and caption, 100 max(cos(E_I, E_C), 0); https://arxiv.org/abs/2104.08718 with weight 100.

    Captions are those that come as `caption` (a list), or `prompts[label]`. A text longer than the model reads is cut.

    Args:
        weights, processor: of `distill.metrics.networks.vision.ClipNetwork`.
        prompts: a caption for each class.
        decode: diffusers folder whose autoencoder makes pixels of x, where x are latents.
    """

    def __init__(
        self,
        weights: str = "openai/clip-vit-large-patch14",
        processor: str | None = None,
        prompts: list[str] | None = None,
        decode: str | None = None,
    ):
        from distill.metrics.networks import vision

        self.clip, self.prompts, self.decode = vision.ClipNetwork(weights, processor), prompts, decoder(decode)
        self.paired = prompts is None

    def __call__(self, x: Tensor, data: Tensor | None = None, **cond) -> Tensor:
        return 100 * self.cosine(x, cond).clamp_min(0)

    @torch.no_grad()
    def cosine(self, x: Tensor, cond: dict) -> Tensor:
        captions = self.captions(len(x), cond)
        self.clip.to(x.device)
        once = list(dict.fromkeys(captions))
        text = self.clip.text(once)[torch.tensor([once.index(c) for c in captions])]
        return (self.clip(self.decode(x)) * text).sum(-1).to(x.device)

    def captions(self, n: int, cond: dict) -> list[str]:
        if self.prompts and "label" in cond:
            if int(cond["label"].max()) >= len(self.prompts):
                raise BadInput(
                    f"prompts: {len(self.prompts)} of them for class {int(cond['label'].max())}; give one per class."
                )
            return [self.prompts[i] for i in cond["label"].tolist()]
        if len(cond.get("caption") or ()) != n:
            raise BadInput(
                f"{type(self).__name__} needs a caption per sample: data with captions, or prompts, one a class."
            )
        return list(cond["caption"])


class PickScore(ClipScore):
    r"""Human preference as a fine-tuned CLIP predicts it: exp(logit_scale) cos(E_I, E_C).

    Source: Kirstain et al. 2023, https://arxiv.org/abs/2305.01569. Other preference models that are CLIPs, such as HPSv2
    in transformers' form, are scored the same way.
    """

    published, reads = "yuvalkirstain/PickScore_v1", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"  # it came without its own

    def __init__(
        self,
        weights: str = published,
        processor: str | None = None,
        prompts: list[str] | None = None,
        decode: str | None = None,
    ):
        super().__init__(weights, processor or (self.reads if weights == self.published else None), prompts, decode)

    def __call__(self, x: Tensor, data: Tensor | None = None, **cond) -> Tensor:
        return self.clip.scale.to(x.device) * self.cosine(x, cond)


class Aesthetic:
    r"""A linear head, or a chain of them, on CLIP's unit image embedding: LAION's aesthetic predictors, about 1 to 10.

    Args:
        head: file of linear layers in order (.pth as weights only, .safetensors), such as
            https://github.com/christophschuhmann/improved-aesthetic-predictor sac+logos+ava1-l14-linearMSE.pth,
            which has no activations between them.
        weights, processor, decode: of `ClipScore`; the head's own, ViT-L/14 for the one above.
    """

    def __init__(
        self,
        head: str,
        weights: str = "openai/clip-vit-large-patch14",
        processor: str | None = None,
        decode: str | None = None,
    ):
        from distill.metrics.networks import vision

        self.clip, self.decode = vision.ClipNetwork(weights, processor), decoder(decode)
        self.layers = linear_layers(Path(head).expanduser(), self.clip.model.config.projection_dim)

    @torch.no_grad()
    def __call__(self, x: Tensor, data: Tensor | None = None, **cond) -> Tensor:
        out = self.clip.to(x.device)(self.decode(x))
        for weight, bias in self.layers:
            out = torch.nn.functional.linear(out, weight, bias)
        return out[:, 0].to(x.device)


def linear_layers(file: Path, width: int) -> list[tuple[Tensor, Tensor]]:
    """(weight, bias) of each layer of a file, in order; the first reads `width` numbers, the last gives one."""
    if not file.is_file():
        raise BadInput(f"head: {file} does not exist; give the file of the linear layers.")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
        names = sorted(
            (k for k in state if k.endswith("weight")), key=lambda k: [int(n) for n in re.findall(r"\d+", k)]
        )
        layers = [(state[k].float(), state[k.removesuffix("weight") + "bias"].float()) for k in names]
        sizes = [width, *(len(weight) for weight, _ in layers)]
        if sizes[-1] != 1 or any(weight.shape[1] != size for size, (weight, _) in zip(sizes, layers)):
            raise ValueError(f"its layers do not map {width} numbers to one")
    except Exception as error:  # torch's and safetensors' own come in several classes
        raise BadInput(f"head: {file} is not a chain of linear layers ({str(error).splitlines()[0][:200]}).") from error
    return layers


def decoder(folder: str | None, device: str | None = None) -> Callable[[Tensor], Tensor]:
    """Latents to pixels by a diffusers folder's autoencoder, on `device` or that of x; without a folder, x as it is."""
    if not folder:
        return lambda x: x
    from distill.models.diffusers import Latent

    latent = Latent(folder)

    def decode(x: Tensor) -> Tensor:
        latent.device = device or x.device
        latent.vae.to(latent.device)
        return latent.decode(x)

    decode.key = str(folder)
    return decode
