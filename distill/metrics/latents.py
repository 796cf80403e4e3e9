"""The suite for samples that are latents, drawn under conditions such as text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import safe_open, save
from torch import Tensor
from torch.nn import functional

from distill.errors import BadInput
from distill.files import atomic_write
from distill.metrics import distances, named, pictures, table
from distill.metrics.features import ImageSet, batches
from distill.metrics.shares import ALONE, SampleShares
from distill.metrics.suite import Suite

SHOWN = 16  # samples of a picture: a decoder is slow


def features(x: Tensor) -> Tensor:
    """Features (n, d), float32, of latents (n, C, ...): per channel the means of the 2 halves of each axis (4 quadrants
    of an image) and the standard deviation.

    The means depend on layout and colour, the deviation on detail. They do not replace metrics of decoded samples.
    """
    x = x.detach().cpu().float()
    pool = (functional.adaptive_avg_pool1d, functional.adaptive_avg_pool2d, functional.adaptive_avg_pool3d)[x.ndim - 3]
    return torch.cat([pool(x, 2).flatten(1), x.flatten(2).std(2)], 1)


class LatentSuite(Suite):
    r"""Metrics of latents: `latent_fd`, the Fréchet distance of `features`; mean and standard deviation; `latent_mmd`
    unless `quick`.

    Args:
        reference: latents (m, C, ...), or a function `reference(ranks)` that draws them, such as the teacher's
            sampler: all ranks call it and get all of them.
        held_out: latents of another split, for `reference_vs_holdout`.
        keep: file that stores what the function drew.
        key: of the stored reference; with another key it is drawn again.
        decode: latents to pixels (n, 3, H, W) or (n, 3, F, H, W) in [-1, 1], for pictures; without it the picture
            shows the first channels.
        metrics: further metrics, of features of decoded samples (`distill.metrics.named`).
        look: `decode` for these metrics; its autoencoder stays in memory.
        captions: maps n to the captions of n samples, for metrics that read them.
        allow: packages that a metric's `_target_` may name.
    """

    def __init__(
        self,
        reference: Tensor | Callable[[SampleShares], Tensor],
        keep: Path | None = None,
        key: str = "",
        decode: Callable[[Tensor], Tensor] | None = None,
        held_out: Tensor | None = None,
        *,
        metrics: Any = None,
        look: Callable[[Tensor], Tensor] | None = None,
        captions: Callable[[int], list[str]] | None = None,
        allow: tuple[str, ...] = (),
    ):
        options = named.settings(metrics or [])
        for name in options:
            if name in named.PLAIN and "features" not in options[name]:
                raise BadInput(
                    f"eval.metrics: {name} of latents is latent_fd and latent_mmd, which are measured anyway; leave "
                    "it out, or give it `features`."
                )
        if options and look is None:
            raise BadInput(
                "eval.metrics: samples are latents, and nothing decodes them; name the folder of their autoencoder "
                "by eval.decode."
            )
        self.measures, self.look, self.captions = named.Measures(options, None, allow), look, captions
        self.headline = next((name for name in options if not table.higher(name)), "latent_fd")
        self.reference, self.keep, self.key, self.decode, self.held_out = reference, keep, key, decode, held_out
        self.x = reference if isinstance(reference, Tensor) else None
        self.features: Tensor | None = None if self.x is None else features(self.x)

    def prepare(self, ranks: SampleShares = ALONE) -> None:
        """Draw or read the reference at the first call; all of `ranks` call it."""
        if self.features is None:
            self.x = self._read()
            if not all(ranks.counts(int(self.x is not None))):  # the file may be on another machine
                self.x = self.reference(ranks)
                ranks.from_first(lambda: self._write(self.x))
            self.features = features(self.x)

    def _read(self) -> Tensor | None:
        if self.keep is None or not self.keep.exists():
            return None
        with safe_open(self.keep, "pt") as file:
            return file.get_tensor("x") if (file.metadata() or {}).get("key") == self.key else None

    def _write(self, x: Tensor) -> None:
        if self.keep is not None and self.keep.parent.is_dir():
            with atomic_write(self.keep, "wb") as file:
                file.write(save({"x": x.detach().cpu().contiguous()}, {"key": self.key}))

    def score(
        self, x: Tensor, cond: dict[str, Any], quick: bool = False, ranks: SampleShares = ALONE
    ) -> dict[str, float]:
        self.prepare(ranks)
        whole = ranks.gather(x.float())
        out = ranks.from_first(lambda: self._plain(whole, quick))
        return out | self._named(x.cpu().float(), cond, quick, ranks) if self.measures.all else out

    def _plain(self, x: Tensor, quick: bool) -> dict[str, float]:
        ours, theirs = features(x), self.features
        out = {"latent_fd": distances.frechet(ours, theirs), "mean": float(x.mean()), "std": float(x.std())}
        return out if quick else out | {"latent_mmd": distances.squared_mmd(ours, theirs)}

    def _named(self, x: Tensor, cond: dict[str, Any], quick: bool, ranks: SampleShares, **kw) -> dict[str, float]:
        self.measures.real = self.measures.real or ImageSet(self.x, self.pixels)
        if self.captions and "caption" not in cond:
            counts = ranks.counts(len(x))
            first = sum(counts[: ranks.rank])
            cond = cond | {"caption": self.captions(sum(counts))[first : first + len(x)]}
        return self.measures.score(lambda: batches(x, SHOWN, self.pixels), cond, quick, ranks, **kw)

    @torch.no_grad()
    def pixels(self, x: Tensor) -> Tensor:
        """Pixels of x for the feature networks, (n, 3, H, W); of a video the middle frame."""
        pixels = self.look(x).cpu().float()
        return (pixels[:, :, pixels.shape[2] // 2] if pixels.ndim == 5 else pixels).clamp(-1, 1)

    def reference_vs_holdout(self, ranks: SampleShares = ALONE) -> dict[str, float]:
        """Distances between the reference and the held-out split."""
        if self.held_out is None:
            return {}
        self.prepare(ranks)
        values = {"latent_fd": distances.frechet(features(self.held_out), self.features)}
        local = self.held_out[ranks.share(len(self.held_out))]
        only = [name for name in self.measures.names if not table.higher(name)]
        return values | (self._named(local.float(), {}, True, ranks, only=only) if only else {})

    def picture(self, panels: dict[str, Tensor], path: str | Path, columns: int = 4) -> None:
        pictures.side_by_side({k: self._shown(v[:SHOWN].float()) for k, v in panels.items()}, path, columns=columns)

    @torch.no_grad()
    def _shown(self, x: Tensor) -> Tensor:
        """Pixels (n, 1 or 3, H, W); of video the middle frame."""
        if self.decode is not None and x.ndim > 3:
            pixels = self.decode(x).cpu().float()
            return pixels[:, :, pixels.shape[2] // 2] if pixels.ndim == 5 else pixels
        x = x.cpu()
        x = x[:, :, x.shape[2] // 2] if x.ndim == 5 else x[:, None] if x.ndim == 3 else x
        x = x[:, :3] if x.shape[1] >= 3 else x[:, :1]
        return x / (3 * x.std()).clamp_min(1e-6)


def transient_decoder(path: str, device: Any) -> Callable[[Tensor], Tensor] | None:
    """Latents to pixels by the autoencoder of a diffusers folder, if it has one, which is freed after each call."""
    from distill.models.diffusers import Latent
    from distill.models.diffusers.folder import folder_of

    if not (folder_of(path) / "vae").is_dir():
        return None

    def decode(x: Tensor) -> Tensor:
        latent = Latent(path, device=str(device()))
        return torch.cat([latent.decode(row).cpu() for row in x.split(1)])

    return decode
