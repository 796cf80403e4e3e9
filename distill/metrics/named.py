r"""Metrics by name, as `eval.metrics` takes them: distances of images or of their features, and scores per sample.

| name | of | from |
|---|---|---|
| fid, kid | Inception features | Fréchet distance; cubic kernel, unbiased |
| fd_dinov2, kd_dinov2 | DINOv2's class token | the same two |
| fd_NAME, kd_NAME with `features` | any network | the same two |
| precision, recall with `features` | any network | k nearest neighbours |
| clip_score, pick_score, aesthetic_score; NAME_score or NAME_reward with `_target_` | each sample | mean |

Formulas and sources: `distill.metrics.distances`, `distill.metrics.rewards`; preprocessing: `distill.metrics.networks.vision`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill import config
from distill.errors import BadInput, suggest
from distill.metrics import distances as measure
from distill.metrics.features import (
    BATCH,
    ImageFolder,
    ImageSet,
    Pixels,
    Reference,
    extract,
    network,
    reference,
    stored,
)
from distill.metrics.shares import ALONE, SampleShares
from distill.metrics.table import SCORES

PLAIN = ("fd", "accuracy", "mmd", "precision", "recall")  # of the samples as they are, without `features`
SLOW = ("mmd", "precision", "recall")  # these need all pairs of samples
FEATURES = {"fid": "inception", "kid": "inception", "fd_dinov2": "dinov2", "kd_dinov2": "dinov2"}
REWARDS = {"clip_score": "ClipScore", "pick_score": "PickScore", "aesthetic_score": "Aesthetic"}
KNOWN = (*PLAIN, *FEATURES, *REWARDS)
OWN = ("features", "reference", "k")  # settings that are ours, not the network's


def settings(metrics: Any, where: str = "eval.metrics") -> dict[str, dict[str, Any]]:
    """Name -> settings, from a list of names or a mapping.

    Raises:
        BadInput: an unknown name, or settings that are no mapping.
    """
    metrics = dict.fromkeys(metrics) if isinstance(metrics, (list, tuple)) else metrics
    if not isinstance(metrics, Mapping):
        raise BadInput(f"{where}: {metrics!r} is neither a list of names nor a mapping; write [fid, clip_score].")
    out = {}
    for name, value in metrics.items():
        if not isinstance(value, (Mapping, type(None))):
            raise BadInput(f"{where}.{name}: expected settings, got {value!r}; write {where}.{name}.KEY=VALUE.")
        out[name] = dict(value or {})
        _known(str(name), out[name], where)
    return out


def _known(name: str, options: Mapping[str, Any], where: str) -> None:
    if name in KNOWN:
        unknown = [k for k in options if name in PLAIN and "features" not in options and k not in ("k", "features")]
        if unknown:
            raise BadInput(
                f"{where}.{name}.{unknown[0]}: {name} is of the samples themselves; name its `features` too, one "
                "of inception, dinov2, clip."
            )
    elif name.endswith(SCORES):
        if config.TARGET not in options:
            near = suggest(name, KNOWN)
            raise BadInput(f"{where}.{name}._target_ is missing; name a metric(x, data=None, **cond) -> (B,).{near}")
    elif not (name.startswith(("fd_", "kd_")) and "features" in options):
        more = " A callable's name ends in _score or _reward, more being better." if config.TARGET in options else ""
        raise BadInput(f"{where}: '{name}' is none of {', '.join(KNOWN)}.{suggest(name, KNOWN)}{more}")


@dataclass
class Metric:
    """One metric: a distance of the features of `net` to a reference, or the mean `reward` of the samples."""

    name: str
    net: Any = None
    reward: Any = None
    source: str | None = None  # path of a reference of its own
    k: int = 3

    def value(self, x: Tensor, real: Reference) -> float:
        """The value for features x (n, d), computed on their device."""
        if self.name in ("precision", "recall"):
            both = measure.precision_recall(x, real.rows(self.name).to(x.device), self.k)
            return both[self.name == "recall"]
        if self.name.startswith("k"):
            return measure.squared_mmd(x, real.rows(self.name).to(x.device))
        n = min(len(x), len(x if real.features is None else real.features))
        if n <= x.shape[1]:
            warnings.warn(
                f"{self.name} of {n} samples with {x.shape[1]} features: their covariance is singular and the "
                "distance far too large; compare it with rows of as many samples only.",
                stacklevel=2,
            )
        return measure.frechet_moments(*measure.moments(x), *real.moments(x.device))


class Measures:
    """The metrics of a run that use networks.

    Args:
        metrics: as returned by `settings`; those without a network are ignored.
        real: the images that samples are compared with where a metric names no `reference` of its own.
        allow: packages that `_target_` may name.
        device: of networks and distances; by default a GPU if there is one.

    Raises:
        BadInput: unknown settings, weights or a reference that are not there.
    """

    def __init__(
        self,
        metrics: Mapping[str, Mapping[str, Any]],
        real: ImageSet | None = None,
        allow: tuple[str, ...] = (),
        where: str = "eval.metrics",
        device: torch.device | str | None = None,
    ):
        self.real, self.device = real, device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._references: dict[Any, Any] = {}
        self.all, given = [], {}
        for name, options in metrics.items():
            if name in PLAIN and "features" not in options:
                continue
            self.all.append(self._metric(name, options, given, allow, f"{where}.{name}"))

    def _metric(self, name: str, options: Mapping[str, Any], given: dict, allow: tuple[str, ...], where: str) -> Metric:
        rest = {k: v for k, v in options.items() if k not in OWN}
        if name in REWARDS or name.endswith(SCORES):
            node = {config.TARGET: f"distill.metrics.rewards.{REWARDS[name]}"} if name in REWARDS else {}
            return Metric(name, reward=network(node | dict(options), None, allow, where))
        kind = options.get("features", FEATURES.get(name))
        if isinstance(kind, str):  # one metric may give a network's settings for all
            rest = given.setdefault(kind, rest) if not rest or kind not in given else rest
        source = options.get("reference")
        if source and not Path(source).expanduser().exists():
            raise BadInput(f"{where}.reference: {source} does not exist; name images, shards or a file of statistics.")
        k = options.get("k", 3)
        if not isinstance(k, int) or k < 1:
            raise BadInput(f"{where}.k: {k!r} must be a whole number from 1 on.")
        return Metric(name, network(kind, rest, allow, where), None, source, k)

    @property
    def names(self) -> list[str]:
        return [m.name for m in self.all]

    def score(
        self,
        pixels: Callable[[], Pixels],
        cond: Mapping[str, Any] | None = None,
        quick: bool = False,
        ranks: SampleShares = ALONE,
        only: Iterable[str] | None = None,
    ) -> dict[str, float]:
        """Name -> value of all ranks' samples together, on all of them.

        Args:
            pixels: returns an iterator over batches of this rank's samples, (B, C, H, W) in [-1, 1]; called once per
                network.
            cond: this rank's conditions, one row per sample, such as `caption` (a list) and `label` for rewards.
            quick: leave out metrics that need all pairs of samples.
        """
        wanted = [m for m in self.all if not (quick and m.name in SLOW) and (only is None or m.name in only)]
        gathered: dict[Any, Tensor | None] = {}  # features by network, scores by metric, on the first rank
        for m in wanted:
            if m.net is not None and id(m.net) not in gathered:
                features = ranks.on_all(lambda m=m: extract(m.net, pixels(), self.device))
                gathered[id(m.net)] = ranks.gather(features)
            if m.reward is not None:
                scores = ranks.on_all(lambda m=m: self._rewards(m, pixels(), cond or {}))
                gathered[m.name] = ranks.gather(scores)
        real = {m.name: self._reference(m, gathered[id(m.net)], ranks) for m in wanted if m.net is not None}

        def value(m: Metric) -> float:
            if m.reward is not None:
                return float(gathered[m.name].double().mean())
            return m.value(self._on_device(gathered[id(m.net)]), real[m.name])

        return ranks.from_first(lambda: {m.name: value(m) for m in wanted})

    def _on_device(self, x: Tensor) -> Tensor:
        return x.to("cpu" if str(self.device).startswith("mps") else self.device)

    def _reference(self, m: Metric, x: Tensor | None, ranks: SampleShares) -> Reference | None:
        """On the first rank; all call it."""
        key = id(m.net), m.source
        path = Path(m.source).expanduser() if m.source else None
        if key not in self._references:
            if path and path.is_file():
                self._references[key] = ranks.on_all(lambda: stored(path, x.shape[1]) if x is not None else None)
            else:
                images = ranks.on_all(lambda: self.real if path is None else images_of(path))
                if images is None:
                    raise BadInput(f"{m.name} needs real images; name its reference.")
                self._references[key] = reference(m.net, images, self.device, ranks)
        return self._references[key]

    def _rewards(self, m: Metric, pixels: Pixels, cond: Mapping[str, Any]) -> Tensor:
        done, parts = 0, []
        for x in pixels:
            rows = {k: v[done : done + len(x)] for k, v in cond.items()}
            moved = {k: v.to(self.device) if isinstance(v, Tensor) else v for k, v in rows.items()}
            with torch.no_grad():
                score = m.reward(x.to(self.device), data=None, **moved)
            if not isinstance(score, Tensor) or score.shape != (len(x),):
                raise BadInput(
                    f"{m.name} gives {tuple(getattr(score, 'shape', ()))} for {len(x)} samples; let it return (B,)."
                )
            parts.append(score.detach().float().cpu())
            done += len(x)
        return torch.cat(parts) if parts else torch.empty(0)


def images_of(path: str | Path, limit: int | None = None) -> ImageSet:
    """Real images at a path: a folder of image files, or of shards."""
    path = Path(path).expanduser()
    from distill.data.sources.folder import visible

    if path.is_dir() and not any(file.suffix == ".tar" for file in visible(path)):
        return ImageFolder(path)
    from distill.data.shards.dataset import Shards

    batch = Shards(path, BATCH, labels=False).all(limit)
    if "x" not in batch:
        raise BadInput(f"{path} has prompts but no images to compare with; name shards of images.")
    return ImageSet(batch["x"], name=str(path), captions=batch.get("caption"))
