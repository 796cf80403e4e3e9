"""Metric suites by kind of data: images against a reference split, toys against their exact distribution."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.denoise import GaussianMixture
from distill.errors import BadInput
from distill.metrics import distances, features, named, pictures, table
from distill.metrics.shares import ALONE, SampleShares

WIDE = 4096  # values of a sample up to which the covariance of the samples themselves has a root in seconds


class Suite:
    """What to measure of samples: the interface of `ImageSuite`, `ToySuite` and `distill.metrics.latents.LatentSuite`.

    Attributes:
        x: reference samples (m, ...); None before `prepare` where they are drawn from the teacher.
        label: their classes (m,), or None.
        oracle: the exact distribution of the data, or None.
        headline: the main metric of a run, which decides the best checkpoint by default.
    """

    x: Tensor | None = None
    label: Tensor | None = None
    oracle: Any = None
    headline: str

    def prepare(self, ranks: SampleShares = ALONE) -> None:
        """Compute the reference that `score` compares with, if it was not passed; all of `ranks` call it."""

    def score(
        self, x: Tensor, cond: dict[str, Any], quick: bool = False, ranks: SampleShares = ALONE
    ) -> dict[str, float]:
        """Metric -> value of samples x (n, ...) made under `cond`.

        Args:
            quick: leave out metrics that need all pairs of samples.
            ranks: every rank passes its share of the samples; all receive the values of all samples.
        """
        raise NotImplementedError

    def reference_vs_holdout(self, ranks: SampleShares = ALONE) -> dict[str, float]:
        """Metric -> value of other real samples, which a perfect model would have; empty if there are none."""
        return {}

    def picture(self, panels: dict[str, Tensor], path: str | Path, columns: int = 0) -> None:
        """Write samples by title side by side as a PNG."""
        raise NotImplementedError


class ImageSuite(Suite):
    """Metrics of images against reference images, on the values themselves or on features of networks.

    Args:
        x, label: the reference split (n, C, H, W) in [-1, 1], or latents, and its classes (n,) or None.
        held_out: the other split, for `reference_vs_holdout`: the distance of two finite sets of real images.
        reward: the method's reward, `metric(x, **cond) -> (B,)`; its mean is a metric too.
        metrics: a list of names or names with settings (`distill.metrics.named`); by default fd (of up to 4,096
            values), mmd, accuracy, precision and recall of the values themselves.
        decode: latents to pixels, for networks and pictures.
        allow: packages that a metric's `_target_` may name.
    """

    def __init__(
        self,
        x: Tensor,
        label: Tensor | None = None,
        held_out: Tensor | None = None,
        reward: Any = None,
        *,
        metrics: Any = None,
        decode: Callable[[Tensor], Tensor] | None = None,
        allow: tuple[str, ...] = (),
    ):
        self.x, self.label, self.held_out, self.reward, self.decode = x, label, held_out, reward, decode
        wide = x[0].numel() > WIDE
        options = named.settings(metrics) if metrics else dict.fromkeys(named.PLAIN[wide:], {})
        self.plain = [name for name in options if name in named.PLAIN and "features" not in options[name]]
        if wide and "fd" in self.plain:
            raise BadInput(
                f"eval.metrics: samples of {x[0].numel():,} values are too many for fd, which roots their covariance; "
                "name a distance of features, such as kid or fd_dinov2."
            )
        self.k = {name: options[name].get("k", 3) for name in self.plain}
        self.measures = named.Measures(options, features.ImageSet(x, decode), allow)
        self.names = [*options, *(["reward"] if reward else [])]

    @property
    def headline(self) -> str:
        """The first metric that is better when lower; the first one if there is none."""
        return next((name for name in self.names if not table.higher(name)), self.names[0])

    @cached_property
    def accuracy(self) -> distances.Accuracy | None:
        """None where no classifier can be fitted: without labels, or with fewer than two classes of two samples."""
        fits = self.label is not None and len(distances.classes_with(self.label, 2)) > 1
        return distances.Accuracy(self.x, self.label) if fits else None

    def score(
        self, x: Tensor, cond: dict[str, Any], quick: bool = False, ranks: SampleShares = ALONE
    ) -> dict[str, float]:
        x = x.cpu().float()
        label = cond.get("label")
        whole = ranks.gather(x), ranks.gather(label) if label is not None else None
        values = ranks.from_first(lambda: self._plain(*whole, quick))
        if self.reward:
            each = ranks.gather(ranks.on_all(lambda: self.reward(x, **cond).double()))
            values["reward"] = ranks.from_first(lambda: float(each.mean()))
        values |= self.measures.score(lambda: self.pixels(x), cond, quick, ranks)
        return {name: values[name] for name in self.names if name in values}

    def pixels(self, x: Tensor) -> features.Pixels:
        return features.batches(x, decode=self.decode)

    def _plain(self, x: Tensor, label: Tensor | None, quick: bool) -> dict[str, float]:
        out: dict[str, float] = {}
        for name in self.plain:
            if quick and name in named.SLOW and name != self.headline:
                continue
            if name == "fd":
                out[name] = distances.frechet(x, self.x)
            elif name == "accuracy" and self.accuracy and label is not None:
                if not math.isnan(accuracy := self.accuracy.score(x, label)):
                    out[name] = accuracy
            elif name == "mmd":
                out[name] = distances.squared_mmd(x, self.x)
            elif name in ("precision", "recall") and name not in out:
                both = dict(zip(("precision", "recall"), distances.precision_recall(x, self.x, self.k[name])))
                out |= {key: value for key, value in both.items() if self.k.get(key) == self.k[name]}
        return out

    def reference_vs_holdout(self, ranks: SampleShares = ALONE) -> dict[str, float]:
        """Distances between the two real splits, which a perfect model would have too."""
        if self.held_out is None:
            return {}
        local = self.held_out[ranks.share(len(self.held_out))]
        values = self.measures.score(lambda: self.pixels(local), {}, True, ranks, only=self.distances)
        return ({"fd": distances.frechet(self.x, self.held_out)} if "fd" in self.plain else {}) | values

    @property
    def distances(self) -> list[str]:
        return [name for name in self.measures.names if not table.higher(name)]

    def picture(self, panels: dict[str, Tensor], path: str | Path, columns: int = 10) -> None:
        images = {k: torch.cat(list(self.pixels(v.cpu().float()))) for k, v in panels.items()}
        pictures.side_by_side(images, path, columns=columns)


class ToySuite(Suite):
    """Energy distance, exact divergences and mode masses against an oracle of `distill.denoise`.

    In one dimension with a deterministic student also `map_error`: root mean square of G(z) - flow map(z), over the
    data's standard deviation.

    Raises:
        BadInput: `metrics`, which are of images.
    """

    headline = "energy"

    def __init__(self, oracle: Any, samples: int = 4000, seed: int = 12345, metrics: Any = None):
        if metrics:
            raise BadInput(
                f"eval.metrics: {', '.join(map(str, metrics))} cannot be computed of data with an exact distribution, "
                "which is scored by energy, nll_gap and mode_kl: leave eval.metrics out."
            )
        self.oracle = oracle
        self.x, _ = oracle.sample(samples, generator=torch.Generator().manual_seed(seed))

    def score(
        self, x: Tensor, cond: dict[str, Any], quick: bool = False, ranks: SampleShares = ALONE
    ) -> dict[str, float]:
        x = ranks.gather(x.float())
        return ranks.from_first(lambda: self._score(x, quick))

    def _score(self, x: Tensor, quick: bool) -> dict[str, float]:
        out = {"energy": distances.energy_distance(x, self.x)}
        if not quick:
            out["nll_gap"] = distances.nll_gap(x, self.oracle)
            if isinstance(self.oracle, GaussianMixture):
                out["mode_kl"] = distances.mode_kl(x, self.oracle)
        return out

    def map_error(self, z: Tensor, x: Tensor) -> float:
        """RMS of x - exact flow map(z, 1 -> 0), over the data's standard deviation."""
        n = len(z)
        exact = self.oracle.flow_map(z.double(), torch.ones(n).double(), torch.zeros(n).double())
        return float((x.double() - exact).square().mean().sqrt() / self.x.std())

    def reference_vs_holdout(self, ranks: SampleShares = ALONE) -> dict[str, float]:
        again, _ = self.oracle.sample(len(self.x), generator=torch.Generator().manual_seed(54321))
        return {"energy": distances.energy_distance(again, self.x)}

    def picture(self, panels: dict[str, Tensor], path: str | Path, columns: int = 0) -> None:
        panels = {k: v.cpu().float() for k, v in panels.items()}
        if self.x.shape[1] == 2:
            pictures.scatter(panels, path, reference=self.oracle)
        else:
            pictures.histogram(panels, path, reference=self.x)
