"""What to measure of samples that are latents made under conditions such as text."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import safe_open, save_file
from torch import Tensor
from torch.nn import functional

from distill.eval import metrics, pictures

SHOWN = 16  # samples of a picture: a decoder is slow


def features(x: Tensor) -> Tensor:
    """(n, d) in float32 of latents (n, C, ...): of each channel the means of 2 parts an axis, and its deviation.

    The means see layout and colour, the deviations loss of detail: no replacement for metrics of decoded samples.
    """
    x = x.detach().cpu().float()
    pool = (functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d, functional.adaptive_avg_pool3d)[x.ndim - 3]
    return torch.cat([pool(x, 2).flatten(1), x.flatten(2).std(2)], 1)


class Latents:
    r"""`latent_fd`, the Fréchet distance of `features` between samples and reference, beside the samples' mean and deviation;
    `latent_mmd` where it may be slow.

    Args:
        reference: latents (m, C, ...), or a call that makes them, such as a teacher's samples.
        held_out: latents of another split, for the floor.
        keep: file in which what the call makes is kept, for the next time.
        key: of what is kept; another key has it made again.
        decode: latents to pixels (n, 3, H, W) or (n, 3, F, H, W) in [-1, 1], for pictures; none shows channels.
    """

    headline = "latent_fd"

    def __init__(self, reference: Tensor | Callable[[], Tensor], keep: Path | None = None, key: str = "",
                 decode: Callable[[Tensor], Tensor] | None = None, held_out: Tensor | None = None):
        self.reference, self.keep, self.key, self.decode, self.held_out = reference, keep, key, decode, held_out
        self.x = reference if isinstance(reference, Tensor) else None
        self.kept: Tensor | None = None if self.x is None else features(self.x)

    def prepare(self) -> Tensor:
        """The reference's features, made or read at the first call; all ranks call it where the teacher is sharded."""
        if self.kept is None:
            self.x = self._read()
            if self.x is None:
                self.x = self.reference()
                self._write(self.x)
            self.kept = features(self.x)
        return self.kept

    def _read(self) -> Tensor | None:
        if self.keep is None or not self.keep.exists():
            return None
        with safe_open(self.keep, "pt") as file:
            return file.get_tensor("x") if (file.metadata() or {}).get("key") == self.key else None

    def _write(self, x: Tensor) -> None:
        if self.keep is not None and self.keep.parent.is_dir():
            staging = self.keep.with_suffix(f".writing-{os.getpid()}")
            save_file({"x": x.detach().cpu().contiguous()}, staging, {"key": self.key})
            os.replace(staging, self.keep)

    def score(self, x: Tensor, cond: dict[str, Tensor], quick: bool = False) -> dict[str, float]:
        """Metric -> value of samples x; `quick` leaves out what needs all pairs of samples."""
        ours, theirs = features(x), self.prepare()
        out = {"latent_fd": metrics.frechet(ours, theirs), "mean": float(x.mean()), "std": float(x.std())}
        return out if quick else out | {"latent_mmd": metrics.mmd(ours, theirs)}

    def floor(self) -> dict[str, float]:
        """Distance between the reference and the other split."""
        return {} if self.held_out is None else {"latent_fd": metrics.frechet(features(self.held_out), self.prepare())}

    def picture(self, panels: dict[str, Tensor], path: str | Path, columns: int = 4) -> None:
        pictures.compare({k: self._seen(v[:SHOWN].float()) for k, v in panels.items()}, path, columns=columns)

    @torch.no_grad()
    def _seen(self, x: Tensor) -> Tensor:
        """Pixels (n, 1 or 3, H, W); of video the middle frame."""
        if self.decode is not None and x.ndim > 3:
            pixels = self.decode(x).cpu().float()
            return pixels[:, :, pixels.shape[2] // 2] if pixels.ndim == 5 else pixels
        x = x.cpu()
        x = x[:, :, x.shape[2] // 2] if x.ndim == 5 else x[:, None] if x.ndim == 3 else x
        x = x[:, :3] if x.shape[1] >= 3 else x[:, :1]
        return x / (3 * x.std()).clamp_min(1e-6)


def decoder(path: str, device: Any) -> Callable[[Tensor], Tensor] | None:
    """Latents to pixels by the autoencoder of a diffusers folder, if it has one: one by one, and let go when it is done."""
    from distill.nets.diffusers import Latent
    from distill.nets.diffusers.folder import folder_of

    if not (folder_of(path) / "vae").is_dir():
        return None

    def decode(x: Tensor) -> Tensor:
        latent = Latent(path, device=str(device()))
        return torch.cat([latent.decode(row).cpu() for row in x.split(1)])

    return decode
