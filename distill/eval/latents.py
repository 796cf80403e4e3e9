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

from distill.errors import BadInput
from distill.eval import metrics, named, pictures, table
from distill.eval.features import Images, batches
from distill.eval.ranks import ALONE, Ranks

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
        metrics: more to measure, by networks that look at decoded samples (`distill.eval.named`).
        look: `decode` for these; it stays in memory.
        captions: n to those of n samples, for metrics that read them.
        allow: packages that a metric's `_target_` may name.
    """

    def __init__(self, reference: Tensor | Callable[[], Tensor], keep: Path | None = None, key: str = "",
                 decode: Callable[[Tensor], Tensor] | None = None, held_out: Tensor | None = None, *, metrics: Any = None,
                 look: Callable[[Tensor], Tensor] | None = None, captions: Callable[[int], list[str]] | None = None,
                 allow: tuple[str, ...] = ()):
        asked = named.settings(metrics or [])
        for name in asked:
            if name in named.PLAIN and "features" not in asked[name]:
                raise BadInput(f"eval.metrics: {name} of latents is latent_fd and latent_mmd, which are measured anyway; leave "
                               "it out, or give it `features`.")  # fmt: skip
        if asked and look is None:
            raise BadInput("eval.metrics: samples are latents, and nothing decodes them; name the folder of their autoencoder "
                           "by eval.decode.")  # fmt: skip
        self.seen, self.look, self.captions = named.Measures(asked, None, allow), look, captions
        self.headline = next((name for name in asked if not table.higher(name)), "latent_fd")
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

    def score(self, x: Tensor, cond: dict[str, Any], quick: bool = False, ranks: Ranks = ALONE) -> dict[str, float]:
        """Metric -> value of samples x; `quick` leaves out what needs all pairs of samples.

        With `ranks`, all of them call it with their shares of the samples, and have the values of all.
        """
        theirs, whole = self.prepare(), ranks.gather(x.float())
        out = ranks.tell(lambda: self._plain(whole, theirs, quick))
        return out | self._named(x.cpu().float(), cond, quick, ranks) if self.seen.all else out

    def _plain(self, x: Tensor, theirs: Tensor, quick: bool) -> dict[str, float]:
        ours = features(x)
        out = {"latent_fd": metrics.frechet(ours, theirs), "mean": float(x.mean()), "std": float(x.std())}
        return out if quick else out | {"latent_mmd": metrics.mmd(ours, theirs)}

    def _named(self, x: Tensor, cond: dict[str, Any], quick: bool, ranks: Ranks, **kw) -> dict[str, float]:
        self.seen.real = self.seen.real or Images(self.x, self.pixels)
        if self.captions and "caption" not in cond:
            counts = ranks.counts(len(x))
            first = sum(counts[: ranks.rank])
            cond = cond | {"caption": self.captions(sum(counts))[first : first + len(x)]}
        return self.seen.score(lambda: batches(x, SHOWN, self.pixels), cond, quick, ranks, **kw)

    @torch.no_grad()
    def pixels(self, x: Tensor) -> Tensor:
        """What networks see of x, (n, 3, H, W): of video the middle frame."""
        made = self.look(x).cpu().float()
        return (made[:, :, made.shape[2] // 2] if made.ndim == 5 else made).clamp(-1, 1)

    def floor(self, ranks: Ranks = ALONE) -> dict[str, float]:
        """Distances between the reference and the other split."""
        if self.held_out is None:
            return {}
        found = {"latent_fd": metrics.frechet(features(self.held_out), self.prepare())}
        own, only = self.held_out[ranks.share(len(self.held_out))], [n for n in self.seen.names if not table.higher(n)]
        return found | (self._named(own.float(), {}, True, ranks, only=only) if only else {})

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
