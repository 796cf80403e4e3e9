"""What to measure of samples that are latents made under conditions such as text."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import safe_open, save_file
from torch import Tensor
from torch.nn import functional

from distill.errors import BadInput
from distill.eval import features, metrics, named, pictures, table
from distill.eval.ranks import ALONE, Ranks

SHOWN = 16  # samples of a picture: a decoder is slow


def moments(x: Tensor) -> Tensor:
    """(n, d) in float32 of latents (n, C, ...): of each channel the means of 2 parts an axis, and its deviation.

    The means see layout and colour, the deviations loss of detail: no replacement for metrics of decoded samples.
    """
    x = x.detach().cpu().float()
    pool = (functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d, functional.adaptive_avg_pool3d)[x.ndim - 3]
    return torch.cat([pool(x, 2).flatten(1), x.flatten(2).std(2)], 1)


class Latents:
    r"""`latent_fd`, the Fréchet distance of `moments` between samples and reference, beside the samples' mean and deviation;
    `latent_mmd` where it may be slow; and what networks that look at decoded samples see, where `metrics` names such.

    Args:
        reference: latents (m, C, ...), or a call that makes them, such as a teacher's samples.
        keep: file in which what the call makes is kept, for the next time.
        key: of what is kept; another key has it made again.
        decode: latents to pixels (n, 3, H, W) or (n, 3, F, H, W) in [-1, 1]; without it pictures show channels.
        held_out: latents of another split, for the floor.
        metrics: names, or names with settings (`distill.eval.named`).
        captions: the first n captions that samples are made for, for metrics that read them.
        allow: packages that a metric's `_target_` may name.

    Raises:
        BadInput: a metric of `metrics` that latents themselves do not have, or whose weights are not there.
    """

    def __init__(self, reference: Tensor | Callable[[], Tensor], keep: Path | None = None, key: str = "",
                 decode: Callable[[Tensor], Tensor] | None = None, held_out: Tensor | None = None, *, metrics: Any = None,
                 captions: Callable[[int], list[str]] | None = None, allow: tuple[str, ...] = ()):  # fmt: skip
        self.reference, self.keep, self.mark, self.decode, self.held_out = reference, keep, key, decode, held_out
        self.key = getattr(decode, "key", None)  # of pixels: which autoencoder made them
        self.asked, self.captions, self.allow = named.settings(metrics or []), captions, allow
        for name in self.asked:
            if name in named.PLAIN and "features" not in self.asked[name]:
                raise BadInput(f"eval.metrics: {name} of latents themselves is not measured; give it `features`.")
        self.headline = next((n for n in self.asked if not table.higher(n)), "latent_fd")
        self.x = reference if isinstance(reference, Tensor) else None
        self.kept: Tensor | None = None if self.x is None else moments(self.x)
        if self.x is not None:
            _ = self.seen  # refuses what is missing, before a run writes anything

    @cached_property
    def seen(self) -> named.Measures:
        return named.Measures(self.asked, features.Images(self.x, self.pixels) if self.asked else None, self.allow)

    def prepare(self) -> Tensor:
        """The reference's features, made or read at the first call; all ranks call it where the teacher is sharded."""
        if self.kept is None:
            self.x = self._read()
            if self.x is None:
                self.x = self.reference()
                self._write(self.x)
            self.kept = moments(self.x)
        return self.kept

    def _read(self) -> Tensor | None:
        if self.keep is None or not self.keep.exists():
            return None
        with safe_open(self.keep, "pt") as file:
            return file.get_tensor("x") if (file.metadata() or {}).get("key") == self.mark else None

    def _write(self, x: Tensor) -> None:
        if self.keep is not None and self.keep.parent.is_dir():
            staging = self.keep.with_suffix(f".writing-{os.getpid()}")
            save_file({"x": x.detach().cpu().contiguous()}, staging, {"key": self.mark})
            os.replace(staging, self.keep)

    def score(self, x: Tensor, cond: dict[str, Any], quick: bool = False, ranks: Ranks = ALONE) -> dict[str, float]:
        """Metric -> value of samples x; `quick` leaves out what needs all pairs of samples.

        With `ranks`, all of them call it with their shares of the samples, and have the values of all.
        """
        x = x.cpu().float()
        ours, values, theirs = ranks.gather(moments(x)), ranks.gather(x), self.prepare()
        found = ranks.tell(lambda: self._plain(ours, values, theirs, quick))
        if not self.asked:
            return found
        if self.captions and "caption" not in cond:
            first = ranks.before(len(x))
            told = self.captions(first + len(x))
            cond = cond | {"caption": [told[i % len(told)] for i in range(first, first + len(x))]}
        return found | self.seen.score(lambda: features.batches(x, 8, self.pixels), cond, quick, ranks)

    def _plain(self, ours: Tensor, x: Tensor, theirs: Tensor, quick: bool) -> dict[str, float]:
        found = {"latent_fd": metrics.frechet(ours, theirs), "mean": float(x.mean()), "std": float(x.std())}
        return found if quick else found | {"latent_mmd": metrics.mmd(ours, theirs)}

    def floor(self, ranks: Ranks = ALONE) -> dict[str, float]:
        """Distance between the reference and the other split."""
        return {} if self.held_out is None else {"latent_fd": metrics.frechet(moments(self.held_out), self.prepare())}

    def picture(self, panels: dict[str, Tensor], path: str | Path, columns: int = 4) -> None:
        pictures.compare({k: self.pixels(v[:SHOWN].float()) for k, v in panels.items()}, path, columns=columns)

    @torch.no_grad()
    def pixels(self, x: Tensor) -> Tensor:
        """(n, 1 or 3, H, W): decoded, of a video its middle frame; without a decoder its first channels."""
        if self.decode is not None and x.ndim > 3:
            pixels = torch.cat([self.decode(row).cpu().float() for row in x.split(1)])
            return pixels[:, :, pixels.shape[2] // 2] if pixels.ndim == 5 else pixels
        x = x.cpu()
        x = x[:, :, x.shape[2] // 2] if x.ndim == 5 else x[:, None] if x.ndim == 3 else x
        x = x[:, :3] if x.shape[1] >= 3 else x[:, :1]
        return x / (3 * x.std()).clamp_min(1e-6)
